// residual_norm: the one place where the residual stream is written. For every row, in this order:
//
//   branch = branch * c                 (rows below branch_rows)    branch_gain not null:
//                                       branch / sqrt(mean(branch^2) + eps) * branch_gain * c
//   operations on the branch, which is then captured (tap 2 site + 1)       h += branch
//   operations on h, which is then captured (tap 2 site), and |h| stored
//   x = h / sqrt(mean(h^2) + eps) * gain            is_final: also captured in f32 (tap 2 site + 2)
//   x = h                                           where gain is null
//
// Operations  those of the row's slot at the tap, in order, for which from <= position < to and
//         (position - from) % every == 0. With r = |h| where RELATIVE, else 1, and c = unit * h.v:
//           ADD         h + scale r v
//           COORDINATE  h + (clamp(c, low r, high r) - c) unit v
//           REPLACE     scale r v
//           SCALE       scale h                                       v is not read
//           GATE        h; the row meets condition `gate` if low < c / r < high
//         and with KEEP_NORM that times |h| / |h'|, where |h'| > 2^-16 |h|. gate not NONE (but for GATE): only
//         if the row has met that condition, or with LATCHED if a row of its slot up to its position
//         has: such a gate is at an earlier site. receipt = (|h|^2 before, |change|^2), of a GATE (c / r, met).
//
// Shapes  resid, branch, captured: (.., dim) f32    gains: (dim)    vectors: (vectors, dim) f32
//         x: bf16 Tiles of x_row_groups * 8 rows    norms: (rows), this site's
//         slot, position, receipt, met: (rows)      first: (slots, taps + 1)   latched: (slots, 8)
//         ops: (slots, ops_per_slot); those of slot s at tap i are first[s, i]..first[s, i + 1]
//         met: a bit for each condition             latched: the lowest position that met each
//         receipts: pairs; a row's start at receipt[row], one for each of its slot's operations
//         tap_first: (taps + 1); entries: (row, row of captured), by tap, then row; a row may have
//         several entries of a tap, or none
// Nothing slot NONE: a dead row, nothing is written.  receipt -1: its sequence has no operations.
//         has_captures 0: tap_first, entries and captured are not read.
// Launch  grid = ceil(rows * T / block) blocks of `block` threads, T threads a row: in the kernel's
//         name, before the float4s of a thread. block = T, or for T = 32 any multiple of it up to
//         128. Kernels named residual_norm_around_* have both gains, residual_norm_after_* only
//         branch_gain, the others only gain. Beside that a kernel is chosen by dim alone, since the
//         order of a row's sums follows from T:
//           dim <= 256: 32_2   1024: 32_8   2048: 128_4   4096: 256_4   8192: 512_4   16384: 1024_4
// Needs   dim % 8 == 0; all arrays of rows and vectors 16-byte aligned, entries and receipts 8.
#include "math.cuh"
#include "ptx.cuh"

struct HookOp {
    uint32_t vector;              // row of vectors
    uint32_t from, to, every;     // positions
    uint32_t kind, flags, gate;
    float    scale, low, high;
    float    unit;                // 1 / |v|
};
static_assert(sizeof(HookOp) == 44, "mirror of src/ops/hooks.rs");
enum : uint32_t { ADD, COORDINATE, REPLACE, SCALE, GATE };                      // kinds
constexpr uint32_t RELATIVE = 1, KEEP_NORM = 2, LATCHED = 4;                    // flags
constexpr int GATES = 8;                                                        // of a slot

struct ResidualNormParams {
    float*          resid;
    const float*    branch;
    const float*    branch_gain;
    const float*    gain;
    bf16*           x;
    const uint32_t* slot;
    const uint32_t* position;
    const int32_t*  receipt;
    const uint32_t* first;
    const HookOp*   ops;
    const float*    vectors;
    const uint32_t* tap_first;
    const uint32_t* entries;
    float*          captured;
    float*          norms;
    float*          receipts;
    uint32_t*       met;
    uint32_t*       latched;
    int             rows, branch_rows, dim, site, taps, ops_per_slot, x_row_groups;
    int             is_final, has_captures;
    float           eps;
    float           branch_scale;   // c
    int             unused;         // fills the struct up to its alignment
};
static_assert(sizeof(ResidualNormParams) == 192, "mirror of src/ops/residual_norm.rs");

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

// What is normalised: x, the branch, or both.
enum Norms { BEFORE, AFTER, AROUND };

// One row's share of a thread: float4 v is number thread + v * THREADS of the row.
template <int THREADS, int VECS, Norms NORMS>
struct Row {
    static constexpr bool OF_BRANCH = NORMS != BEFORE, OF_X = NORMS != AFTER;

    const ResidualNormParams& p;
    Scratch*                  scratch;
    int                       row;

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

    // Finds where the row's captures of taps 2 site + i start: a warp a tap, if a row has several, which
    // then are at least four. What they find waits in shared memory: registers are few.
    __device__ void find_captures(uint32_t (&found)[3]) const {
        const int taps = p.is_final ? 3 : 2;
        if constexpr (THREADS == WARP) {
            for (int i = 0; i < taps; i++) found[i] = search(2 * p.site + i);
        } else {
            const int warp = threadIdx.x / WARP;
            if (warp < taps) {
                const uint32_t at = search(2 * p.site + warp);
                if (threadIdx.x % WARP == 0) scratch->found[warp] = at;
            }
            __syncthreads();
        }
    }

    // of: 0 the stream, 1 the branch, 2 the final norm.
    __device__ void capture(int of, const uint32_t (&found)[3], const float4 (&values)[VECS]) const {
        const int tap = 2 * p.site + of;
        uint32_t at = THREADS == WARP ? found[of] : scratch->found[of];
        const uint2* entries = reinterpret_cast<const uint2*>(p.entries);
        for (const uint32_t end = p.tap_first[tap + 1]; at < end; at++) {
            const uint2 entry = entries[at];
            if (entry.x != static_cast<uint32_t>(row)) break;
            store(p.captured + static_cast<int64_t>(entry.y) * p.dim, values);
        }
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

    // The row's operations `op`.. on what their tap shows; gives the sum of squares, where it is known. The row's place in the
    // tables is read again for each: registers are few.
    __device__ Squares operate(float4 (&h)[VECS], uint32_t op, uint32_t ops) const {
        Squares squares = {0.0f, false};
        uint32_t met = p.met[row];
        for (; op < ops; op++) {
            const uint32_t slot = p.slot[row], position = p.position[row];
            const HookOp& it = p.ops[static_cast<int64_t>(slot) * p.ops_per_slot + op];
            const float* vector = p.vectors + static_cast<int64_t>(it.vector) * p.dim;
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

    // What becomes of the branch before it is added.
    __device__ void scale(float4 (&branch)[VECS]) const {
        const float squares = sum_of_squares<OF_BRANCH_SQUARES>(branch);
        const float factor = p.branch_scale * inverse_norm(squares, p.dim, p.eps);
        each([&](int v, int element) {
            const float4 gain = *reinterpret_cast<const float4*>(p.branch_gain + element);
            branch[v] = float4{branch[v].x * factor * gain.x, branch[v].y * factor * gain.y,
                               branch[v].z * factor * gain.z, branch[v].w * factor * gain.w};
        });
    }

    // x, which takes the place of h.
    __device__ void normalise(float4 (&h)[VECS], const float4 (&gain)[VECS], float squares) const {
        const float inverse = OF_X ? inverse_norm(squares, p.dim, p.eps) : 1.0f;
        each([&](int v, int element) {
            if constexpr (OF_X)
                h[v] = float4{h[v].x * inverse * gain[v].x, h[v].y * inverse * gain[v].y,
                              h[v].z * inverse * gain[v].z, h[v].w * inverse * gain[v].w};
            bf16* x = p.x + tile_chunk(row, element / 8, p.x_row_groups) + element % 8;
            *reinterpret_cast<uint2*>(x) = uint2{pack_bf16(h[v].x, h[v].y), pack_bf16(h[v].z, h[v].w)};
        });
    }

    __device__ float* stream() const { return p.resid + static_cast<int64_t>(row) * p.dim; }

    __device__ void run() const {
        const uint32_t slot = p.slot[row];
        const int receipt = p.receipt[row];
        const bool has_branch = row < p.branch_rows;
        // Under way before anything depends on the row's tables.
        float4 h[VECS], branch[OF_BRANCH ? 1 : VECS];
        const float* from = p.branch + static_cast<int64_t>(row) * p.dim;
        if constexpr (OF_BRANCH) {
            load(h, has_branch ? from : stream());   // in turn: there is no room for both
        } else {
            load(h, stream());
            if (has_branch) load(branch, from);
        }
        if (slot == NONE) return;

        // Operations of the stream are from op to ops, where the branch's begin.
        uint32_t op = 0, ops = 0;
        if (receipt >= 0) {
            const uint32_t* first = p.first + static_cast<int64_t>(slot) * (p.taps + 1) + 2 * p.site;
            op = first[0];
            ops = first[1];
        }
        if (op < ops) {   // on its way before it is wanted
            const HookOp& it = p.ops[static_cast<int64_t>(slot) * p.ops_per_slot + op];
            const float* vector = p.vectors + static_cast<int64_t>(it.vector) * p.dim;
            each([&](int, int element) { prefetch_l2(vector + element); });
        }
        uint32_t found[3];
        if (p.has_captures) find_captures(found);
        uint32_t branch_ops = ops;
        if (receipt >= 0)
            branch_ops = p.first[static_cast<int64_t>(slot) * (p.taps + 1) + 2 * p.site + 2];
        bool of_branch = has_branch && ops < branch_ops;   // operations on it come first
        auto add_stream = [&] {
            each([&](int v, int element) { add(h[v], *reinterpret_cast<const float4*>(stream() + element)); });
        };
        if (has_branch) {
            if constexpr (OF_BRANCH) {
                scale(h);
                if (!of_branch) {
                    if (p.has_captures) capture(1, found, h);
                    add_stream();
                }
            } else {
                const float factor = p.branch_scale;
                each([&](int v, int) {
                    branch[v] = float4{branch[v].x * factor, branch[v].y * factor, branch[v].z * factor,
                                       branch[v].w * factor};
                });
                if (of_branch) {
                    each([&](int v, int) { h[v] = branch[v]; });   // in turn here too
                } else {
                    if (p.has_captures) capture(1, found, branch);
                    each([&](int v, int) { add(h[v], branch[v]); });
                }
            }
        }
        float4 gain[VECS];   // on its way while the row is summed, in the registers of the branch
        float squares;
        if (of_branch || op < ops) {
            Squares changed;
#pragma unroll 1   // one copy of the operations' code, or it would not fit into the registers
            for (;; of_branch = false) {
                changed = operate(h, of_branch ? ops : op, of_branch ? branch_ops : ops);
                if (!of_branch) break;
                if constexpr (THREADS > WARP) __syncthreads();   // likewise
                if (p.has_captures) capture(1, found, h);
                add_stream();
            }
            if constexpr (OF_X) load(gain, p.gain);
            squares = changed.known ? changed.sum : sum_of_squares(h);
        } else {
            if constexpr (OF_X) load(gain, p.gain);
            squares = sum_of_squares(h);
        }
        if (has_branch || op < ops) store(stream(), h);
        if (p.has_captures) capture(0, found, h);
        if (threadIdx.x % THREADS == 0) p.norms[row] = sqrtf(squares);
        normalise(h, gain, squares);
        if (p.has_captures && p.is_final) capture(2, found, h);
    }
};

template <int THREADS, int VECS, Norms NORMS>
__device__ void residual_norm(const ResidualNormParams& p) {
    __shared__ Scratch scratch;
    const int row = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / THREADS);
    // Whole rows leave, so whole warps, and whole blocks where a row is longer than a warp.
    if (row < p.rows) Row<THREADS, VECS, NORMS>{p, &scratch, row}.run();
}

}  // namespace

// The bounds are __launch_bounds__': threads, and blocks of a multiprocessor at least.
#define RESIDUAL_NORM(name, THREADS, VECS, NORMS, ...)                           \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__)                    \
        name(const __grid_constant__ ResidualNormParams p) {                     \
        residual_norm<THREADS, VECS, NORMS>(p);                                  \
    }                                                                            \
    static_assert(THREADS % WARP == 0, "a row is whole warps")
RESIDUAL_NORM(residual_norm_32_2, 32, 2, BEFORE, 128, 4);
EXPORT_KERNEL(residual_norm_32_2, ResidualNormParams)
RESIDUAL_NORM(residual_norm_32_8, 32, 8, BEFORE, 128, 4);
EXPORT_KERNEL(residual_norm_32_8, ResidualNormParams)
RESIDUAL_NORM(residual_norm_128_4, 128, 4, BEFORE, 128, 8);
EXPORT_KERNEL(residual_norm_128_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_256_4, 256, 4, BEFORE, 256, 4);
EXPORT_KERNEL(residual_norm_256_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_512_4, 512, 4, BEFORE, 512, 2);
EXPORT_KERNEL(residual_norm_512_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_1024_4, 1024, 4, BEFORE, 1024);
EXPORT_KERNEL(residual_norm_1024_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_32_2, 32, 2, AFTER, 128, 4);
EXPORT_KERNEL(residual_norm_after_32_2, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_32_8, 32, 8, AFTER, 128, 4);
EXPORT_KERNEL(residual_norm_after_32_8, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_128_4, 128, 4, AFTER, 128, 8);
EXPORT_KERNEL(residual_norm_after_128_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_256_4, 256, 4, AFTER, 256, 4);
EXPORT_KERNEL(residual_norm_after_256_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_512_4, 512, 4, AFTER, 512, 2);
EXPORT_KERNEL(residual_norm_after_512_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_1024_4, 1024, 4, AFTER, 1024);
EXPORT_KERNEL(residual_norm_after_1024_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_32_2, 32, 2, AROUND, 128, 4);
EXPORT_KERNEL(residual_norm_around_32_2, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_32_8, 32, 8, AROUND, 128, 4);
EXPORT_KERNEL(residual_norm_around_32_8, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_128_4, 128, 4, AROUND, 128, 8);
EXPORT_KERNEL(residual_norm_around_128_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_256_4, 256, 4, AROUND, 256, 4);
EXPORT_KERNEL(residual_norm_around_256_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_512_4, 512, 4, AROUND, 512, 2);
EXPORT_KERNEL(residual_norm_around_512_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_1024_4, 1024, 4, AROUND, 1024);
EXPORT_KERNEL(residual_norm_around_1024_4, ResidualNormParams)
