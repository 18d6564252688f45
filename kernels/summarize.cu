// summarize: what a row of logits says. For each wanted row
//
//   summary[w]              = logsumexp = ln(sum exp(logit)),  entropy of softmax(logits) in nats
//   id_logits[first_id + i] = logit of ids[first_id + i],  i < ids
//   top_ids, top_logits[first_top + i],  i < top: the most likely tokens and their logits, best first,
//                             ties to the lower id, in the order of f32::total_cmp
//
// An entry of `ids` with its high bit set means the token of draw (entry & 0x7fffffff), read from
// `tokens`. An id that is no token, NONE among them, reads the last id. A NaN, or nothing above
// -infinity, makes logsumexp and entropy NaN. Places of top beyond the vocabulary get NONE and NaN.
//
// Shapes  logits: (rows, vocab) f32, 16-byte aligned.  summary: (wanted, 2) f32.
// Sums    exponentials in f32, their sums in f64 in a fixed order.
// Launch  grid = wanted rows, block = 512, no dynamic shared memory.
// Null    wanted.row NONE: nothing is written.  Lists of which nothing is wanted may be null.
#include "math.cuh"
#include "select.cuh"

struct Wanted {
    uint32_t row;
    uint32_t first_id, ids;
    uint32_t first_top, top;
};
static_assert(sizeof(Wanted) == 20, "mirrored in Rust");

struct SummarizeParams {
    const float*    logits;
    const Wanted*   wanted;
    const uint32_t* ids;
    const uint32_t* tokens;
    float*          summary;
    float*          id_logits;
    uint32_t*       top_ids;
    float*          top_logits;
    int             vocab;
};
static_assert(sizeof(SummarizeParams) == 72, "mirrored in Rust");

namespace {

constexpr int TOP_AT_ONCE = 512;

struct Scratch {
    float max[SELECT_WARPS];
    double sum[SELECT_WARPS];
    uint64_t rank[TOP_AT_ONCE];
    uint32_t found;
    SelectScratch select;
};

struct Moments { double sum, product; };   // of weights, and of weights times shifted logits

__device__ inline void add(Moments& to, float logit, float max) {
    const float shifted = logit - max;
    const double weight = exp_f32(shifted);
    to.sum += weight;
    // 0 * -infinity is 0 here, as its limit is.
    to.product += weight > 0.0 ? weight * static_cast<double>(shifted) : 0.0;
}

__device__ void softmax(const LogitRow& row, float* summary, Scratch& s) {
    float max = -INFINITY;
    row.each([&](int, float logit) { if (logit > max) max = logit; });
    max = block_reduce(max, s.max, [](float a, float b) { return a > b ? a : b; });
    Moments mine = {0.0, 0.0};
    row.each([&](int, float logit) { add(mine, logit, max); });
    const auto plus = [](double a, double b) { return a + b; };
    const double sum = block_reduce(mine.sum, s.sum, plus);
    const double product = block_reduce(mine.product, s.sum, plus);
    if (threadIdx.x == 0) {
        summary[0] = static_cast<float>(static_cast<double>(max) + log(sum));
        summary[1] = static_cast<float>(log(sum) - product / sum);
    }
}

// Writes the best `count` (1 ..= TOP_AT_ONCE) of the entries ranked below `ceiling`, of which there are
// as many; gives the rank of the last.
__device__ uint64_t next_best(const LogitRow& row, uint64_t ceiling, int count, uint32_t* ids,
                              float* logits, Scratch& s) {
    const Boundary boundary = find_boundary(
        row, s.select, [=](int id, float logit) -> uint64_t { return ranked(logit, id) < ceiling; },
        [=](uint64_t) -> uint64_t { return count; });
    const uint64_t wanted = boundary.target - boundary.above;
    int last_tied = row.vocab;
    if (wanted < boundary.tied)
        last_tied = nth_id(row, s.select, wanted, [=](int id, float logit) {
            return total_key(logit) == boundary.key && ranked(logit, id) < ceiling;
        });
    if (threadIdx.x == 0) s.found = 0;
    __syncthreads();
    row.each([&](int id, float logit) {
        const uint64_t rank = ranked(logit, id);
        const uint32_t key = total_key(logit);
        const bool in = key > boundary.key || (key == boundary.key && id <= last_tied);
        if (in && rank < ceiling) s.rank[atomicAdd(&s.found, 1u)] = rank;
    });
    __syncthreads();
    // The order they came in is arbitrary; their places are not.
    uint64_t last = ~uint64_t{0};
    for (int i = 0; i < count; i++) last = s.rank[i] < last ? s.rank[i] : last;
    for (int i = threadIdx.x; i < count; i += SELECT_THREADS) {
        int place = 0;
        for (int other = 0; other < count; other++) place += s.rank[other] > s.rank[i];
        ids[place] = id_of(s.rank[i]);
        logits[place] = logit_of(s.rank[i]);
    }
    __syncthreads();   // every thread has read the ranks
    return last;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 2)
summarize(const __grid_constant__ SummarizeParams p) {
    __shared__ Scratch s;
    const Wanted want = p.wanted[blockIdx.x];
    if (want.row == NONE) return;
    const LogitRow row = {p.logits + static_cast<int64_t>(want.row) * p.vocab, p.vocab};
    softmax(row, p.summary + static_cast<int64_t>(2) * blockIdx.x, s);

    for (uint32_t i = threadIdx.x; i < want.ids; i += SELECT_THREADS) {
        const uint32_t entry = p.ids[want.first_id + i], last = row.vocab - 1;
        const uint32_t id = entry & 0x80000000u ? p.tokens[entry & 0x7fffffffu] : entry;
        p.id_logits[want.first_id + i] = row.at[id < last ? id : last];
    }

    const uint32_t vocab = row.vocab, top = want.top < vocab ? want.top : vocab;
    uint32_t* ids = p.top_ids + want.first_top;
    float* logits = p.top_logits + want.first_top;
    uint64_t ceiling = ~uint64_t{0};
    for (uint32_t from = 0; from < top; from += TOP_AT_ONCE) {
        const int count = top - from < TOP_AT_ONCE ? top - from : TOP_AT_ONCE;
        ceiling = next_best(row, ceiling, count, ids + from, logits + from, s);
    }
    for (uint32_t i = vocab + threadIdx.x; i < want.top; i += SELECT_THREADS) {
        ids[i] = NONE;
        logits[i] = NAN;
    }
}
EXPORT_KERNEL(summarize, SummarizeParams)
