// probe: dot products of chosen rows with probe vectors, and the rows' norms. For each item:
//
//   out[item.out + i]           = sum over d of rows[item.row, d] * vectors[item.first + i, d]     i < item.probes
//   out[item.out + item.probes] = sqrt(sum over d of rows[item.row, d]^2)
//
// Shapes  rows: (.., dim)  vectors: (.., dim)  out: each item's are its own  all f32, row-major;
//         rows and vectors 16-byte aligned, dim % 4 == 0.
// Sums    f32 fused multiply-adds in an order that depends on dim only.
// Launch  grid = items, block = a multiple of 32 (256 fits), one warp a probe at a time.
// Null    item.row NONE: nothing is written.  vectors may be null if all items have no probes.
#include "device.cuh"

struct ProbeItem {
    uint32_t row, first, probes, out;
};
static_assert(sizeof(ProbeItem) == 16, "mirror of src/ops/probe.rs");

struct ProbeParams {
    const float*     rows;
    const float*     vectors;
    const ProbeItem* items;
    float*           out;
    int              dim;
    int              unused;   // fills the struct up to its alignment
};
static_assert(sizeof(ProbeParams) == 40, "mirrored in Rust");

extern "C" __global__ void probe(const __grid_constant__ ProbeParams p) {
    const ProbeItem item = p.items[blockIdx.x];
    if (item.row == NONE) return;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int probes = static_cast<int>(item.probes);
    const float4* row = reinterpret_cast<const float4*>(p.rows + static_cast<int64_t>(item.row) * p.dim);
    for (int i = warp; i <= probes; i += warps) {
        const float4* vector = row;
        if (i < probes)
            vector = reinterpret_cast<const float4*>(p.vectors + (static_cast<int64_t>(item.first) + i) * p.dim);
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
        for (int chunk = lane; chunk < p.dim / 4; chunk += WARP) {
            const float4 a = row[chunk], b = vector[chunk];
            sum.x = fmaf(a.x, b.x, sum.x);
            sum.y = fmaf(a.y, b.y, sum.y);
            sum.z = fmaf(a.z, b.z, sum.z);
            sum.w = fmaf(a.w, b.w, sum.w);
        }
        const float dot = warp_sum((sum.x + sum.y) + (sum.z + sum.w));
        if (lane == 0) p.out[static_cast<int64_t>(item.out) + i] = i < probes ? dot : sqrtf(dot);
    }
}
EXPORT_KERNEL(probe, ProbeParams)
