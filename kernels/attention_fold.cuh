// The fold that every attention kernel is made of: one warp, 16 M-rows, tiles of 64 positions.
//
// An M-row is a query head of a row of the step. For a tile of keys and values in shared memory,
//   s[j]   = scale * q . k[j], capped, -infinity where masked      (bf16 products, f32 sums)
//   m'     = max(m, s[j]...)        keep = exp(m - m')        w[j] = bf16(exp(s[j] - m'))
//   sum'   = sum * keep + w[j]...   out' = out * keep + w[j] v[j]...
// A masked position has w = 0 and a wholly masked tile has keep = 1, so neither changes a bit. The
// order of every sum depends on the column alone: the thread, warp, kernel or neighbours of an
// M-row can't change its bits.
//
// Fragments: thread (g = lane / 4, q = lane % 4) holds M-rows g ("half" 0) and g + 8 ("half" 1),
// columns 8 j + 2 q and the next of every eight columns j.
#pragma once
#include "math.cuh"
#include "ptx.cuh"

constexpr int PAGE = 16;          // positions of a page
constexpr int TILE = 64;          // positions of a tile
constexpr int CHUNK_TILES = 16;   // tiles of a chunk of 1024 positions
constexpr int M_ROWS = 16;        // M-rows of a warp

// What the fold carries. HD: columns of a head, rounded up to a kernel's width.
template <int HD>
struct State {
    float max[2], sum[2];    // of both halves, the same in the four threads of a quad
    float out[HD / 8][4];    // as the accumulator of mma: half 0 in [0..1], half 1 in [2..3]
};

template <int HD>
__device__ inline void clear(State<HD>& state) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        state.max[half] = -INFINITY;
        state.sum[half] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < HD / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) state.out[j][e] = 0.0f;
}

// Element offset of a 16-byte chunk (8 columns) of a row in shared memory. A row is padded to an odd
// number of chunks, so that the eight rows ldmatrix reads at a time lie in different banks.
template <int HD>
constexpr int ROW_ELEMENTS = HD + 8;
template <int HD>
__device__ inline int at(int row, int chunk) {
    return row * ROW_ELEMENTS<HD> + chunk * 8;
}

// The maximum to subtract: where nothing was visible yet it is -infinity, and any finite number
// makes exp(-infinity - it) the 0 that is wanted.
__device__ inline float finite(float max) { return max == -INFINITY ? 0.0f : max; }

// tanh(x) = (1 - t) / (1 + t) with t = exp(-2 |x|), which can't overflow; within 3e-7 absolute. The
// quotient by Newton's method, which needs no special cases in [1, 2]: from 1/17 three steps reach 2^-32.
__device__ inline float tanh_f32(float x) {
    const float t = exp_f32(-2.0f * fabsf(x)), d = 1.0f + t;
    float inverse = fmaf(d, -8.0f / 17.0f, 24.0f / 17.0f);
#pragma unroll
    for (int step = 0; step < 3; step++) inverse = fmaf(inverse, fmaf(-d, inverse, 1.0f), inverse);
    return copysignf((1.0f - t) * inverse, x);
}

// Raw scores of 16 M-rows with 64 positions. q: (16, HD), k: (64, HD) in shared memory.
template <int HD>
__device__ inline void score_tile(float (&s)[TILE / 8][4], const bf16* q, const bf16* k) {
    const int lane = threadIdx.x % WARP;
    // Row and chunk that this lane points ldmatrix at; a fragment is four matrices of eight rows.
    const int q_row = lane % 16, q_chunk = lane / 16;
    const int k_row = lane / 16 * 8 + lane % 8, k_chunk = lane / 8 % 2;
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = 0.0f;
#pragma unroll
    for (int step = 0; step < HD / 16; step++) {
        uint32_t a[4];
        ldmatrix_x4(a, q + at<HD>(q_row, 2 * step + q_chunk));
#pragma unroll
        for (int pair = 0; pair < TILE / 16; pair++) {
            uint32_t b[4];
            ldmatrix_x4(b, k + at<HD>(16 * pair + k_row, 2 * step + k_chunk));
            mma_m16n8k16(s[2 * pair], a, b);
            mma_m16n8k16(s[2 * pair + 1], a, b + 2);
        }
    }
}

// How scores are masked and scaled. A position j is visible to a half if first <= j <= last.
struct Visible {
    int first[2], last[2];   // last -1: an idle M-row
    float scale;
    float cap, inverse_cap;  // cap 0: none
};

// Scores to weights: updates max and sum, scales out, and leaves the weights as mma's left operand
// (one register of bf16 pairs per eight columns and half). start: first position of the tile.
// halves: 1 if M-rows 8..15 are all idle.
template <int HD>
__device__ inline void weigh_tile(State<HD>& state, uint32_t (&w)[TILE / 8][2], float (&s)[TILE / 8][4],
                                  const Visible& visible, int start, int halves) {
    const int column = start + threadIdx.x % 4 * 2;
    float keep[2] = {1.0f, 1.0f};
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] *= visible.scale;
    if (visible.cap > 0.0f) {
#pragma unroll
        for (int j = 0; j < TILE / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[j][e] = visible.cap * tanh_f32(s[j][e] * visible.inverse_cap);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half >= halves) {
#pragma unroll
            for (int j = 0; j < TILE / 8; j++) w[j][half] = 0;
            continue;
        }
        float max = -INFINITY;
#pragma unroll
        for (int j = 0; j < TILE / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int position = column + 8 * j + e;
                const bool seen = position >= visible.first[half] && position <= visible.last[half];
                float& score = s[j][2 * half + e];
                score = seen ? score : -INFINITY;
                max = fmaxf(max, score);
            }
        max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, 1));
        max = fmaxf(max, __shfl_xor_sync(FULL_WARP, max, 2));
        max = fmaxf(max, state.max[half]);
        const float base = finite(max);
        keep[half] = exp_approx(state.max[half] - base);
        state.max[half] = max;
        // The sum is of the rounded weights, those that the values are multiplied with.
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            w[j][half] = pack_bf16(exp_approx(s[j][2 * half] - base), exp_approx(s[j][2 * half + 1] - base));
            sum += low_bf16(w[j][half]);
            sum += high_bf16(w[j][half]);
        }
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
        state.sum[half] = state.sum[half] * keep[half] + sum;
    }
    if (keep[0] != 1.0f || keep[1] != 1.0f) {
#pragma unroll
        for (int j = 0; j < HD / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) state.out[j][e] *= keep[e / 2];
    }
}

// Adds the weighted values of a tile to out. v: (64, HD) in shared memory.
template <int HD>
__device__ inline void add_values(State<HD>& state, const uint32_t (&w)[TILE / 8][2], const bf16* v) {
    const int lane = threadIdx.x % WARP;
    const int v_row = lane % 16, v_chunk = lane / 16;
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
        const uint32_t a[4] = {w[2 * step][0], w[2 * step][1], w[2 * step + 1][0], w[2 * step + 1][1]};
#pragma unroll
        for (int j = 0; j < HD / 8; j += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, v + at<HD>(16 * step + v_row, j + v_chunk));
            mma_m16n8k16(state.out[j], a, b);
            mma_m16n8k16(state.out[j + 1], a, b + 2);
        }
    }
}

// States in memory: (max, sum, out[HD]) in f32 for each (row, head). index: row * heads + head of both
// halves, -1 for an idle M-row.
template <int HD>
__device__ inline float2* state_at(float* states, int index) {
    return reinterpret_cast<float2*>(states + static_cast<int64_t>(index) * (HD + 2));
}

template <int HD>
__device__ inline void load_state(State<HD>& state, float* states, const int (&index)[2]) {
    clear(state);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (index[half] < 0) continue;
        const float2* from = state_at<HD>(states, index[half]);
        state.max[half] = from[0].x;
        state.sum[half] = from[0].y;
        from += 1 + threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
            state.out[j][2 * half] = from[4 * j].x;
            state.out[j][2 * half + 1] = from[4 * j].y;
        }
    }
}

template <int HD>
__device__ inline void store_state(const State<HD>& state, float* states, const int (&index)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (index[half] < 0) continue;
        float2* to = state_at<HD>(states, index[half]);
        if (threadIdx.x % 4 == 0) to[0] = make_float2(state.max[half], state.sum[half]);
        to += 1 + threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < HD / 8; j++)
            to[4 * j] = make_float2(state.out[j][2 * half], state.out[j][2 * half + 1]);
    }
}

// state = merge(earlier chunks in memory, state). Merging with a fresh state, on either side,
// changes nothing.
template <int HD>
__device__ inline void merge_earlier(State<HD>& state, float* states, const int (&index)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (index[half] < 0) continue;
        const float2* from = state_at<HD>(states, index[half]);
        const float2 head = from[0];
        const float max = fmaxf(head.x, state.max[half]), base = finite(max);
        const float earlier = exp_f32(head.x - base), later = exp_f32(state.max[half] - base);
        state.max[half] = max;
        state.sum[half] = head.y * earlier + state.sum[half] * later;
        from += 1 + threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < HD / 8; j++) {
            const float2 out = from[4 * j];
            state.out[j][2 * half] = out.x * earlier + state.out[j][2 * half] * later;
            state.out[j][2 * half + 1] = out.y * earlier + state.out[j][2 * half + 1] * later;
        }
    }
}
