// experts: which experts a row of a mixture takes, where its copies stand, and the sum of their results.
//
//   route_experts    of each row the `used` largest logits (ties: the lowest id), in descending order:
//                    chosen[row, j] = id, weights[row, j] = exp(logit[id] - max) / total,
//                    total = the sum of exp(logit - max) over all experts, or over the chosen (normalise)
//   place_experts    a row's copy for its j-th expert is a pair (row, j). Pairs are sorted by expert, in the
//                    order of rows; every expert's start on a multiple of `tokens`:
//                    place[row, j] = where it stands, from[place] = row, from[others] = NONE;
//                    blocks[0] = how many blocks of `tokens` are taken, blocks[1 + b] = the expert of block b
//   combine_experts  out[row, :] = sum over j, ascending, of weights[row, j] * products[place[row, j], :]
//
// Between them select_rows copies rows by `from`, and matmul multiplies each block by its expert's weight.
//
// Shapes  logits: (rows, experts) f32    chosen, place, weights: (rows, used)    from: (capacity)
//         blocks: (1 + capacity / tokens)    products: (.., dim) f32    out: (rows, dim) f32
// Order   sums over experts are those of 32 lanes, then of halves; nothing depends on the other rows but
//         where a row's copies stand. Integer atomics count; their order changes no count.
// Nothing Logits that are no numbers (a dead row's) give weights that are none, but distinct ids below
//         `experts` all the same.
// Launch  route_experts: grid = ceil(rows / 4), block = 128: a warp has a row
//         place_experts: grid = experts, block = 512, (experts + 16) * 4 bytes of dynamic shared memory
//         combine_experts: grid = rows, block = 128 (any number of threads works)
// Needs   1 <= used <= min(experts, 32); capacity a multiple of tokens, and no less than what the segments
//         of `pairs` pairs can take: tokens * floor((pairs + m * (tokens - 1)) / tokens), m = min(experts,
//         pairs). dim % 4 == 0; products and out 16-byte aligned.
#include "math.cuh"
#include "select.cuh"

struct RouteExpertsParams {
    const float* logits;
    uint32_t*    chosen;
    float*       weights;
    int          rows, experts, used, normalise;
};
static_assert(sizeof(RouteExpertsParams) == 40, "mirror of src/ops/experts/kernels.rs");

struct PlaceExpertsParams {
    const uint32_t* chosen;
    uint32_t*       place;
    uint32_t*       from;
    uint32_t*       blocks;
    int             pairs, used, experts, tokens, capacity;
    int             unused;   // fills the struct up to its alignment
};
static_assert(sizeof(PlaceExpertsParams) == 56, "mirror of src/ops/experts/kernels.rs");

struct CombineExpertsParams {
    const float*    products;
    const uint32_t* place;
    const float*    weights;
    float*          out;
    int             rows, used, dim;
    int             unused;   // fills the struct up to its alignment
};
static_assert(sizeof(CombineExpertsParams) == 48, "mirror of src/ops/experts/kernels.rs");

namespace {

constexpr int ROUTE_WARPS = 4;

// The largest number of the warp; every lane gets it.
__device__ inline uint64_t warp_max_rank(uint64_t rank) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const uint64_t other = __shfl_xor_sync(FULL_WARP, rank, offset);
        rank = other > rank ? other : rank;
    }
    return rank;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(ROUTE_WARPS* WARP)
route_experts(const __grid_constant__ RouteExpertsParams p) {
    const int lane = threadIdx.x % WARP;
    const int row = static_cast<int>(blockIdx.x) * ROUTE_WARPS + static_cast<int>(threadIdx.x) / WARP;
    if (row >= p.rows) return;   // a whole warp
    const float* logits = p.logits + static_cast<int64_t>(row) * p.experts;
    float max = -INFINITY;
    for (int id = lane; id < p.experts; id += WARP) max = fmaxf(max, logits[id]);
    max = warp_max(max);
    float total = 0.0f;
    if (!p.normalise)
        for (int id = lane; id < p.experts; id += WARP) total += exp_f32(logits[id] - max);

    // Ranks are distinct: the next one is the largest below the last. Lane j keeps the j-th. (The first
    // can be any: a GPU's own NaN of expert 0 has the largest rank that there is.)
    uint64_t last = ~uint64_t{0}, mine = 0;
    for (int j = 0; j < p.used; j++) {
        uint64_t best = 0;
        for (int id = lane; id < p.experts; id += WARP) {
            const uint64_t rank = ranked(logits[id] + 0.0f, id);   // zeros of both signs are a tie
            if ((j == 0 || rank < last) && rank > best) best = rank;
        }
        last = warp_max_rank(best);
        if (lane == j) mine = last;
    }
    const bool has_one = lane < p.used;
    const float weight = has_one ? exp_f32(logit_of(mine) - max) : 0.0f;
    total = warp_sum(p.normalise ? weight : total);
    if (!has_one) return;
    const int64_t at = static_cast<int64_t>(row) * p.used + lane;
    p.chosen[at] = id_of(mine);
    p.weights[at] = weight / total;
}
EXPORT_KERNEL(route_experts, RouteExpertsParams)

namespace {

constexpr int PLACE_THREADS = 512;
constexpr int PLACE_WARPS = PLACE_THREADS / WARP;

// Calls visit(pair, is_mine, ballot) of a warp's share of the pairs, 32 at a time.
template <class Visit>
__device__ inline void each_pair(const PlaceExpertsParams& p, uint32_t expert, Visit visit) {
    const int warp = static_cast<int>(threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    const int share = (p.pairs + PLACE_THREADS - 1) / PLACE_THREADS * WARP;
    const int end = min(p.pairs, (warp + 1) * share);
    for (int first = warp * share; first < end; first += WARP) {
        const int pair = first + lane;
        const bool is_mine = pair < end && p.chosen[pair] == expert;
        visit(pair, is_mine, __ballot_sync(FULL_WARP, is_mine));
    }
}

// Blocks of the experts before this one, and of all.
struct Extent { int first, all; };

__device__ inline Extent extent(const PlaceExpertsParams& p, const int* counts, int expert) {
    int first = 0, all = 0;
    for (int id = threadIdx.x % WARP; id < p.experts; id += WARP) {
        const int blocks = (counts[id] + p.tokens - 1) / p.tokens;
        if (id < expert) first += blocks;
        all += blocks;
    }
    return {__reduce_add_sync(FULL_WARP, first), __reduce_add_sync(FULL_WARP, all)};
}

}  // namespace

// A block of threads has one expert; each counts all pairs, so that none waits for another.
extern "C" __global__ void __launch_bounds__(PLACE_THREADS)
place_experts(const __grid_constant__ PlaceExpertsParams p) {
    DYNAMIC_SMEM(int, shared);
    int* in_warp = shared;                // this expert's pairs in each warp's share
    int* counts = shared + PLACE_WARPS;   // pairs of each expert
    const int thread = static_cast<int>(threadIdx.x), warp = thread / WARP, lane = thread % WARP;
    const int expert = static_cast<int>(blockIdx.x);
    for (int id = thread; id < p.experts; id += PLACE_THREADS) counts[id] = 0;
    __syncthreads();
    for (int pair = thread; pair < p.pairs; pair += PLACE_THREADS) atomicAdd(&counts[p.chosen[pair]], 1);
    int found = 0;
    each_pair(p, expert, [&](int, bool, unsigned ballot) { found += __popc(ballot); });
    if (lane == 0) in_warp[warp] = found;
    __syncthreads();

    const Extent blocks = extent(p, counts, expert);
    const int start = blocks.first * p.tokens, own = (counts[expert] + p.tokens - 1) / p.tokens;
    int at = start;
    for (int w = 0; w < warp; w++) at += in_warp[w];
    each_pair(p, expert, [&](int pair, bool is_mine, unsigned ballot) {
        if (is_mine) {
            const int place = at + __popc(ballot & ((1u << lane) - 1));
            p.place[pair] = place;
            p.from[place] = pair / p.used;
        }
        at += __popc(ballot);
    });
    const int end = start + own * p.tokens;
    for (int i = start + counts[expert] + thread; i < end; i += PLACE_THREADS) p.from[i] = NONE;
    for (int i = thread; i < own; i += PLACE_THREADS) p.blocks[1 + blocks.first + i] = expert;
    if (expert > 0) return;
    if (thread == 0) p.blocks[0] = blocks.all;
    for (int i = blocks.all * p.tokens + thread; i < p.capacity; i += PLACE_THREADS) p.from[i] = NONE;
}
EXPORT_KERNEL(place_experts, PlaceExpertsParams)

extern "C" __global__ void __launch_bounds__(1024)
combine_experts(const __grid_constant__ CombineExpertsParams p) {
    const int64_t row = blockIdx.x;
    if (row >= p.rows) return;
    const uint32_t* place = p.place + row * p.used;
    const float* weights = p.weights + row * p.used;
    for (int k = 4 * static_cast<int>(threadIdx.x); k < p.dim; k += 4 * static_cast<int>(blockDim.x)) {
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int j = 0; j < p.used; j++) {
            const float* product = p.products + static_cast<int64_t>(place[j]) * p.dim + k;
            const float4 v = *reinterpret_cast<const float4*>(product);
            const float weight = weights[j];
            sum.x = fmaf(weight, v.x, sum.x);
            sum.y = fmaf(weight, v.y, sum.y);
            sum.z = fmaf(weight, v.z, sum.z);
            sum.w = fmaf(weight, v.w, sum.w);
        }
        *reinterpret_cast<float4*>(p.out + row * p.dim + k) = sum;
    }
}
EXPORT_KERNEL(combine_experts, CombineExpertsParams)
