// fill_weight: a weight of deterministic random values, for benchmarks of models without weights.
//
//   weight[row, k] = scale * z(seed, row, k), z close to normal: mean 0, variance 1, |z| <= 3.46
//
// Shape   (n, k) in weight tiles of 64 x 64, n_tiles x k_tiles of them; the padding becomes zero.
// Types   weight: bf16 in swizzled tiles (device.cuh).
// Launch  block = any multiple of 32 threads; grid.x = any, the best is a few blocks per
//         multiprocessor: a thread writes chunks of 8 k until all are written.
#include "device.cuh"

struct FillWeightParams {
    bf16*    weight;
    uint64_t seed;
    int32_t  n;         // rows without padding
    int32_t  k;         // columns without padding
    int32_t  k_tiles;
    int32_t  n_tiles;
    float    scale;     // standard deviation
};
static_assert(sizeof(FillWeightParams) == 40, "mirrored by the launcher");

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
__device__ inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// Sum of four uniform bytes: mean 510, variance 4 (256^2 - 1) / 12.
__device__ inline float normal(uint32_t word) {
    const uint32_t sum = (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24);
    return (static_cast<float>(sum) - 510.0f) * 6.76580e-3f;
}

extern "C" __global__ void fill_weight(const __grid_constant__ FillWeightParams p) {
    const int64_t chunks = static_cast<int64_t>(p.n_tiles) * p.k_tiles * 512;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const uint64_t key = mix(p.seed);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < chunks; i += stride) {
        // Place i holds, by the swizzle, chunk (i % 8) ^ (row % 8) of its row of its tile.
        const int64_t tile = i / 512;
        const int row = static_cast<int>(tile / p.k_tiles) * 64 + static_cast<int>(i % 512) / 8;
        const int first = static_cast<int>(tile % p.k_tiles) * 64 + (static_cast<int>(i % 8) ^ (row % 8)) * 8;
        uint32_t packed[4];
        for (int pair = 0; pair < 4; pair++) {
            const int column = first + pair * 2;
            const uint64_t counter = static_cast<uint64_t>(row) << 32 | static_cast<uint32_t>(column);
            const uint64_t word = mix(key + counter * 0x9e3779b97f4a7c15ull);
            const float low = p.scale * normal(static_cast<uint32_t>(word));
            const float high = p.scale * normal(static_cast<uint32_t>(word >> 32));
            packed[pair] = pack_bf16(row < p.n && column < p.k ? low : 0.0f,
                                     row < p.n && column + 1 < p.k ? high : 0.0f);
        }
        reinterpret_cast<uint4*>(p.weight)[i] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
}
EXPORT_KERNEL(fill_weight, FillWeightParams)
