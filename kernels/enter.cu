// enter: fills the residual rows that enter the forward pass. For i below count, row = first + i:
//
//   kind[row] 0   resid[row, :] = scale embedding[value[row], :]         a token
//             1   resid[row, :] = cached[value[row], :]                  a row of a clean run
//             2   resid[row, :] = scale embedding[last[value[row]], :]   the token slot value[row] drew
//             3   nothing is written                                     a dead row
//
// Shapes  resid, cached: (.., dim) f32    embedding: (vocab, dim) bf16, in a weight's tiles of 64
//         features x 64 k    kind, value: by row of resid    last: (slots)
// Nothing A token that is not below vocab (NONE after a draw that failed) reads as vocab - 1.
// Launch  grid = count, block = 128 threads (any number works).
// Needs   dim % 8 == 0; arrays of rows 16-byte aligned.
#include "device.cuh"

struct EnterParams {
    float*          resid;
    const bf16*     embedding;
    const float*    cached;
    const uint32_t* kind;
    const uint32_t* value;
    const uint32_t* last;
    int             first, count, dim, k_tiles, vocab;
    float           scale;
};
static_assert(sizeof(EnterParams) == 72, "mirror of src/ops/enter.rs");

extern "C" __global__ void __launch_bounds__(1024) enter(const __grid_constant__ EnterParams p) {
    constexpr uint32_t CACHED = 1, DRAWN = 2, DEAD = 3;
    if (blockIdx.x >= static_cast<unsigned>(p.count)) return;
    const int64_t row = static_cast<int64_t>(p.first) + blockIdx.x;
    const uint32_t kind = p.kind[row];
    if (kind == DEAD) return;
    uint32_t value = p.value[row];
    float* to = p.resid + row * p.dim;
    const int step = 4 * blockDim.x;

    if (kind == CACHED) {
        const float* from = p.cached + static_cast<int64_t>(value) * p.dim;
        for (int k = 4 * threadIdx.x; k < p.dim; k += step)
            *reinterpret_cast<float4*>(to + k) = *reinterpret_cast<const float4*>(from + k);
        return;
    }
    if (kind == DRAWN) value = p.last[value];
    const uint32_t vocab = static_cast<uint32_t>(p.vocab);
    const uint32_t token = value < vocab ? value : vocab - 1;
    const bf16* tiles = p.embedding + static_cast<int64_t>(token / 64) * p.k_tiles * 4096;
    for (int k = 4 * threadIdx.x; k < p.dim; k += step) {
        const int chunk = (k % 64 / 8) ^ static_cast<int>(token % 8);
        const int inside = static_cast<int>(token % 64) * 64 + chunk * 8 + k % 8;
        const bf16* from = tiles + static_cast<int64_t>(k / 64) * 4096 + inside;
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        *reinterpret_cast<float4*>(to + k) =
            float4{p.scale * low_bf16(v.x), p.scale * high_bf16(v.x), p.scale * low_bf16(v.y),
                   p.scale * high_bf16(v.y)};
    }
}
EXPORT_KERNEL(enter, EnterParams)
