// cap_logits: what some models do to logits, in place, in f32:
//
//   cap 0:      l = scale * l
//   otherwise:  l = cap * tanh(scale * l / cap)
//
// Shapes  logits: (count)
// Launch  any grid, any block: a thread takes every so many.
#include "math.cuh"

struct CapLogitsParams {
    float*   logits;
    uint64_t count;
    float    scale, cap;
};
static_assert(sizeof(CapLogitsParams) == 24, "mirror of src/ops/cap_logits.rs");

extern "C" __global__ void __launch_bounds__(1024)
cap_logits(const __grid_constant__ CapLogitsParams p) {
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count; i += step) {
        const float scaled = p.logits[i] * p.scale;
        if (p.cap == 0.0f) {
            p.logits[i] = scaled;
            continue;
        }
        const float y = scaled / p.cap;
        const float small = exp_f32(-2.0f * fabsf(y));   // tanh |y| = (1 - small) / (1 + small)
        p.logits[i] = copysignf(p.cap * ((1.0f - small) / (1.0f + small)), y);
    }
}
EXPORT_KERNEL(cap_logits, CapLogitsParams)
