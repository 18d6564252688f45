// The one header every kernel includes. Under nvcc it is CUDA; under a plain C++ compiler it is
// host/shim.h, which runs the same source with one fibre per CUDA thread.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
// Dynamic shared memory as an array of T, aligned to 1024 bytes (the swizzle atom) as long as the kernel
// has no __shared__ variables beside it.
#define DYNAMIC_SMEM(T, name) extern __shared__ __align__(1024) unsigned char name##_bytes[]; \
    T* name = reinterpret_cast<T*>(name##_bytes)
// Declares a kernel to the loader (build.rs looks for these lines) and to the shim.
#define EXPORT_KERNEL(kernel, Params)
// Trailing parameter that tells the shim the caller's line: for its messages, nothing on the GPU.
#define WHERE
#else
#include "host/shim.h"
#endif

using bf16 = __nv_bfloat16;
constexpr uint32_t NONE = 0xffffffffu;   // no row, dead row, no token
constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr int WARP = 32;

__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline bf16 to_bf16(float v) { return __float2bfloat16(v); }   // to nearest, ties to even

// Two bf16 in a register, `low` at the lower address.
__device__ inline uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
__device__ inline float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Element offset of chunk `chunk` (8 elements, k = 8 * chunk) of row `row` in tiled activations:
// atoms of 8 rows x 64 k, row_groups = row capacity / 8 of them for each 64 k; within an atom the
// chunk's place is XORed with the row (the 128-byte swizzle of wgmma and TMA).
__device__ inline int64_t tile_chunk(int row, int chunk, int row_groups) {
    const int64_t atom = int64_t(chunk / 8) * row_groups + row / 8;
    return atom * 512 + (row % 8) * 64 + ((chunk % 8) ^ (row % 8)) * 8;
}

// Butterfly sum: every lane gets the total. All 32 lanes must call it.
__device__ inline float warp_sum(float v) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(FULL_WARP, v, offset);
    return v;
}

// Largest value; every lane gets it. NaN is passed over (all NaN: NaN).
__device__ inline float warp_max(float v) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, offset));
    return v;
}

// Sum over the block; every thread gets the total. scratch: 32 floats of shared memory, which may be
// reused at once. The order of additions is fixed by the block size, so the result is deterministic.
// The block is whole warps.
__device__ inline float block_sum(float v, float* scratch) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    v = warp_sum(v);
    __syncthreads();   // an earlier use of scratch has been read
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
