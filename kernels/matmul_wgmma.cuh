// matmul on Hopper: one warp copies, the others multiply. See matmul.cu.
//
// Warps 0 .. 4 * TEAMS - 1 are consumers: a warpgroup (team) multiplies one weight tile of 64 rows
// with all tokens of the block. The last warp is the producer: its first lane fills a ring of
// stages, each 64 k deep, by bulk copies, and runs ahead into the block's next tiles while the
// consumers store. full[s] completes when the bytes of stage s are there; empty[s] when every
// consumer warp has arrived: a warpgroup's warps finish a wgmma each for itself.
#pragma once
#include "matmul_epilogue.cuh"

template <int TOKENS_, int TEAMS_, int STAGES_>
struct WgmmaShape {
    static constexpr int TOKENS = TOKENS_, TEAMS = TEAMS_, STAGES = STAGES_;
    static constexpr int FEATURES = TEAMS * TILE_ROWS;
    static constexpr int THREADS = TEAMS * TEAM + WARP;
    static constexpr int STAGE_BYTES = (FEATURES + TOKENS) * TILE_K * 2;
    static constexpr int STAGED = TOKENS * STAGED_BYTES;   // bytes, each team
    static constexpr int SMEM = STAGES * (STAGE_BYTES + 16) + TEAMS * STAGED;
    static_assert(STAGE_BYTES % 1024 == 0, "swizzled tiles are aligned to 1024 bytes");
};

#if HAS_SM90A

// Place in the ring: its stage, and the parity of the current round.
template <class Shape>
struct RingPlace {
    int stage = 0;
    unsigned parity = 0;
    __device__ void advance() {
        if (++stage < Shape::STAGES) return;
        stage = 0;
        parity ^= 1;
    }
};

template <class Shape>
struct WgmmaRing {
    unsigned char* stages;   // weight tiles, then x
    unsigned char* staged;   // gated output, each team its own
    uint64_t* full;
    uint64_t* empty;

    __device__ explicit WgmmaRing(unsigned char* smem) : stages(smem) {
        staged = stages + Shape::STAGES * Shape::STAGE_BYTES;
        full = reinterpret_cast<uint64_t*>(staged + Shape::TEAMS * Shape::STAGED);
        empty = full + Shape::STAGES;
    }
    __device__ bf16* weight(int stage) const {
        return reinterpret_cast<bf16*>(stages + stage * Shape::STAGE_BYTES);
    }
    __device__ bf16* x(int stage) const { return weight(stage) + Shape::FEATURES * TILE_K; }
};

// One thread: copies the stages of all tiles of this block, in order.
template <class Shape>
__device__ void wgmma_produce(const MatmulParams& p, const WgmmaRing<Shape>& ring) {
    const TileOrder<Shape::FEATURES, Shape::TOKENS> order(p);
    const int weight_tiles = (p.n + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t tile_row = static_cast<int64_t>(p.k_tiles) * TILE_ELEMENTS;
    RingPlace<Shape> at;
    for (int index = blockIdx.x; index < order.count(); index += gridDim.x) {
        const TileStart tile = order.at(index);
        const int first = tile.row / TILE_ROWS, teams = min(Shape::TEAMS, weight_tiles - first);
        const unsigned x_bytes = groups_of_x<Shape::TOKENS>(p, tile.token) * ATOM_ELEMENTS * 2;
        const bf16* weight = weight_of<Shape::TOKENS>(p, tile.token) + first * tile_row;
        const bf16* x = p.x + static_cast<int64_t>(tile.token / 8) * ATOM_ELEMENTS;
        for (int k = 0; k < p.k_tiles; k++) {
            // The opposite parity: in the first round it is that of the phase "before" a fresh
            // barrier, so the wait returns at once.
            mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);
            uint64_t* full = &ring.full[at.stage];
            mbarrier_arrive_expect(full, teams * TILE_ELEMENTS * 2 + x_bytes);
            for (int team = 0; team < teams; team++)
                bulk_copy(ring.weight(at.stage) + team * TILE_ELEMENTS, weight + team * tile_row,
                          TILE_ELEMENTS * 2, full);
            bulk_copy(ring.x(at.stage), x, x_bytes, full);
            weight += TILE_ELEMENTS;
            x += static_cast<int64_t>(p.row_groups) * ATOM_ELEMENTS;
            at.advance();
        }
    }
}

// A consumer warpgroup. Rows of x that were not copied (beyond the last) are whatever the stage
// held: column t of the product depends on row t of x alone, and their columns are not stored.
// The same holds for a team beyond the last weight tile.
template <class Shape, bool GATED>
__device__ void wgmma_consume(const MatmulParams& p, const WgmmaRing<Shape>& ring) {
    constexpr int TOKENS = Shape::TOKENS;
    const TileOrder<Shape::FEATURES, TOKENS> order(p);
    const int team = threadIdx.x / TEAM, slice = threadIdx.x / WARP % 4;
    const bool speaks = threadIdx.x % WARP == 0;   // arrives for its warp
    unsigned char* staged = ring.staged + team * Shape::STAGED;
    RingPlace<Shape> at;
    for (int index = blockIdx.x; index < order.count(); index += gridDim.x) {
        float acc[TOKENS / 2] = {};
        int previous = 0;
        for (int k = 0; k < p.k_tiles; k++) {
            mbarrier_wait(&ring.full[at.stage], at.parity);
            const uint64_t weight = wgmma_descriptor(ring.weight(at.stage) + team * TILE_ELEMENTS);
            const uint64_t x = wgmma_descriptor(ring.x(at.stage));
            wgmma_fence();
#pragma unroll
            for (int bytes = 0; bytes < TILE_K * 2; bytes += 32)   // 16 k
                wgmma_m64k16<TOKENS>(acc, wgmma_advance(weight, bytes), wgmma_advance(x, bytes));
            wgmma_commit();
            wgmma_wait<1>();   // all but this stage: the one before is free
            if (k > 0 && speaks) mbarrier_arrive(&ring.empty[previous]);
            previous = at.stage;
            at.advance();
        }
        wgmma_wait<0>();
        wgmma_complete(acc);
        if (speaks) mbarrier_arrive(&ring.empty[previous]);

        const TileStart tile = order.at(index);
        const int row = tile.row + team * TILE_ROWS;
        if (p.bias) add_bias<TOKENS>(p, row + slice * 16, acc);
        if constexpr (GATED) {
            named_barrier(1 + team, TEAM);   // the tile before has been stored
            stage_gated<TOKENS>(p, slice, 0, acc, staged);
            named_barrier(1 + team, TEAM);
            store_gated<TOKENS>(p, row, tile.token, staged);
        } else {
            store_plain<TOKENS>(p, row + slice * 16, tile.token, acc);
        }
    }
}

template <class Shape, bool GATED>
__device__ void wgmma_matmul(const MatmulParams& p) {
    DYNAMIC_SMEM(unsigned char, smem);
    const WgmmaRing<Shape> ring(smem);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Shape::STAGES; stage++) {
            mbarrier_init(&ring.full[stage], 1);
            mbarrier_init(&ring.empty[stage], Shape::TEAMS * 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < Shape::TEAMS * TEAM) wgmma_consume<Shape, GATED>(p, ring);
    else if (threadIdx.x % WARP == 0) wgmma_produce<Shape>(p, ring);
}

#else

template <class Shape, bool GATED>
__device__ void wgmma_matmul(const MatmulParams&) { __trap(); }   // never launched here

#endif
