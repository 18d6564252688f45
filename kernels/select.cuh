// Selection in a row of logits without sorting: what sample.cu and summarize.cu share.
//
// All of it is for blocks of SELECT_THREADS threads that work on one row together. Results do not
// depend on the order of threads: sums are integers, maxima break ties by id.
#pragma once
#include "device.cuh"

constexpr int SELECT_THREADS = 512;
constexpr int SELECT_WARPS = SELECT_THREADS / WARP;

// One row of logits (vocab), read four ids at a time; beyond its end all is -infinity.
struct LogitRow {
    const float* at;
    int vocab;

    __device__ int quads() const { return (vocab + 3) / 4; }
    __device__ float4 quad(int index) const {
        // Where vocab % 4 == 0 every row starts on 16 bytes.
        if (vocab % 4 == 0) return reinterpret_cast<const float4*>(at)[index];
        const int id = 4 * index;
        float4 v = {at[id], -INFINITY, -INFINITY, -INFINITY};
        if (id + 1 < vocab) v.y = at[id + 1];
        if (id + 2 < vocab) v.z = at[id + 2];
        if (id + 3 < vocab) v.w = at[id + 3];
        return v;
    }
    // Calls visit(id, logit) for this thread's share of the ids.
    template <class Visit>
    __device__ void each(Visit visit) const {
        for (int index = threadIdx.x; index < quads(); index += SELECT_THREADS) {
            const float4 v = quad(index);
            const int id = 4 * index;
            visit(id, v.x);
            if (id + 1 < vocab) visit(id + 1, v.y);
            if (id + 2 < vocab) visit(id + 2, v.z);
            if (id + 3 < vocab) visit(id + 3, v.w);
        }
    }
};

// Unsigned keys in the order of f32::total_cmp: -NaN < -inf < .. < -0 < +0 < .. < inf < NaN.
__device__ inline uint32_t total_key(float v) {
    const uint32_t bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float from_total_key(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A (key, id) pair as one number: larger is better, the larger key first, of equal ones the lower id.
__device__ inline uint64_t ranked(float logit, uint32_t id) {
    return static_cast<uint64_t>(total_key(logit)) << 32 | static_cast<uint32_t>(~id);
}
__device__ inline uint32_t id_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }
__device__ inline float logit_of(uint64_t rank) {
    return from_total_key(static_cast<uint32_t>(rank >> 32));
}

// Reduces over the block by a commutative operation in a fixed order; every thread gets the result.
// scratch: SELECT_WARPS values, free again on return.
template <class T, class Combine>
__device__ T block_reduce(T value, T* scratch, Combine combine) {
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        value = combine(value, __shfl_xor_sync(FULL_WARP, value, offset));
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    T all = scratch[0];
    for (int warp = 1; warp < SELECT_WARPS; warp++) all = combine(all, scratch[warp]);
    __syncthreads();   // every thread has read the scratch
    return all;
}

constexpr int SELECT_BINS = 2048;   // digits of 11, 11 and 10 bits of a key

struct Boundary {
    uint32_t key;
    uint64_t above;   // weight of all larger keys
    uint64_t tied;    // weight of this key
    uint64_t target;
};

struct SelectScratch {
    // 64-bit sums as two words, since shared memory adds words natively.
    uint32_t low[SELECT_BINS], high[SELECT_BINS];
    uint64_t warp_total[SELECT_WARPS];
    uint64_t above, tied, target;
    uint32_t digit;
    int id;
};

// Sum of `mine` over the threads before this one. `total` is that of all. scratch: SELECT_WARPS.
__device__ inline uint64_t block_sum_before(uint64_t mine, uint64_t* scratch, uint64_t* total) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint64_t sum = mine;
    for (int offset = 1; offset < WARP; offset *= 2) {
        const uint64_t other = __shfl_sync(FULL_WARP, sum, lane >= offset ? lane - offset : lane);
        if (lane >= offset) sum += other;
    }
    if (lane == WARP - 1) scratch[warp] = sum;
    __syncthreads();
    uint64_t before = sum - mine, all = 0;
    for (int w = 0; w < SELECT_WARPS; w++) {
        if (w < warp) before += scratch[w];
        all += scratch[w];
    }
    __syncthreads();   // every thread has read the scratch
    *total = all;
    return before;
}

// In the order of descending keys, the key at which the cumulative weight(id, logit) reaches
// target(total) for the first time: above < target <= above + tied. Requires 1 <= target <= total.
// weight: u64; 0 = does not take part.
template <class Weight, class Target>
__device__ Boundary find_boundary(const LogitRow& row, SelectScratch& s, Weight weight, Target target) {
    constexpr int PER_THREAD = SELECT_BINS / SELECT_THREADS;
    uint32_t key = 0;
    uint64_t above = 0, tied = 0, goal = 0;
    for (int round = 0; round < 3; round++) {
        const int shift = round == 0 ? 21 : round == 1 ? 10 : 0;
        const int bits = round == 2 ? 10 : 11;
        for (int bin = threadIdx.x; bin < SELECT_BINS; bin += SELECT_THREADS) s.low[bin] = s.high[bin] = 0;
        __syncthreads();
        row.each([&](int id, float logit) {
            const uint32_t k = total_key(logit);
            if (round > 0 && (k ^ key) >> (shift + bits)) return;   // another prefix
            const uint64_t w = weight(id, logit);
            if (w == 0) return;
            const uint32_t bin = (k >> shift) & ((1u << bits) - 1), low = static_cast<uint32_t>(w);
            const uint32_t carry = atomicAdd(&s.low[bin], low) > ~low;
            const uint32_t high = static_cast<uint32_t>(w >> 32) + carry;
            if (high) atomicAdd(&s.high[bin], high);
        });
        __syncthreads();
        // Each thread has PER_THREAD neighbouring bins, the first thread the largest keys.
        const int last = SELECT_BINS - 1 - static_cast<int>(threadIdx.x) * PER_THREAD;
        uint64_t bin_sum[PER_THREAD], mine = 0, total;
        for (int i = 0; i < PER_THREAD; i++) {
            bin_sum[i] = static_cast<uint64_t>(s.high[last - i]) << 32 | s.low[last - i];
            mine += bin_sum[i];
        }
        uint64_t reached = above + block_sum_before(mine, s.warp_total, &total);
        if (round == 0) goal = target(total);
        for (int i = 0; i < PER_THREAD; i++) {   // true of one bin of one thread
            if (reached < goal && goal <= reached + bin_sum[i]) {
                s.digit = last - i;
                s.above = reached;
                s.tied = bin_sum[i];
            }
            reached += bin_sum[i];
        }
        __syncthreads();
        key |= s.digit << shift;
        above = s.above;
        tied = s.tied;
        // The barriers of the next round or call separate these reads from its writes.
    }
    return {key, above, tied, goal};
}

// The id at which the count of ids with takes_part(id, logit), from 0 up, reaches n >= 1.
template <class TakesPart>
__device__ int nth_id(const LogitRow& row, SelectScratch& s, uint64_t n, TakesPart takes_part) {
    const int share = (row.vocab + SELECT_THREADS - 1) / SELECT_THREADS;
    const int from = static_cast<int>(threadIdx.x) * share;
    const int to = from + share < row.vocab ? from + share : row.vocab;
    uint64_t mine = 0, total;
    for (int id = from; id < to; id++) mine += takes_part(id, row.at[id]);
    uint64_t count = block_sum_before(mine, s.warp_total, &total);
    if (count < n && n <= count + mine) {
        int id = from;
        while ((count += takes_part(id, row.at[id])) < n) id++;
        s.id = id;
    }
    __syncthreads();
    const int found = s.id;
    __syncthreads();
    return found;
}
