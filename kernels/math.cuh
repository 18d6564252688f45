// Elementary functions with the same bits on the CPU, the shim and the GPU: the operations of
// src/ops/math.rs in the same order. Only correctly rounded operations, fused where fmaf is written
// (the compilers are told not to fuse anything else).
#pragma once
#include "device.cuh"

// e^x to 2 ulp; 0 below -87.3 (-infinity included), 1.65e38 above 88. NaN stays NaN.
// Cody-Waite reduction and the polynomial of Cephes expf.
__device__ inline float exp_f32(float x) {
    constexpr float ROUND = 12582912.0f;   // 1.5 * 2^23: adding and subtracting it rounds to an integer
    float clamped = x > 88.0f ? 88.0f : x;
    clamped = clamped < -87.3f ? -87.3f : clamped;
    const float n = fmaf(clamped, 1.44269504088896340736f, ROUND) - ROUND;
    float r = fmaf(n, -0.693359375f, clamped);
    r = fmaf(n, 2.1219444e-4f, r);
    float p = 1.98756915e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    const float y = fmaf(p, r * r, r) + 1.0f;
    // n is in -126..=127; adding it to the exponent of ROUND leaves it in the low bits.
    const uint32_t exponent = __float_as_uint(n + ROUND) - __float_as_uint(ROUND);
    const float power = __uint_as_float((exponent + 127u) << 23);
    return x < -87.3f ? 0.0f : y * power;
}

// Natural logarithm of a normal positive number, to 2 ulp. The polynomial of Cephes logf.
__device__ inline float ln_f32(float x) {
    const uint32_t bits = __float_as_uint(x);
    // Mantissa in [sqrt(1/2), sqrt(2)).
    const int32_t exponent = int32_t(bits - 0x3f3504f3u) >> 23;
    const float m = __uint_as_float(bits - (uint32_t(exponent) << 23)) - 1.0f;
    const float e = float(exponent);
    const float z = m * m;
    float p = 7.0376836292e-2f;
    p = fmaf(p, m, -1.1514610310e-1f);
    p = fmaf(p, m, 1.1676998740e-1f);
    p = fmaf(p, m, -1.2420140846e-1f);
    p = fmaf(p, m, 1.4249322787e-1f);
    p = fmaf(p, m, -1.6668057665e-1f);
    p = fmaf(p, m, 2.0000714765e-1f);
    p = fmaf(p, m, -2.4999993993e-1f);
    p = fmaf(p, m, 3.3333331174e-1f);
    float y = p * m * z;
    y = fmaf(e, -2.12194440e-4f, y);
    y = fmaf(z, -0.5f, y);
    return fmaf(e, 0.693359375f, m + y);
}

// 1 / sqrt(x) of a normal positive number, to 4 ulp; of 0 finite. Newton's method from the exponent halved:
// unlike a division and sqrtf it calls no subroutine, which costs registers. (y * y of 0 would be infinite.)
__device__ inline float inverse_root(float x) {
    float y = __uint_as_float(0x5f375a86u - (__float_as_uint(x) >> 1));
    const float half = 0.5f * x;
#pragma unroll
    for (int step = 0; step < 3; step++) y = fmaf(-half * y * y, y, 1.5f * y);
    return y;
}

// 1 / sqrt(mean of squares + eps), by the sum of the squares of `width` values. Values too large for
// f32 must not pass for zeros.
__device__ inline float inverse_norm(float squares, int width, float eps) {
    const float mean = isfinite(squares) ? squares / static_cast<float>(width) : NAN;
    return 1.0f / sqrtf(mean + eps);
}
