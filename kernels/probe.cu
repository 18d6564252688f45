// probe: dot products of chosen rows of the stream with probe vectors, and the rows' norms.
//
//   out[c, i]      = sum over d of resid[rows[c], d] * vectors[i, d]
//   out[c, probes] = sqrt(sum over d of resid[rows[c], d]^2)
//
// Shapes  resid: (rows, dim)  vectors: (probes, dim)  out: (chosen, probes + 1)  all f32, row-major;
//         resid and vectors 16-byte aligned, dim % 4 == 0.
// Sums    f32 fused multiply-adds in an order that depends on dim only.
// Launch  grid = chosen rows, block = a multiple of 32 (256 fits), one warp a probe at a time.
// Null    rows[c] NONE: a dead row, nothing is written.  vectors may be null if probes == 0.
#include "device.cuh"

struct ProbeParams {
    const float*    resid;
    const float*    vectors;
    const uint32_t* rows;
    float*          out;
    int             dim;
    int             probes;
};
static_assert(sizeof(ProbeParams) == 40, "mirrored in Rust");

extern "C" __global__ void probe(const __grid_constant__ ProbeParams p) {
    const uint32_t at = p.rows[blockIdx.x];
    if (at == NONE) return;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const float4* row = reinterpret_cast<const float4*>(p.resid + static_cast<int64_t>(at) * p.dim);
    float* out = p.out + static_cast<int64_t>(blockIdx.x) * (p.probes + 1);
    for (int i = warp; i <= p.probes; i += warps) {
        const float4* vector = row;
        if (i < p.probes)
            vector = reinterpret_cast<const float4*>(p.vectors + static_cast<int64_t>(i) * p.dim);
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
        if (lane == 0) out[i] = i < p.probes ? dot : sqrtf(dot);
    }
}
EXPORT_KERNEL(probe, ProbeParams)
