// sample: draws the next token of each row; the same token as src/ops/sample.rs from the same logits.
//
//   tokens[d] = argmax over ids of  logits[row, id] / temperature + gumbel(word[id])
//
// among the ids that top-k, top-p and min-p leave, each applied to what the one before left; ties to
// the lowest id. temperature == 0: the lowest id of the largest logit. An id whose logit is NaN or
// -infinity is never drawn; where that leaves none the token is NONE.
// word[id] = word id % 4 of Philox 4x32-10 with key = seed, counter = (id / 4, index, 0, 0).
//
//   top_k  0: all; else the ids with logit >= the k-th largest (NaN counts as f32::total_cmp has it)
//   top_p  >= 1: all; else in descending order (ties: lower id first) those before which the weights
//          exp((logit - max) / temperature) sum to less than top_p * total; at least one
//   min_p  <= 0: all; else those with logit / temperature >= max / temperature + ln(min_p)
//
// Shapes  logits: (rows, vocab) f32, 16-byte aligned.  draws, tokens: (draws)   last: (slots)
// Launch  grid = draws, block = 512, no dynamic shared memory.  vocab < 2^19: weights are summed as
//         integers of 2^-45, so that no sum depends on an order.
// Null    draw.row NONE: a dead draw, nothing is written.  draw.to NONE: `last` is not written.
#include "philox.cuh"
#include "select.cuh"

struct Draw {
    uint32_t row;
    uint32_t to;         // slot whose `last` gets the token
    uint32_t seed_low, seed_high;
    uint32_t index;      // how many tokens were generated before
    float    temperature;
    uint32_t top_k;
    float    top_p;
    float    min_p;
};
static_assert(sizeof(Draw) == 36, "mirrored in Rust");

struct SampleParams {
    const float* logits;
    const Draw*  draws;
    uint32_t*    tokens;
    uint32_t*    last;
    int          vocab;
};
static_assert(sizeof(SampleParams) == 40, "mirrored in Rust");

namespace {

constexpr double WEIGHT_ONE = 0x1p45;

// The larger score; of equal ones the lower id.
struct Best {
    float score;
    uint32_t id;
    __device__ void see(float other, uint32_t other_id) {
        if (other > score || (other == score && other_id < id)) { score = other; id = other_id; }
    }
};

struct Scratch {
    float score[SELECT_WARPS];
    uint32_t id[SELECT_WARPS];
    uint64_t rank[SELECT_WARPS];
    SelectScratch select;
};

// The best of the block in every thread. The scratch is free again on return.
__device__ inline Best block_best(Best best, Scratch& s) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const float score = __shfl_xor_sync(FULL_WARP, best.score, offset);
        best.see(score, __shfl_xor_sync(FULL_WARP, best.id, offset));
    }
    if (threadIdx.x % WARP == 0) {
        s.score[threadIdx.x / WARP] = best.score;
        s.id[threadIdx.x / WARP] = best.id;
    }
    __syncthreads();
    for (int warp = 0; warp < SELECT_WARPS; warp++) best.see(s.score[warp], s.id[warp]);
    __syncthreads();   // every thread has read the scratch
    return best;
}

__device__ uint32_t greedy(const LogitRow& row, Scratch& s) {
    Best best = {-INFINITY, NONE};
    row.each([&](int id, float logit) { if (logit > -INFINITY) best.see(logit, id); });
    return block_best(best, s).id;
}

// What top-k, top-p and min-p leave, as conditions on one id.
struct Kept {
    float    least;        // logit >= least, so never NaN
    uint32_t key;          // total_key(logit) > key, or == key and id <= last_tied
    int      last_tied;
    bool     floored;
    double   floor;        // logit / temperature >= floor
    float    temperature;
    __device__ float operator()(int id, float logit) const {
        const uint32_t k = total_key(logit);
        const bool kept = logit >= least && (k > key || (k == key && id <= last_tied)) &&
                          (!floored || static_cast<double>(logit / temperature) >= floor);
        return kept ? logit : -INFINITY;
    }
    static constexpr bool ALL = false;
};
struct KeepAll {
    __device__ float operator()(int, float logit) const { return logit; }
    static constexpr bool ALL = true;
};

// Fixed-point weight of a logit; 0 below 2^-46.
__device__ inline uint64_t fixed_weight(float logit, float max, float temperature) {
    const float x = (logit - max) / temperature;
    if (x < -32.0f) return 0;
    return static_cast<uint64_t>(exp(static_cast<double>(x)) * WEIGHT_ONE + 0.5);
}

// Applies top-p to the ids with logit >= kept.least. first: the rank of the best of them.
__device__ void keep_top_p(const LogitRow& row, const Draw& draw, uint64_t first, Kept& kept, Scratch& s) {
    const float max = logit_of(first), least = kept.least;
    const auto weight = [=](int, float logit) {
        return logit >= least ? fixed_weight(logit, max, draw.temperature) : 0;
    };
    const double top_p = draw.top_p;
    const auto target = [=](uint64_t total) -> uint64_t {
        return static_cast<uint64_t>(ceil(top_p * static_cast<double>(total)));
    };
    const Boundary boundary = find_boundary(row, s.select, weight, target);
    // Of the ids tied at the boundary the first are kept, while the sum before them is < target.
    const uint64_t one = fixed_weight(from_total_key(boundary.key), max, draw.temperature);
    const uint64_t wanted = (boundary.target - boundary.above + one - 1) / one;
    kept.key = boundary.key;
    if (wanted < boundary.tied / one)
        kept.last_tied = nth_id(row, s.select, wanted, [=](int, float logit) {
            return total_key(logit) == boundary.key;
        });
}

// False if nothing is left.
__device__ bool filter(const LogitRow& row, const Draw& draw, Kept& kept, Scratch& s) {
    kept = {-INFINITY, 0, row.vocab, false, 0.0, draw.temperature};
    const bool by_count = draw.top_k > 0 && draw.top_k < static_cast<uint32_t>(row.vocab);
    if (by_count) {
        const uint64_t k = draw.top_k;
        const Boundary kth = find_boundary(row, s.select, [](int, float) -> uint64_t { return 1; },
                                           [=](uint64_t) { return k; });
        kept.least = from_total_key(kth.key);
        if (kept.least != kept.least) return false;   // so many NaNs that nothing is >= the k-th
    }
    // The first in descending order, and whether a NaN takes part (only without top-k).
    uint64_t first = 0;
    uint32_t nan = 0;
    row.each([&](int id, float logit) {
        if (logit != logit) nan |= !by_count;
        if (by_count && !(logit >= kept.least)) return;
        const uint64_t rank = ranked(logit, id);
        if (rank > first) first = rank;
    });
    first = block_reduce(first, s.rank, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
    nan = block_reduce(nan, s.id, [](uint32_t a, uint32_t b) { return a | b; });
    const float max = logit_of(first);
    if (max == -INFINITY) return false;
    if (draw.top_p < 1.0f) {
        // With a NaN among the weights no sum is less than another: only the first is kept.
        if (nan || max == INFINITY || !(draw.top_p > 0.0f)) {
            kept.key = static_cast<uint32_t>(first >> 32);
            kept.last_tied = id_of(first);
        } else {
            keep_top_p(row, draw, first, kept, s);
        }
    }
    if (draw.min_p > 0.0f) {
        kept.floored = true;
        kept.floor = static_cast<double>(max / draw.temperature) + log(static_cast<double>(draw.min_p));
    }
    return true;
}

// Gumbel draws of four ids. Most can't win, and say so without a logarithm: an entry beats `bar` only
// if -ln(u) >= g > bar - logit / temperature, that is log2(u) < (logit / temperature - bar) * log2(e).
// The slack covers the rounding of both sides many times over.
struct Race {
    float temperature, scale;   // log2(e) / temperature
    float limit;                // -bar * log2(e), with its slack
    Best best;

    __device__ void raise(float bar) {
        const float b = bar * 1.44269504f;
        limit = fmaf(fabsf(b), 1e-6f, 2e-3f - b);
    }
    __device__ void see(int id, const float4& v, const PhiloxWords& words) {
        const float top = fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w));
        const uint32_t* word = words.word;
        const uint32_t left = word[0] < word[1] ? word[0] : word[1];
        const uint32_t right = word[2] < word[3] ? word[2] : word[3];
        // Its bits, read as an integer, are a lower bound of a float's log2: linear between powers of 2.
        const uint32_t bits = __float_as_uint(static_cast<float>(left < right ? left : right));
        const float log2_u = fmaf(static_cast<float>(bits), 0x1p-23f, -127.0f - 32.0f);
        const float scaled = top * scale;
        // Written so that a limit that is no number does not skip.
        if (log2_u > fmaf(fabsf(scaled), 1e-6f, scaled) + limit || !(top > -INFINITY)) return;
        score(id, v.x, word[0]);
        score(id + 1, v.y, word[1]);
        score(id + 2, v.z, word[2]);
        score(id + 3, v.w, word[3]);
    }
    __device__ void score(int id, float logit, uint32_t word) {
        if (logit > -INFINITY) best.see(logit / temperature + gumbel(word), id);
    }
};

template <class Keep>
__device__ uint32_t gumbel_max(const LogitRow& row, const Draw& draw, const Keep& keep, Scratch& s) {
    Race race = {draw.temperature, 1.44269504f / draw.temperature, INFINITY, {-INFINITY, NONE}};
    const int steps = (row.quads() + SELECT_THREADS - 1) / SELECT_THREADS;
    // The block shares its best after 1, 2, 4, 8 .. steps: as many entries again can't beat it often.
    for (int from = 0, to = 1; from < steps; from = to, to *= 2) {
        for (int step = from; step < to; step++) {
            const int index = step * SELECT_THREADS + static_cast<int>(threadIdx.x);
            if (index >= row.quads()) break;
            float4 v = row.quad(index);
            const int id = 4 * index;
            if (!Keep::ALL) {
                v = {keep(id, v.x), keep(id + 1, v.y), keep(id + 2, v.z), keep(id + 3, v.w)};
                if (!(fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)) > -INFINITY)) continue;
            }
            race.see(id, v, philox(draw.seed_low, draw.seed_high, index, draw.index, PURPOSE_TOKEN, 0));
        }
        race.best = block_best(race.best, s);
        race.raise(race.best.score);
    }
    return race.best.id;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 2)
sample(const __grid_constant__ SampleParams p) {
    __shared__ Scratch s;
    const Draw draw = p.draws[blockIdx.x];
    if (draw.row == NONE) return;
    const LogitRow row = {p.logits + static_cast<int64_t>(draw.row) * p.vocab, p.vocab};
    uint32_t token = NONE;
    if (draw.temperature == 0.0f) {
        token = greedy(row, s);
    } else if (draw.top_k == 0 && draw.top_p >= 1.0f && draw.min_p <= 0.0f) {
        token = gumbel_max(row, draw, KeepAll{}, s);
    } else {
        Kept kept;
        if (filter(row, draw, kept, s)) token = gumbel_max(row, draw, kept, s);
    }
    if (threadIdx.x == 0) {
        p.tokens[blockIdx.x] = token;
        if (draw.to != NONE) p.last[draw.to] = token;
    }
}
EXPORT_KERNEL(sample, SampleParams)
