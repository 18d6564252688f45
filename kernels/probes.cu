// Probes: one small kernel for each family of ptx.cuh, math.cuh and the warp operations, so that tests can
// hold each against its definition on every device. Each struct's comment is its kernel's contract.
#include "math.cuh"
#include "ptx.cuh"

// c(16,8) += a(16, 16 steps) * b(8, 16 steps)^T, row-major bf16, f32. One warp.
struct ProbeMmaParams { const bf16* a; const bf16* b; float* c; uint32_t steps, unused; };
static_assert(sizeof(ProbeMmaParams) == 32, "layout");

extern "C" __global__ void __launch_bounds__(32)
probe_mma(const __grid_constant__ ProbeMmaParams p) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4, stride = 16 * int(p.steps);
    auto pair = [](const bf16* at) { return *reinterpret_cast<const uint32_t*>(at); };
    auto at = [&](int e) -> float& { return p.c[(g + 8 * (e / 2)) * 8 + 2 * q + e % 2]; };
    float d[4] = {at(0), at(1), at(2), at(3)};
    for (int step = 0; step < int(p.steps); step++) {
        const bf16* a = p.a + step * 16 + 2 * q;
        const bf16* b = p.b + step * 16 + 2 * q + g * stride;
        const uint32_t fa[4] = {pair(a + g * stride), pair(a + (g + 8) * stride), pair(a + g * stride + 8),
                                pair(a + (g + 8) * stride + 8)};
        const uint32_t fb[2] = {pair(b), pair(b + 8)};
        mma_m16n8k16(d, fa, fb);
    }
    for (int e = 0; e < 4; e++) at(e) = d[e];
}
EXPORT_KERNEL(probe_mma, ProbeMmaParams)

// in: (4, 8, 8) u16, matrix i row j; out: (4 kinds, 32 lanes, 4 registers) u32, kinds x4, x4 transposed, x2,
// x2 transposed (matrices 0 and 1; registers 2 and 3 are 0). One warp, 512 bytes of dynamic shared memory.
struct ProbeLdmatrixParams { const uint4* in; uint32_t* out; };
static_assert(sizeof(ProbeLdmatrixParams) == 16, "layout");

extern "C" __global__ void __launch_bounds__(32)
probe_ldmatrix(const __grid_constant__ ProbeLdmatrixParams p) {
    DYNAMIC_SMEM(uint4, rows);
    rows[threadIdx.x] = p.in[threadIdx.x];
    __syncwarp();
    uint32_t r[4][4] = {};
    ldmatrix_x4(r[0], rows + threadIdx.x);
    ldmatrix_x4_trans(r[1], rows + threadIdx.x);
    ldmatrix_x2(r[2], rows + threadIdx.x % 16);
    ldmatrix_x2_trans(r[3], rows + threadIdx.x % 16);
    for (int kind = 0; kind < 4; kind++)
        for (int i = 0; i < 4; i++) p.out[(kind * 32 + threadIdx.x) * 4 + i] = r[kind][i];
}
EXPORT_KERNEL(probe_ldmatrix, ProbeLdmatrixParams)

// out[i] = i < valid ? in[i] : 0 for chunks i of 16 bytes, i < 128 * tiles; in has `valid` chunks. A ring of
// three tiles, two in flight. 128 threads, 6,144 bytes of dynamic shared memory.
struct ProbeCpAsyncParams { const uint4* in; uint4* out; uint32_t tiles, valid; };
static_assert(sizeof(ProbeCpAsyncParams) == 24, "layout");

extern "C" __global__ void __launch_bounds__(128)
probe_cp_async(const __grid_constant__ ProbeCpAsyncParams p) {
    DYNAMIC_SMEM(uint4, ring);
    auto load = [&](uint32_t tile) {
        const uint32_t chunk = tile * 128 + threadIdx.x;
        if (tile < p.tiles) {
            const bool valid = chunk < p.valid;
            cp_async_16(ring + tile % 3 * 128 + threadIdx.x, p.in + (valid ? chunk : 0), valid);
        }
        cp_async_commit();
    };
    load(0);
    load(1);
    for (uint32_t tile = 0; tile < p.tiles; tile++) {
        cp_async_wait<1>();
        __syncthreads();   // everyone's part of `tile` is there, and everyone has read tile - 1
        load(tile + 2);
        const uint32_t other = 127 - threadIdx.x;   // a chunk that another thread copied
        p.out[tile * 128 + other] = ring[tile % 3 * 128 + other];
    }
}
EXPORT_KERNEL(probe_cp_async, ProbeCpAsyncParams)

// exp[i] = exp_f32(x[i]), ln[i] = ln_f32(x[i]), rounded[i] = the bf16 pair (x[i], -x[i]). Any launch in x.
struct ProbeMathParams { const float* x; float* exp; float* ln; uint32_t* rounded; uint32_t count, unused; };
static_assert(sizeof(ProbeMathParams) == 40, "layout");

extern "C" __global__ void probe_math(const __grid_constant__ ProbeMathParams p) {
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += gridDim.x * blockDim.x) {
        p.exp[i] = exp_f32(p.x[i]);
        p.ln[i] = ln_f32(p.x[i]);
        p.rounded[i] = pack_bf16(p.x[i], -p.x[i]);
    }
}
EXPORT_KERNEL(probe_math, ProbeMathParams)

// Warp and block operations on x(128) u32; out: (17, 128) u32, rows as written below. sum += x; max = the
// largest 2^40 + x. 128 threads.
struct ProbeWarpParams { const uint32_t* x; uint32_t* out; uint32_t* sum; unsigned long long* max; };
static_assert(sizeof(ProbeWarpParams) == 32, "layout");

extern "C" __global__ void __launch_bounds__(128)
probe_warp(const __grid_constant__ ProbeWarpParams p) {
    __shared__ float scratch[32];
    __shared__ uint32_t handed[64];
    const uint32_t v = p.x[threadIdx.x];
    const int lane = threadIdx.x % 32;
    int row = 0;
    auto put = [&](uint32_t value) { p.out[row++ * 128 + threadIdx.x] = value; };
    put(__shfl_xor_sync(FULL_WARP, v, 5));                           // row 0
    put(__shfl_down_sync(FULL_WARP, v, 3));
    put(__shfl_up_sync(FULL_WARP, v, 3));
    put(__shfl_sync(FULL_WARP, v, (lane * 7 + 3) % 32));
    put(__shfl_down_sync(FULL_WARP, v, 3, 8));                       // row 4: segments of 8 lanes
    put(__ballot_sync(FULL_WARP, v & 1));
    put(__any_sync(FULL_WARP, v % 100 == 0) + 2 * __all_sync(FULL_WARP, v % 100 != 0));
    put(__reduce_add_sync(FULL_WARP, v));
    put(__reduce_max_sync(FULL_WARP, v));                            // row 8
    put(uint32_t(__reduce_min_sync(FULL_WARP, int32_t(v))));
    put(__syncthreads_count(v & 1));
    put(__float_as_uint(warp_sum(float(v % 1000))));
    put(__float_as_uint(warp_max(float(v % 1000))));                 // row 12
    put(__float_as_uint(block_sum(float(v % 1000), scratch)));
    put(__float_as_uint(block_sum(float(v % 77), scratch)));
    // Row 15: odd and even lanes apart.
    put(lane % 2 ? __shfl_xor_sync(0xaaaaaaaau, v, 2) : __shfl_xor_sync(0x55555555u, v, 4));
    // Warps 0 and 1 hand v over to warps 2 and 3: row 16 of these is the partner's v.
    if (threadIdx.x < 64) handed[threadIdx.x] = v;
    named_barrier(1 + threadIdx.x / 32 % 2, 64);                     // warps 0 and 2; 1 and 3
    put(threadIdx.x < 64 ? 0 : handed[threadIdx.x - 64]);
    atomicAdd(p.sum, v);
    atomicMax(p.max, (1ull << 40) + v);
}
EXPORT_KERNEL(probe_warp, ProbeWarpParams)

#if HAS_SM90A
// c(128,N) += a(128,k) * b(N,k)^T by wgmma; k = 64 * k_tiles. a: two row halves, each (k_tiles, 64, 64) tiles
// in the swizzled layout of weights; b: (k_tiles, N, 64) swizzled likewise; c row-major f32. Also probes
// mbarriers, bulk copies and register reallocation: one producer and two consumer warpgroups, a ring of two.
template <int N> struct WgmmaStage { bf16 a[2][64 * 64]; bf16 b[N * 64]; };   // 1024-byte multiples

template <int N, class Params> __device__ inline void wgmma_probe(const Params& p) {
    DYNAMIC_SMEM(WgmmaStage<N>, stages);
    uint64_t* full = reinterpret_cast<uint64_t*>(stages + 2);
    uint64_t* empty = full + 2;
    const int warpgroup = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2; s++) {
            mbarrier_init(full + s, 1);
            mbarrier_init(empty + s, 256);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (warpgroup == 2) {
        registers_lower<40>();
        if (threadIdx.x == 256)
            for (int kt = 0; kt < int(p.k_tiles); kt++) {
                const int s = kt % 2;
                mbarrier_wait(empty + s, (kt / 2 + 1) % 2);   // the first round passes
                mbarrier_arrive_expect(full + s, sizeof(WgmmaStage<N>));
                bulk_copy(stages[s].a[0], p.a + int64_t(kt) * 4096, 8192, full + s);
                bulk_copy(stages[s].a[1], p.a + int64_t(p.k_tiles + kt) * 4096, 8192, full + s);
                bulk_copy(stages[s].b, p.b + int64_t(kt) * N * 64, N * 128, full + s);
            }
        return;
    }
    registers_raise<232>();
    float d[N / 2];
    const int lane = threadIdx.x % 32, row = warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
    auto at = [&](int e) -> float& {
        return p.c[(row + e / 2 % 2 * 8) * N + e / 4 * 8 + lane % 4 * 2 + e % 2];
    };
    for (int e = 0; e < N / 2; e++) d[e] = at(e);
    for (int kt = 0; kt < int(p.k_tiles); kt++) {
        const int s = kt % 2;
        mbarrier_wait(full + s, kt / 2 % 2);
        const uint64_t a = wgmma_descriptor(stages[s].a[warpgroup]), b = wgmma_descriptor(stages[s].b);
        wgmma_complete(d);
        wgmma_fence();
        for (int k = 0; k < 4; k++) wgmma_m64k16<N>(d, wgmma_advance(a, 32 * k), wgmma_advance(b, 32 * k));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_complete(d);
        mbarrier_arrive(empty + s);
    }
    for (int e = 0; e < N / 2; e++) at(e) = d[e];
}
#endif

// 384 threads; dynamic shared memory 2 * (16384 + 128 N) + 32 bytes. On a GPU below sm_90a these do nothing.
struct ProbeWgmmaParams { const bf16* a; const bf16* b; float* c; uint32_t k_tiles, unused; };
static_assert(sizeof(ProbeWgmmaParams) == 32, "layout");

#if HAS_SM90A
#define WGMMA_PROBE(N) wgmma_probe<N>(p)
#else
#define WGMMA_PROBE(N) (void)p
#endif
extern "C" __global__ void __launch_bounds__(384, 1)
probe_wgmma_8(const __grid_constant__ ProbeWgmmaParams p) {
    WGMMA_PROBE(8);
}
EXPORT_KERNEL(probe_wgmma_8, ProbeWgmmaParams)
extern "C" __global__ void __launch_bounds__(384, 1)
probe_wgmma_16(const __grid_constant__ ProbeWgmmaParams p) {
    WGMMA_PROBE(16);
}
EXPORT_KERNEL(probe_wgmma_16, ProbeWgmmaParams)
extern "C" __global__ void __launch_bounds__(384, 1)
probe_wgmma_32(const __grid_constant__ ProbeWgmmaParams p) {
    WGMMA_PROBE(32);
}
EXPORT_KERNEL(probe_wgmma_32, ProbeWgmmaParams)
extern "C" __global__ void __launch_bounds__(384, 1)
probe_wgmma_64(const __grid_constant__ ProbeWgmmaParams p) {
    WGMMA_PROBE(64);
}
EXPORT_KERNEL(probe_wgmma_64, ProbeWgmmaParams)
extern "C" __global__ void __launch_bounds__(384, 1)
probe_wgmma_128(const __grid_constant__ ProbeWgmmaParams p) {
    WGMMA_PROBE(128);
}
EXPORT_KERNEL(probe_wgmma_128, ProbeWgmmaParams)
extern "C" __global__ void __launch_bounds__(384, 1)
probe_wgmma_256(const __grid_constant__ ProbeWgmmaParams p) {
    WGMMA_PROBE(256);
}
EXPORT_KERNEL(probe_wgmma_256, ProbeWgmmaParams)
