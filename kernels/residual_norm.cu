// residual_norm: the one place where the residual stream is written. For every row, in this order:
//
//   branch = branch * c                 (rows below branch_rows)    branch_gain not null:
//                                       branch / sqrt(mean(branch^2) + eps) * branch_gain * c
//   branch captured (tap 2 site + 1)    h += branch
//   h += scale * v                      each operation of the row's slot at this site whose window
//                                       from <= position < to holds; relative: scale * |h|;
//                                       receipt = (|h| before, |change|)
//   h captured (tap 2 site), |h| stored
//   x = h / sqrt(mean(h^2) + eps) * gain            is_final: also captured in f32 (tap 2 site + 2)
//   x = h                                           where gain is null
//
// Shapes  resid, branch, captured: (.., dim) f32    gains: (dim)    vectors: (vectors, dim) f32
//         x: bf16 Tiles of x_row_groups * 8 rows    norms: (rows), this site's
//         slot, position, receipt: (rows)           first: (slots, sites + 1)
//         ops: (slots, ops_per_slot); those of slot s at site i are first[s, i]..first[s, i + 1]
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

struct HookOp {
    uint32_t vector;     // row of vectors
    uint32_t from, to;   // positions
    float    scale;
    uint32_t relative;   // 0 or 1
};
static_assert(sizeof(HookOp) == 20, "mirror of src/ops/hooks.rs");

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
    int             rows, branch_rows, dim, site, sites, ops_per_slot, x_row_groups;
    int             is_final, has_captures;
    float           eps;
    float           branch_scale;   // c
    int             unused;         // fills the struct up to its alignment
};
static_assert(sizeof(ResidualNormParams) == 176, "mirror of src/ops/residual_norm.rs");

namespace {

// Threads of a row that is longer than a warp meet here.
struct Scratch {
    double   changes[WARP];
    float    squares[WARP];
    float    branch_squares[WARP];
    uint32_t found[3];
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

    // Sum over the row's threads, which all get it. Successive calls alternate between two arrays:
    // the barrier of the one then parts the reads of the other from its next writes.
    template <class T>
    __device__ T sum(T value, T* partial) const {
        for (int offset = WARP / 2; offset > 0; offset /= 2)
            value += __shfl_xor_sync(FULL_WARP, value, offset);
        if constexpr (THREADS > WARP) {
            constexpr int WARPS = THREADS / WARP;
            const int lane = threadIdx.x % WARP;
            if (lane == 0) partial[threadIdx.x / WARP] = value;
            __syncthreads();
            value = partial[lane % WARPS];
            for (int offset = WARPS / 2; offset > 0; offset /= 2)
                value += __shfl_xor_sync(FULL_WARP, value, offset);
        }
        return value;
    }

    __device__ float sum_of_squares(const float4 (&h)[VECS], float* partial) const {
        float4 sums = {0.0f, 0.0f, 0.0f, 0.0f};
        each([&](int v, int) {
            sums.x = fmaf(h[v].x, h[v].x, sums.x);
            sums.y = fmaf(h[v].y, h[v].y, sums.y);
            sums.z = fmaf(h[v].z, h[v].z, sums.z);
            sums.w = fmaf(h[v].w, h[v].w, sums.w);
        });
        return sum((sums.x + sums.y) + (sums.z + sums.w), partial);
    }

    // First entry of a tap that is not of a lower row. The whole warp searches: each round leaves
    // a 32nd of the range.
    __device__ uint32_t search(int tap) const {
        const uint2* entries = reinterpret_cast<const uint2*>(p.entries);
        uint32_t begin = p.tap_first[tap], end = p.tap_first[tap + 1];
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

    // Where the row's captures of taps 2 site + i start.
    __device__ void find_captures(uint32_t (&found)[3]) const {
        const int taps = p.is_final ? 3 : 2;
        if constexpr (THREADS == WARP) {
            for (int i = 0; i < taps; i++) found[i] = search(2 * p.site + i);
        } else {
            const int warp = threadIdx.x / WARP;
            if (warp < taps) {   // a warp a tap: a row of several warps has at least four
                const uint32_t at = search(2 * p.site + warp);
                if (threadIdx.x % WARP == 0) scratch->found[warp] = at;
            }
            __syncthreads();
            for (int i = 0; i < taps; i++) found[i] = scratch->found[i];
        }
    }

    __device__ void capture(int tap, uint32_t at, const float4 (&values)[VECS]) const {
        const uint2* entries = reinterpret_cast<const uint2*>(p.entries);
        for (const uint32_t end = p.tap_first[tap + 1]; at < end; at++) {
            const uint2 entry = entries[at];
            if (entry.x != static_cast<uint32_t>(row)) break;
            store(p.captured + static_cast<int64_t>(entry.y) * p.dim, values);
        }
    }

    // One operation; gives the new sum of squares.
    __device__ float inject(float4 (&h)[VECS], const HookOp& op, float squares, int receipt) const {
        const float* vector = p.vectors + static_cast<int64_t>(op.vector) * p.dim;
        const float before = sqrtf(squares);
        const float scale = op.relative ? op.scale * before : op.scale;
        double change = 0.0;
        auto add = [&](float& h, float v) {
            const float after = fmaf(scale, v, h);
            const double delta = after - h;
            change += delta * delta;
            h = after;
        };
        each([&](int v, int element) {
            const float4 values = *reinterpret_cast<const float4*>(vector + element);
            add(h[v].x, values.x);
            add(h[v].y, values.y);
            add(h[v].z, values.z);
            add(h[v].w, values.w);
        });
        change = sum(change, scratch->changes);
        if (threadIdx.x % THREADS == 0)
            reinterpret_cast<float2*>(p.receipts)[receipt] = float2{before, static_cast<float>(sqrt(change))};
        return sum_of_squares(h, scratch->squares);
    }

    // What becomes of the branch before it is added.
    __device__ void scale(float4 (&branch)[VECS]) const {
        const float squares = sum_of_squares(branch, scratch->branch_squares);
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

    __device__ void run() const {
        const uint32_t slot = p.slot[row];
        const int receipt = p.receipt[row];
        const bool has_branch = row < p.branch_rows;
        float* resid = p.resid + static_cast<int64_t>(row) * p.dim;
        // Under way before anything depends on the row's tables.
        float4 h[VECS], branch[OF_BRANCH ? 1 : VECS];
        const float* from = p.branch + static_cast<int64_t>(row) * p.dim;
        if constexpr (OF_BRANCH) {
            load(h, has_branch ? from : resid);   // in turn: there is no room for both
        } else {
            load(h, resid);
            if (has_branch) load(branch, from);
        }
        if (slot == NONE) return;

        uint32_t op = 0, ops = 0;
        if (receipt >= 0) {
            const uint32_t* first = p.first + static_cast<int64_t>(slot) * (p.sites + 1) + p.site;
            op = first[0];
            ops = first[1];
        }
        uint32_t found[3];
        if (p.has_captures) find_captures(found);
        if (has_branch) {
            auto add = [](float4& to, const float4& v) {
                to = float4{to.x + v.x, to.y + v.y, to.z + v.z, to.w + v.w};
            };
            if constexpr (OF_BRANCH) {
                scale(h);
                if (p.has_captures) capture(2 * p.site + 1, found[1], h);
                each([&](int v, int element) {
                    add(h[v], *reinterpret_cast<const float4*>(resid + element));
                });
            } else {
                each([&](int v, int) {
                    const float factor = p.branch_scale;
                    branch[v] = float4{branch[v].x * factor, branch[v].y * factor, branch[v].z * factor,
                                       branch[v].w * factor};
                });
                if (p.has_captures) capture(2 * p.site + 1, found[1], branch);
                each([&](int v, int) { add(h[v], branch[v]); });
            }
        }
        float4 gain[VECS];   // on its way while the row is summed, in the registers of the branch
        if constexpr (OF_X) load(gain, p.gain);
        const bool writes = has_branch || op < ops;
        float squares = sum_of_squares(h, scratch->squares);
        if (op < ops) {
            for (; op < ops; op++) {
                const HookOp& it = p.ops[static_cast<int64_t>(slot) * p.ops_per_slot + op];
                const uint32_t position = p.position[row];
                if (it.from <= position && position < it.to)
                    squares = inject(h, it, squares, receipt + static_cast<int>(op));
            }
            // Again: kept through the loop, it would not fit into the registers.
            if constexpr (OF_X) load(gain, p.gain);
        }
        if (writes) store(resid, h);
        if (p.has_captures) capture(2 * p.site, found[0], h);
        if (threadIdx.x % THREADS == 0) p.norms[row] = sqrtf(squares);
        normalise(h, gain, squares);
        if (p.has_captures && p.is_final) capture(2 * p.site + 2, found[2], h);
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
RESIDUAL_NORM(residual_norm_32_2, 32, 2, BEFORE, 128);
EXPORT_KERNEL(residual_norm_32_2, ResidualNormParams)
RESIDUAL_NORM(residual_norm_32_8, 32, 8, BEFORE, 128);
EXPORT_KERNEL(residual_norm_32_8, ResidualNormParams)
RESIDUAL_NORM(residual_norm_128_4, 128, 4, BEFORE, 128, 8);
EXPORT_KERNEL(residual_norm_128_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_256_4, 256, 4, BEFORE, 256, 4);
EXPORT_KERNEL(residual_norm_256_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_512_4, 512, 4, BEFORE, 512, 2);
EXPORT_KERNEL(residual_norm_512_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_1024_4, 1024, 4, BEFORE, 1024);
EXPORT_KERNEL(residual_norm_1024_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_32_2, 32, 2, AFTER, 128);
EXPORT_KERNEL(residual_norm_after_32_2, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_32_8, 32, 8, AFTER, 128);
EXPORT_KERNEL(residual_norm_after_32_8, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_128_4, 128, 4, AFTER, 128, 8);
EXPORT_KERNEL(residual_norm_after_128_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_256_4, 256, 4, AFTER, 256, 4);
EXPORT_KERNEL(residual_norm_after_256_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_512_4, 512, 4, AFTER, 512, 2);
EXPORT_KERNEL(residual_norm_after_512_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_after_1024_4, 1024, 4, AFTER, 1024);
EXPORT_KERNEL(residual_norm_after_1024_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_32_2, 32, 2, AROUND, 128);
EXPORT_KERNEL(residual_norm_around_32_2, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_32_8, 32, 8, AROUND, 128);
EXPORT_KERNEL(residual_norm_around_32_8, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_128_4, 128, 4, AROUND, 128, 8);
EXPORT_KERNEL(residual_norm_around_128_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_256_4, 256, 4, AROUND, 256, 4);
EXPORT_KERNEL(residual_norm_around_256_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_512_4, 512, 4, AROUND, 512, 2);
EXPORT_KERNEL(residual_norm_around_512_4, ResidualNormParams)
RESIDUAL_NORM(residual_norm_around_1024_4, 1024, 4, AROUND, 1024);
EXPORT_KERNEL(residual_norm_around_1024_4, ResidualNormParams)
