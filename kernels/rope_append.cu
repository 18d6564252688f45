// rope_append: normalises (where a gain is given) and rotates queries and keys, and appends keys
// and values to the cache. For every row and head, i below half = head_dim / 2, in f32:
//
//   q, k = a / sqrt(mean(a^2) + eps) * norm                    over the head; null norm: as they are
//   a[i], a[i + half] = a[i] cos - a[i + half] sin,  a[i + half] cos + a[i] sin
//
// (Su et al. 2021, eq. 34, halves as Hugging Face lays them out.) Rotated q and k replace those in
// qkv; k and v are written to the row's place in the page of its position at `layer`, in bf16.
//
// normalise_whole: before it, where queries and keys are normalised over all heads together,
//
//   q, k = a / sqrt(mean(a^2) + eps) * norm                    in place; norm: (width of q or k)
//
// Launch  grid = (rows, 2): q, then k; block = 256 threads. Needs widths that are multiples of 4.
//
// rope_append:
// Shapes  qkv: (rows, (heads + 2 kv_heads) * head_dim)    cos, sin: (positions, half); null: q and k
//         are not rotated
//         slot, position: (rows)    tables: (slots, layers, blocks)    q_norm, k_norm: (head_dim)
//         pages: keys [kv_heads][16][head_dim], then values [kv_heads][16][head_dim] each
// Nothing slot NONE: a dead row, nothing is written.
// Launch  grid = (rows, ceil((heads + 2 kv_heads) * L / 128)), block = 128 threads; L lanes a head:
//         head_dim / 8 rounded up to a power of two.
// Needs   head_dim % 8 == 0, at most 256; qkv, cos, sin, norms and pages 16-byte aligned.
#include "math.cuh"

struct RopeAppendParams {
    float*          qkv;
    const float*    cos;
    const float*    sin;
    const uint32_t* slot;
    const uint32_t* position;
    const uint32_t* tables;
    bf16*           pages;
    const float*    q_norm;
    const float*    k_norm;
    int             rows, heads, kv_heads, head_dim, layer, layers, blocks;
    float           eps;
};
static_assert(sizeof(RopeAppendParams) == 104, "mirror of src/ops/rope_append.rs");

namespace {

constexpr uint32_t PAGE = 16;   // positions

__device__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

__device__ void store4(float* to, float4 v) { *reinterpret_cast<float4*>(to) = v; }

// 8 bytes: in a head of 24, halves start at odd multiples of it. Lanes side by side fill sectors.
__device__ void append4(bf16* to, float4 v) {
    *reinterpret_cast<uint2*>(to) = uint2{pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)};
}

__device__ float squares4(float4 v) {
    return fmaf(v.x, v.x, v.y * v.y) + fmaf(v.z, v.z, v.w * v.w);
}

__device__ float4 scaled4(float4 v, float inverse, float4 gain) {
    return float4{v.x * inverse * gain.x, v.y * inverse * gain.y, v.z * inverse * gain.z,
                  v.w * inverse * gain.w};
}

// Products are rounded before they are added, as on the CPU.
__device__ void rotate(float& a, float& b, float cos, float sin) {
    const float low = a * cos - b * sin;
    b = b * cos + a * sin;
    a = low;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128)
rope_append(const __grid_constant__ RopeAppendParams p) {
    const int64_t row = blockIdx.x;
    const uint32_t slot = p.slot[row];
    if (slot == NONE) return;   // the whole block
    const uint32_t position = p.position[row];

    // A head's lanes hold elements i..i + 4 of both halves each.
    int lanes = 1;
    while (8 * lanes < p.head_dim) lanes *= 2;
    const int thread = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
    const int head = thread / lanes, i = 4 * (thread % lanes), half = p.head_dim / 2;
    const int first_k = p.heads, first_v = p.heads + p.kv_heads, all = p.heads + 2 * p.kv_heads;
    const bool works = head < all && i < half, is_qk = works && head < first_v;
    float* at = p.qkv + (row * all + head) * p.head_dim + i;   // read only where the thread works

    float4 low = {0.0f, 0.0f, 0.0f, 0.0f}, high = low;
    if (works) {
        low = load4(at);
        high = load4(at + half);
    }
    if (p.q_norm || p.k_norm) {   // every lane of the warp takes part
        float squares = squares4(low) + squares4(high);
        for (int offset = lanes / 2; offset > 0; offset /= 2)
            squares += __shfl_xor_sync(FULL_WARP, squares, offset);
        const float* norm = head < first_k ? p.q_norm : p.k_norm;
        if (is_qk && norm) {
            const float inverse = inverse_norm(squares, p.head_dim, p.eps);
            low = scaled4(low, inverse, load4(norm + i));
            high = scaled4(high, inverse, load4(norm + half + i));
        }
    }
    if (is_qk) {
        if (p.cos) {
            const int64_t angle = static_cast<int64_t>(position) * half + i;
            const float4 cos = load4(p.cos + angle), sin = load4(p.sin + angle);
            rotate(low.x, high.x, cos.x, sin.x);
            rotate(low.y, high.y, cos.y, sin.y);
            rotate(low.z, high.z, cos.z, sin.z);
            rotate(low.w, high.w, cos.w, sin.w);
        }
        store4(at, low);
        store4(at + half, high);
    }
    if (works && head >= first_k) {
        const int64_t blocks = (static_cast<int64_t>(slot) * p.layers + p.layer) * p.blocks;
        const int64_t page = p.tables[blocks + position / PAGE];
        // Keys and values of a page are (2 kv_heads, 16, head_dim), in the order of heads in qkv.
        const int64_t lane = (page * 2 * p.kv_heads + (head - first_k)) * PAGE + position % PAGE;
        bf16* to = p.pages + lane * p.head_dim + i;
        append4(to, low);
        append4(to + half, high);
    }
}
EXPORT_KERNEL(rope_append, RopeAppendParams)

struct NormaliseWholeParams {
    float*       qkv;
    const float* q_norm;
    const float* k_norm;
    int          q_width, k_width, width;   // width: of a row of qkv
    float        eps;
};
static_assert(sizeof(NormaliseWholeParams) == 40, "mirror of src/ops/rope_append.rs");

extern "C" __global__ void __launch_bounds__(256)
normalise_whole(const __grid_constant__ NormaliseWholeParams p) {
    __shared__ float scratch[WARP];
    const bool is_k = blockIdx.y == 1;
    const int width = is_k ? p.k_width : p.q_width;
    const float* norm = is_k ? p.k_norm : p.q_norm;
    float* row = p.qkv + static_cast<int64_t>(blockIdx.x) * p.width + (is_k ? p.q_width : 0);

    float squares = 0.0f;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x) squares += squares4(load4(row + i));
    squares = block_sum(squares, scratch);
    const float inverse = inverse_norm(squares, width, p.eps);
    for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x)
        store4(row + i, scaled4(load4(row + i), inverse, load4(norm + i)));
}
EXPORT_KERNEL(normalise_whole, NormaliseWholeParams)
