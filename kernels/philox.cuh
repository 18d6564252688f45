// Counter-based randomness: Philox 4x32-10 (Salmon et al. 2011) and Gumbel draws from it; the same
// bits as src/ops/philox.rs.
#pragma once
#include "math.cuh"

constexpr uint32_t PURPOSE_TOKEN = 0;   // counter word 2 of the draw of a next token

struct PhiloxWords { uint32_t word[4]; };

// Four words for a key and a counter.
__device__ inline PhiloxWords philox(uint32_t key0, uint32_t key1, uint32_t c0, uint32_t c1,
                                     uint32_t c2, uint32_t c3) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
        c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
        c3 = static_cast<uint32_t>(a);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// u = (x + 0.5) * 2^-32 in f32: in (0, 1].
__device__ inline float uniform(uint32_t word) {
    return (static_cast<float>(word) + 0.5f) * 0x1p-32f;
}

// A standard Gumbel draw, -ln(-ln1p(-u)): finite, or -infinity where u rounds to 1.
__device__ inline float gumbel(uint32_t word) {
    const float u = uniform(word);
    if (u >= 1.0f) return -INFINITY;
    // -ln1p(-u) by Kahan's correction of the rounding of 1 - u.
    const float w = 1.0f - u;
    const float exponential = w == 1.0f ? u : -ln_f32(w) * (u / (1.0f - w));
    return -ln_f32(exponential);
}
