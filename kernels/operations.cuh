// Operations on values that lie in the registers of some threads: on a row of the stream or of what is
// added to it (residual_norm), or on what one head of attention gave (heads).
#pragma once
#include "math.cuh"

struct HookOp {
    uint32_t vector;              // row of vectors
    uint32_t from, to, every;     // positions
    uint32_t kind, flags, gate;
    uint32_t head;                // of attention, where h is what one gave
    float    scale, low, high;
    float    unit;                // 1 / |v|
};
static_assert(sizeof(HookOp) == 48, "mirror of src/ops/hooks.rs");
enum : uint32_t { ADD, COORDINATE, REPLACE, SCALE, GATE };                      // kinds
constexpr uint32_t RELATIVE = 1, KEEP_NORM = 2, LATCHED = 4, BY_POSITION = 8;                    // flags
constexpr int GATES = 8;                                                        // of a slot

// What acts on h, in the order of the slot's operations: those for which from <= position < to and
// (position - from) % every == 0. v is row `vector` of the bank, or where BY_POSITION the row
// (position - from) / every after it. With r = |h| where RELATIVE, else 1, and c = unit * h.v:
//   ADD         h + scale r v
//   COORDINATE  h + (clamp(c, low r, high r) - c) unit v
//   REPLACE     scale r v
//   SCALE       scale h                                       v is not read
//   GATE        h; the row meets condition `gate` if low < c / r < high
// and with KEEP_NORM that times |h| / |h'|, where |h'| > 2^-16 |h|. gate not NONE (but for GATE): only
// if the row has met that condition, or with LATCHED if a row of its slot up to its position
// has: such a gate is at an earlier site. receipt = (|h|^2 before, |change|^2), of a GATE (c / r, met).

// What kernels that change or capture rows read beside them: params begin with it.
struct HookTables {
    const uint32_t* slot;         // (rows)
    const uint32_t* position;     // (rows)
    const int32_t*  receipt;      // (rows), where a row's start
    const uint32_t* first;        // (slots, taps + 1)
    const HookOp*   ops;          // (slots, ops_per_slot), by tap
    const float*    vectors;      // the bank
    const uint32_t* tap_first;    // (taps + 1)
    const uint32_t* entries;      // (row, row of captured), by tap, then row
    float*          captured;
    float*          receipts;     // pairs, one for each of a slot's operations
    uint32_t*       met;          // (rows), a bit for each condition
    uint32_t*       latched;      // (slots, GATES)
    int             taps, ops_per_slot, has_captures;
    int             unused;       // fills the struct up to its alignment
};
static_assert(sizeof(HookTables) == 112, "mirror of src/ops/hooks.rs");

namespace {

// The sums over a row. Those of one operation have different places, and a barrier parts operations: so nobody
// writes what others still read.
enum Sum { OF_SQUARES, OF_BRANCH_SQUARES, OF_PRODUCTS, OF_KEPT, OF_CHANGE, SUMS };

// Threads of a row that is longer than a warp meet here.
struct Scratch {
    double   partial[SUMS][3][WARP];
    uint32_t found[3];
};

// A sum over a row that may not have been made yet.
struct Squares {
    float sum;
    bool  known;
};

// A thread's share of h: float4 v is number thread + v * THREADS. Params are HookTables with `dim`, the elements
// of h, a multiple of 4, and vector_stride(), those of a row of the bank.
template <int THREADS, int VECS, class Params>
struct Lanes {
    const Params& p;
    Scratch*      scratch;
    int           row;

    // f(v, element) for each float4 that lies in the row.
    template <class F>
    __device__ void each(F f) const {
#pragma unroll
        for (int v = 0; v < VECS; v++) {
            const int element = 4 * (threadIdx.x % THREADS + v * THREADS);
            if (element < p.dim) f(v, element);
        }
    }

    // What lies outside the row is 0.
    __device__ void load(float4 (&out)[VECS], const float* from) const {
#pragma unroll
        for (int v = 0; v < VECS; v++) out[v] = float4{0.0f, 0.0f, 0.0f, 0.0f};
        each([&](int v, int element) { out[v] = *reinterpret_cast<const float4*>(from + element); });
    }

    __device__ void store(float* to, const float4 (&values)[VECS]) const {
        each([&](int v, int element) { *reinterpret_cast<float4*>(to + element) = values[v]; });
    }

    __device__ static void add(float4& to, const float4& v) {
        to = float4{to.x + v.x, to.y + v.y, to.z + v.z, to.w + v.w};
    }

    // Sums over the row's threads, which all get them.
    template <Sum WHICH, class... T>
    __device__ void sum(T&... values) const {
        auto add = [](auto& value, int lanes) {
            for (int offset = lanes / 2; offset > 0; offset /= 2)
                value += __shfl_xor_sync(FULL_WARP, value, offset);
        };
        (add(values, WARP), ...);
        if constexpr (THREADS > WARP) {
            constexpr int WARPS = THREADS / WARP;
            const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
            auto& partial = scratch->partial[WHICH];
            int at = 0;
            if (lane == 0) ((partial[at++][warp] = values), ...);
            __syncthreads();
            at = 0;
            ((values = static_cast<T>(partial[at++][lane % WARPS])), ...);
            (add(values, WARPS), ...);
        }
    }

    template <Sum WHICH = OF_SQUARES>
    __device__ float sum_of_squares(const float4 (&h)[VECS]) const {
        float4 sums = {0.0f, 0.0f, 0.0f, 0.0f};
        each([&](int v, int) {
            sums.x = fmaf(h[v].x, h[v].x, sums.x);
            sums.y = fmaf(h[v].y, h[v].y, sums.y);
            sums.z = fmaf(h[v].z, h[v].z, sums.z);
            sums.w = fmaf(h[v].w, h[v].w, sums.w);
        });
        float squares = (sums.x + sums.y) + (sums.z + sums.w);
        sum<WHICH>(squares);
        return squares;
    }

    // First entry of a tap that is not of a lower row. The whole warp searches: each round leaves
    // a 32nd of the range.
    __device__ uint32_t search(int tap) const {
        const uint2* entries = reinterpret_cast<const uint2*>(p.entries);
        uint32_t begin = p.tap_first[tap], end = p.tap_first[tap + 1];
        // Mostly they are consecutive rows, once each.
        if (begin < end) {
            const uint32_t start = entries[begin].x, wanted = static_cast<uint32_t>(row);
            const uint32_t at = begin + wanted - start;
            if (wanted >= start && at < end && entries[at].x == wanted &&
                (at == begin || entries[at - 1].x < wanted))
                return at;
        }
        while (begin < end) {
            const uint32_t step = (end - begin + WARP - 1) / WARP;
            const uint32_t at = begin + threadIdx.x % WARP * step;
            const bool below = at < end && entries[at].x < static_cast<uint32_t>(row);
            const uint32_t count = __popc(__ballot_sync(FULL_WARP, below));
            if (count == 0) break;
            const uint32_t next = begin + count * step;   // the first probe that is not below
            begin = next - step + 1;
            end = next < end ? next : end;
        }
        return begin;
    }

    // sum + a.b, one component after the other: registers are few.
    __device__ static float add_products(float sum, const float4& a, const float4& b) {
        return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
    }

    // One operation; gives its receipt.
    __device__ float2 change(float4 (&h)[VECS], const HookOp& op, const float* vector, Squares& squares) const {
        const uint32_t kind = op.kind;
        const bool relative = op.flags & RELATIVE, keeps = op.flags & KEEP_NORM;
        if ((relative || keeps) && !squares.known) squares = {sum_of_squares(h), true};
        const float size = relative ? squares.sum * inverse_root(squares.sum) : 1.0f;
        float add = op.scale * size;   // of SCALE: the factor itself
        if (kind == COORDINATE || kind == GATE) {
            float c = 0.0f;
            each([&](int v, int element) {
                c = add_products(c, h[v], *reinterpret_cast<const float4*>(vector + element));
            });
            sum<OF_PRODUCTS>(c);
            c *= op.unit;
            if (kind == GATE) {
                if (relative) c *= inverse_root(squares.sum);
                return {c, op.low < c && c < op.high ? 1.0f : 0.0f};
            }
            add = (fminf(fmaxf(c, op.low * size), op.high * size) - c) * op.unit;
        }
        auto changed = [=](const float4& h, int element) {
            if (kind == SCALE) return float4{add * h.x, add * h.y, add * h.z, add * h.w};
            const float4 v = *reinterpret_cast<const float4*>(vector + element);
            if (kind == REPLACE) return float4{add * v.x, add * v.y, add * v.z, add * v.w};
            return float4{fmaf(add, v.x, h.x), fmaf(add, v.y, h.y), fmaf(add, v.z, h.z), fmaf(add, v.w, h.w)};
        };
        float factor = 1.0f;
        if (keeps) {
            float after = 0.0f;
            each([&](int v, int element) {
                const float4 to = changed(h[v], element);
                after = add_products(after, to, to);
            });
            sum<OF_KEPT>(after);
            factor = after > 0x1p-32f * squares.sum ? squares.sum * inverse_root(squares.sum) * inverse_root(after) : 1.0f;
        }
        // The squares before, where they are not known, are summed with the rest: one barrier less.
        float before = 0.0f, changes = 0.0f, after = 0.0f;
        auto step = [&](float& from, float to) {
            to *= factor;
            changes = fmaf(to - from, to - from, changes);
            from = to;
        };
        each([&](int v, int element) {
            before = add_products(before, h[v], h[v]);
            const float4 to = changed(h[v], element);
            step(h[v].x, to.x);
            step(h[v].y, to.y);
            step(h[v].z, to.z);
            step(h[v].w, to.w);
            after = add_products(after, h[v], h[v]);
        });
        double change = changes;   // in f32 the compiler would run out of registers
        sum<OF_CHANGE>(change, before, after);
        if (squares.known) before = squares.sum;
        squares = {after, true};
        return {before, static_cast<float>(change)};
    }

    // The row's operations `op`..`ops`, those that are concerned, on what their tap shows; gives the sum of squares, where it is known. The row's place in the
    // tables is read again for each: registers are few.
    template <class Concerned>
    __device__ Squares operate(float4 (&h)[VECS], uint32_t op, uint32_t ops, Concerned concerned) const {
        Squares squares = {0.0f, false};
        uint32_t met = p.met[row];
        for (; op < ops; op++) {
            const uint32_t slot = p.slot[row], position = p.position[row];
            const HookOp& it = p.ops[static_cast<int64_t>(slot) * p.ops_per_slot + op];
            if (!concerned(it)) continue;
            const uint32_t after = it.flags & BY_POSITION ? (position - it.from) / it.every : 0;
            const float* vector = p.vectors + static_cast<int64_t>(it.vector + after) * p.vector_stride();
            const bool seen = it.from <= position && position < it.to && (position - it.from) % it.every == 0;
            const bool is_gate = it.kind == GATE;
            if (!is_gate && (!seen || !(it.gate == NONE || (it.flags & LATCHED
                                                            ? p.latched[slot * GATES + it.gate] <= position
                                                            : met >> it.gate & 1))))
                continue;
            float2 what = {0.0f, 0.0f};
            if (seen) what = change(h, it, vector, squares);
            if (is_gate) {
                // What the row that stood here before has met is nothing to this one.
                met = (met & ~(1u << it.gate)) | static_cast<uint32_t>(what.y) << it.gate;
                if (threadIdx.x % THREADS == 0) {
                    p.met[row] = met;   // for later sites
                    if (what.y > 0.0f) atomicMin(p.latched + slot * GATES + it.gate, position);
                }
            }
            if (seen && threadIdx.x % THREADS == 0)
                reinterpret_cast<float2*>(p.receipts)[p.receipt[row] + static_cast<int>(op)] = what;
            if (THREADS > WARP && op + 1 < ops) __syncthreads();   // the next one sums in the same places
        }
        return squares;
    }
};

}  // namespace
