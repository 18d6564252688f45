// matmul: parameters, the order of the tiles, and what becomes of a finished tile. See matmul.cu.
//
// Both main loops leave a tile in the fragments of mma.sync and wgmma: of 16 weight rows (a slice)
// and 8 tokens, lane (g = lane / 4, q = lane % 4) holds
//   d[0], d[1]: weight row g, tokens 2q, 2q + 1      d[2], d[3]: weight row g + 8, the same tokens
// A team is the 128 threads that share 64 weight rows, i.e. 4 slices.
#pragma once
#include "math.cuh"
#include "ptx.cuh"

struct MatmulParams {
    const bf16*  weight;       // tiles, n padded to 64, k to 64
    const bf16*  x;            // Tiles (>= rows, k_tiles * 64)
    const float* bias;         // (n), in the order of the weight's rows; null: none
    void*        out;          // plain: f32 (rows, n); gated: bf16 Tiles (>= rows, n / 2)
    const bf16* const* weights;   // tiles of several weights, of which each block of tokens has its own
    const uint32_t* blocks;    // blocks of tokens there are, then which of `weights` each has; null: all have `weight`
    int32_t      rows;         // tokens, > 0, <= 8 * row_groups
    int32_t      n;            // weight rows, without padding; gated: a multiple of 16
    int32_t      k_tiles;      // > 0
    int32_t      row_groups;   // of x
    int32_t      out_row_groups;   // of out; gated only
    int32_t      activation;   // ACTIVATION_*; gated only
};
static_assert(sizeof(MatmulParams) == 72, "mirrored by the launcher");

constexpr int ACTIVATION_SILU = 0, ACTIVATION_GELU_TANH = 1;
constexpr int TILE_K = 64;                 // k of a stage and of a weight tile
constexpr int TILE_ROWS = 64;              // weight rows of a weight tile
constexpr int TILE_ELEMENTS = TILE_ROWS * TILE_K;
constexpr int ATOM_ELEMENTS = 8 * TILE_K;  // 8 rows of 128 bytes: one swizzle pattern
constexpr int TEAM = 128;
constexpr int STAGED_BYTES = 64;           // of a token in a team's gated output: 32 features

struct TileStart { int row, token; };      // first weight row, first token

// Blocks that run together hold consecutive tiles. Running down the tokens first, they share each
// weight tile while it is in the L2 cache; 8 token blocks at most, so that x stays there too.
template <int FEATURES, int TOKENS>
struct TileOrder {
    static constexpr int GROUP = 8;
    int token_blocks, feature_blocks;

    __device__ explicit TileOrder(const MatmulParams& p)
        : token_blocks(p.blocks ? static_cast<int>(p.blocks[0]) : (p.rows + TOKENS - 1) / TOKENS),
          feature_blocks((p.n + FEATURES - 1) / FEATURES) {}

    __device__ int count() const { return token_blocks * feature_blocks; }

    __device__ TileStart at(int index) const {
        const int group = index / (GROUP * feature_blocks), first = group * GROUP;
        const int height = min(GROUP, token_blocks - first);
        const int rest = index - first * feature_blocks;
        return {rest / height * FEATURES, (first + rest % height) * TOKENS};
    }
};

// The tiles of the weight that a block of tokens has.
template <int TOKENS>
__device__ inline const bf16* weight_of(const MatmulParams& p, int token) {
    return p.blocks ? p.weights[p.blocks[1 + token / TOKENS]] : p.weight;
}

// How many groups of 8 rows of x a tile's tokens touch: the others may not exist.
template <int TOKENS>
__device__ inline int groups_of_x(const MatmulParams& p, int token) {
    return min(TOKENS / 8, (p.rows - token + 7) / 8);
}

__device__ inline float gate(float linear, int activation) {
    // gelu_tanh: linear / 2 * (1 + tanh(z / 2)) = linear / (1 + exp(-z))
    float z = linear;
    if (activation == ACTIVATION_GELU_TANH)
        z = 1.5957691216f * (linear + 0.044715f * linear * linear * linear);   // 2 sqrt(2 / pi)
    return divide_approx(linear, 1.0f + exp_approx(-z));
}

template <int TOKENS>
__device__ inline void add_bias(const MatmulParams& p, int row, float (&acc)[TOKENS / 2]) {
    const int lane = threadIdx.x % WARP;
    const float low = row + lane / 4 < p.n ? p.bias[row + lane / 4] : 0.0f;
    const float high = row + lane / 4 + 8 < p.n ? p.bias[row + lane / 4 + 8] : 0.0f;
#pragma unroll
    for (int d = 0; d < TOKENS / 2; d++) acc[d] += d % 4 < 2 ? low : high;
}

// A warp's slice to f32 (rows, n). Eight lanes g write 32 consecutive bytes: whole sectors, so
// nothing is gained by going through shared memory.
template <int TOKENS>
__device__ inline void store_plain(const MatmulParams& p, int row, int token,
                                   const float (&acc)[TOKENS / 2]) {
    const int lane = threadIdx.x % WARP;
    const int low = row + lane / 4, first = token + 2 * (lane % 4);
    float* out = static_cast<float*>(p.out) + static_cast<int64_t>(first) * p.n + low;
#pragma unroll
    for (int block = 0; block < TOKENS / 8; block++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            if (first + block * 8 + odd >= p.rows) return;
            float* at = out + static_cast<int64_t>(block * 8 + odd) * p.n;
            if (low < p.n) at[0] = acc[block * 4 + odd];
            if (low + 8 < p.n) at[8] = acc[block * 4 + 2 + odd];
        }
    }
}

// Where a chunk of 8 features of a token stands in a team's staged output. The swizzle spreads the
// even tokens of 8 over 16 banks and the odd ones over the others: no conflicts either way.
__device__ inline int staged_at(int token, int chunk) {
    return token * STAGED_BYTES + (chunk ^ (token / 2 % 4)) * 16;
}

// A warp's slice (8 features: gate rows g, up rows g + 8) to the staged output; token: in the block.
template <int TOKENS>
__device__ inline void stage_gated(const MatmulParams& p, int slice, int token,
                                   const float (&acc)[TOKENS / 2], unsigned char* staged) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int block = 0; block < TOKENS / 8; block++) {
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const float value = gate(acc[block * 4 + odd], p.activation) * acc[block * 4 + 2 + odd];
            const int at = staged_at(token + block * 8 + 2 * (lane % 4) + odd, slice);
            reinterpret_cast<bf16*>(staged + at)[lane / 4] = to_bf16(value);
        }
    }
}

// The staged output of a team to Tiles, whole chunks, 64 bytes of a row of an atom at a time.
template <int TOKENS>
__device__ inline void store_gated(const MatmulParams& p, int row, int token, const unsigned char* staged) {
    const int first = row / 16;   // 16 weight rows make a chunk of 8 features
    for (int i = threadIdx.x % TEAM; i < TOKENS * 4; i += TEAM) {
        const int at = i / 4, chunk = i % 4;
        if (token + at >= p.rows || (first + chunk) * 16 >= p.n) continue;
        bf16* out = static_cast<bf16*>(p.out) + tile_chunk(token + at, first + chunk, p.out_row_groups);
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(staged + staged_at(at, chunk));
    }
}
