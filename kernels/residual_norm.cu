// residual_norm: the one place where the residual stream is written. For every row, in this order:
//
//   branch = branch * c                 (rows below branch_rows)    branch_gain not null:
//                                       branch / sqrt(mean(branch^2) + eps) * branch_gain * c
//   operations on the branch, which is then captured (tap 2 site + 1)       h += branch
//   operations on h, which is then captured (tap 2 site), and |h| stored
//   x = h / sqrt(mean(h^2) + eps) * gain            is_final: also captured in f32 (tap 2 site + 2)
//   x = h                                           where gain is null
//
// Operations  those of the row's slot at the tap, see operations.cuh.
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
#include "operations.cuh"
#include "ptx.cuh"

struct ResidualNormParams : HookTables {
    float*       resid;
    const float* branch;
    const float* branch_gain;
    const float* gain;
    bf16*        x;
    float*       norms;
    int          rows, branch_rows, dim, site, x_row_groups, is_final;
    float        eps;
    float        branch_scale;   // c

    __device__ int vector_stride() const { return dim; }
};
static_assert(sizeof(ResidualNormParams) == 192, "mirror of src/ops/residual_norm.rs");

namespace {

// What is normalised: x, the branch, or both.
enum Norms { BEFORE, AFTER, AROUND };

// One row.
template <int THREADS, int VECS, Norms NORMS>
struct Row : Lanes<THREADS, VECS, ResidualNormParams> {
    using Of = Lanes<THREADS, VECS, ResidualNormParams>;
    using Of::p, Of::scratch, Of::row, Of::each, Of::load, Of::store, Of::add, Of::sum_of_squares, Of::search, Of::operate;
    static constexpr bool OF_BRANCH = NORMS != BEFORE, OF_X = NORMS != AFTER;

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

    // What becomes of the branch before it is added.
    __device__ void scale(float4 (&branch)[VECS]) const {
        const float squares = this->template sum_of_squares<OF_BRANCH_SQUARES>(branch);
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
                changed = operate(h, of_branch ? ops : op, of_branch ? branch_ops : ops, [](const HookOp&) { return true; });
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
    if (row < p.rows) Row<THREADS, VECS, NORMS>{{p, &scratch, row}}.run();
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
