// matmul for any GPU from sm_80 on: cp.async and mma.sync. See matmul.cu.
//
// A team of 4 warps has 64 weight rows; its warps split them and the block's tokens into warp tiles
// of SLICES * 16 rows. Stages of 64 k lie in a ring; one is multiplied while the next ones arrive.
#pragma once
#include "matmul_epilogue.cuh"

template <int TOKENS_, int TEAMS_, int SLICES_, int STAGES_>
struct MmaShape {
    static constexpr int TOKENS = TOKENS_, TEAMS = TEAMS_, SLICES = SLICES_, STAGES = STAGES_;
    static constexpr int FEATURES = TEAMS * TILE_ROWS;
    static constexpr int THREADS = TEAMS * TEAM;
    static constexpr int WARP_TOKENS = TOKENS / SLICES;   // 4 warps: 4 / SLICES down, SLICES across
    static constexpr int STAGE_BYTES = (FEATURES + TOKENS) * TILE_K * 2;
    static constexpr int SMEM = STAGES * STAGE_BYTES;     // the gated output is staged in the ring
    static_assert(WARP_TOKENS % 16 == 0, "ldmatrix takes 16 tokens at a time");
    static_assert(TEAMS * TOKENS * STAGED_BYTES <= SMEM, "room for the gated output");
};

// Chunk (8 k) of a row in a swizzled tile of rows of 128 bytes.
__device__ inline const unsigned char* swizzled(const unsigned char* tile, int row, int chunk) {
    return tile + row * (TILE_K * 2) + (chunk ^ (row % 8)) * 16;
}

// Starts the copies of one stage; what does not exist is zero-filled, not read.
template <class Shape>
__device__ void mma_load(const MatmulParams& p, const bf16* weight, TileStart tile, int k,
                         unsigned char* stage) {
    const int weight_tiles = (p.n + TILE_ROWS - 1) / TILE_ROWS, first = tile.row / TILE_ROWS;
    constexpr int PIECES = TILE_ELEMENTS / 8;
#pragma unroll
    for (int i = threadIdx.x; i < Shape::FEATURES * 8; i += Shape::THREADS) {
        const bool exists = first + i / PIECES < weight_tiles;
        const int64_t from = static_cast<int64_t>(first + (exists ? i / PIECES : 0)) * p.k_tiles + k;
        cp_async_16(stage + i * 16, weight + from * TILE_ELEMENTS + i % PIECES * 8, exists);
    }
    const int pieces = groups_of_x<Shape::TOKENS>(p, tile.token) * 64;
    const bf16* x = p.x + (static_cast<int64_t>(k) * p.row_groups + tile.token / 8) * ATOM_ELEMENTS;
#pragma unroll
    for (int i = threadIdx.x; i < Shape::TOKENS * 8; i += Shape::THREADS)
        cp_async_16(stage + Shape::FEATURES * 128 + i * 16, x + (i < pieces ? i * 8 : 0), i < pieces);
}

// acc += weight tile * x over the 64 k of a stage; row: of the warp in the block, token likewise.
template <class Shape>
__device__ void mma_stage(const unsigned char* stage, int row, int token,
                          float (&acc)[Shape::SLICES][Shape::WARP_TOKENS / 2]) {
    const unsigned char* x = stage + Shape::FEATURES * 128;
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 0; step < TILE_K / 16; step++) {
        uint32_t a[Shape::SLICES][4];
#pragma unroll
        for (int slice = 0; slice < Shape::SLICES; slice++)
            ldmatrix_x4(a[slice], swizzled(stage, row + slice * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int pair = 0; pair < Shape::WARP_TOKENS / 16; pair++) {
            uint32_t b[4];   // 8 tokens x 16 k, and the next 8 tokens
            const int column = token + pair * 16 + lane / 16 * 8 + lane % 8;
            ldmatrix_x4(b, swizzled(x, column, step * 2 + lane / 8 % 2));
#pragma unroll
            for (int slice = 0; slice < Shape::SLICES; slice++) {
                mma_m16n8k16(&acc[slice][pair * 8], a[slice], b);
                mma_m16n8k16(&acc[slice][pair * 8 + 4], a[slice], b + 2);
            }
        }
    }
}

template <class Shape, bool GATED>
__device__ void mma_matmul(const MatmulParams& p) {
    DYNAMIC_SMEM(unsigned char, smem);
    const TileOrder<Shape::FEATURES, Shape::TOKENS> order(p);
    const int team = threadIdx.x / TEAM, warp = threadIdx.x / WARP % 4;
    const int first_slice = warp / Shape::SLICES * Shape::SLICES;
    const int first_token = warp % Shape::SLICES * Shape::WARP_TOKENS;
    auto stage = [&](int k) { return smem + k % Shape::STAGES * Shape::STAGE_BYTES; };
    for (int index = blockIdx.x; index < order.count(); index += gridDim.x) {
        const TileStart tile = order.at(index);
        const bf16* weight = weight_of<Shape::TOKENS>(p, tile.token);
        float acc[Shape::SLICES][Shape::WARP_TOKENS / 2] = {};
        // A group is committed for every stage, empty ones too, so that the waits count evenly.
        for (int k = 0; k < Shape::STAGES - 1; k++) {
            if (k < p.k_tiles) mma_load<Shape>(p, weight, tile, k, stage(k));
            cp_async_commit();
        }
        for (int k = 0; k < p.k_tiles; k++) {
            cp_async_wait<Shape::STAGES - 2>();   // this thread's part of stage k has arrived
            __syncthreads();                      // everybody's; and nobody reads stage k - 1 any more
            const int next = k + Shape::STAGES - 1;
            if (next < p.k_tiles) mma_load<Shape>(p, weight, tile, next, stage(next));
            cp_async_commit();
            mma_stage<Shape>(stage(k), team * TILE_ROWS + first_slice * 16, first_token, acc);
        }
        __syncthreads();   // the ring is free: for the gated output, then for the next tile

        const int row = tile.row + team * TILE_ROWS;
        unsigned char* staged = smem + team * Shape::TOKENS * STAGED_BYTES;
#pragma unroll
        for (int s = 0; s < Shape::SLICES; s++) {
            const int slice_row = row + (first_slice + s) * 16;
            if (p.bias) add_bias<Shape::WARP_TOKENS>(p, slice_row, acc[s]);
            if constexpr (GATED)
                stage_gated<Shape::WARP_TOKENS>(p, first_slice + s, first_token, acc[s], staged);
            else
                store_plain<Shape::WARP_TOKENS>(p, slice_row, tile.token + first_token, acc[s]);
        }
        if constexpr (GATED) {
            __syncthreads();
            store_gated<Shape::TOKENS>(p, row, tile.token, staged);
            __syncthreads();   // before the next tile's copies overwrite it
        }
    }
}
