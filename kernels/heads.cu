// heads: operations on what the heads of attention gave, before the output projection reads it, and copies
// of queries, keys, values and outputs of heads to where they are captured:
//
//   operations on a head's output, those of the row's slot at tap + 3 that name the head (operations.cuh)
//   queries after rope captured (tap), keys after rope (tap + 1), values (tap + 2), outputs (tap + 3)
//
// Shapes  qkv: (rows, (heads + 2 kv_heads) * dim) f32    attn: bf16 Tiles of attn_row_groups * 8 rows, heads * dim
//         captured: (.., model_dim) f32; a row of heads fills as many numbers from the start of its row on
//         vectors: (vectors, model_dim), a head's first in each    the rest as in residual_norm
// Nothing slot NONE: a dead row, nothing is written.  receipt -1: its sequence has no operations.
//         has_captures 0: tap_first, entries and captured are not read, nor is qkv.
// Launch  grid = (rows, ceil(parts / 4)), block = 128 threads, a warp a head: parts are the heads of queries, keys
//         and values where has_captures, and those of outputs.
// Needs   dim % 8 == 0, at most 256 and at most model_dim; arrays as in residual_norm.
#include "operations.cuh"

struct HeadsParams : HookTables {
    const float* qkv;
    bf16*        attn;
    int          heads, kv_heads, dim, model_dim, tap, attn_row_groups;

    __device__ int vector_stride() const { return model_dim; }
};
static_assert(sizeof(HeadsParams) == 152, "mirror of src/ops/heads.rs");

namespace {

// One head of one row: a warp, two float4s a thread.
struct Head : Lanes<WARP, 2, HeadsParams> {
    // To where the row is captured at a tap, from element `at` on.
    __device__ void capture(int tap, int at, const float4 (&values)[2]) const {
        const uint2* entries = reinterpret_cast<const uint2*>(p.entries);
        const uint32_t end = p.tap_first[tap + 1];
        for (uint32_t i = search(tap); i < end && entries[i].x == static_cast<uint32_t>(row); i++)
            store(p.captured + static_cast<int64_t>(entries[i].y) * p.model_dim + at, values);
    }

    __device__ bf16* output(int head, int element) const {
        const int k = head * p.dim + element;
        return p.attn + tile_chunk(row, k / 8, p.attn_row_groups) + k % 8;
    }

    // Of a query, key or value, by number among all of them.
    __device__ void inputs(int head) const {
        const int all = p.heads + 2 * p.kv_heads;
        float4 h[2];
        load(h, p.qkv + (static_cast<int64_t>(row) * all + head) * p.dim);
        const int of = head < p.heads ? 0 : head < p.heads + p.kv_heads ? 1 : 2;
        const int first = of == 0 ? 0 : of == 1 ? p.heads : p.heads + p.kv_heads;
        capture(p.tap + of, (head - first) * p.dim, h);
    }

    __device__ void outputs(int head) const {
        const int tap = p.tap + 3;
        uint32_t op = 0, ops = 0;
        if (p.receipt[row] >= 0) {
            const uint32_t* first = p.first + static_cast<int64_t>(p.slot[row]) * (p.taps + 1) + tap;
            op = first[0];
            ops = first[1];
        }
        if (op == ops && !p.has_captures) return;
        float4 h[2];
        each([&](int v, int element) {
            const uint2 pairs = *reinterpret_cast<const uint2*>(output(head, element));
            h[v] = float4{low_bf16(pairs.x), high_bf16(pairs.x), low_bf16(pairs.y), high_bf16(pairs.y)};
        });
        if (op < ops) {
            operate(h, op, ops, [=](const HookOp& it) { return it.head == static_cast<uint32_t>(head); });
            each([&](int v, int element) {
                *reinterpret_cast<uint2*>(output(head, element)) =
                    uint2{pack_bf16(h[v].x, h[v].y), pack_bf16(h[v].z, h[v].w)};
            });
        }
        if (p.has_captures) capture(tap, head * p.dim, h);
    }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(128) heads(const __grid_constant__ HeadsParams p) {
    const int row = static_cast<int>(blockIdx.x);
    if (p.slot[row] == NONE) return;
    const int inputs = p.has_captures ? p.heads + 2 * p.kv_heads : 0;
    const int part = static_cast<int>(blockIdx.y * (blockDim.x / WARP) + threadIdx.x / WARP);
    if (part >= inputs + p.heads) return;   // whole warps
    const Head head = {{p, nullptr, row}};
    if (part < inputs) head.inputs(part);
    else head.outputs(part - inputs);
}
EXPORT_KERNEL(heads, HeadsParams)
