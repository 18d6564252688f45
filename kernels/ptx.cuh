// Each PTX instruction we use, once, behind a plain function. The host body is its specification.
#pragma once
#include "device.cuh"

// 1 where the Hopper instructions in the second half of this file exist: sm_90a code and the shim.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_SM90A 1
#else
#define HAS_SM90A 0
#endif

#if defined(__CUDACC__)
// 32-bit address of shared memory, as the instructions take it.
__device__ inline unsigned smem_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }
#endif

// ---- Hints.

// Brings the line of an address to the L2 cache.
__device__ inline void prefetch_l2(const void* global) {
#if defined(__CUDACC__)
    asm volatile("prefetch.global.L2 [%0];" :: "l"(__cvta_generic_to_global(global)));
#else
    (void)global;
#endif
}

// ---- Approximations that the multi-function unit makes, for what is rounded to bf16 next. The processor is
// a little nearer to the truth, so it has other bits.

// e^x, within 2^-21 (1 + |x|) of it; 1 at 0, 0 far below.
__device__ inline float exp_approx(float x) {
#if defined(__CUDACC__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896340736f));
    return y;
#else
    return expf(x);
#endif
}
// x / y, within 2 ulp; 0 where |y| is 2^126 or more.
__device__ inline float divide_approx(float x, float y) {
#if defined(__CUDACC__)
    float quotient;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(y));
    return quotient;
#else
    return x / y;
#endif
}

// ---- Matrix fragments: g = lane / 4, q = lane % 4, two bf16 per register, lower index in the low half.

// D(16,8) += A(16,16) * B(16,8), bf16 in, f32 accumulate.
//   a[0..3]: rows g, g+8, g, g+8; columns 2q, 2q, 2q+8, 2q+8 (and the next)
//   b[0..1]: rows 2q, 2q+8 (and the next); column g
//   d[0..3]: rows g, g, g+8, g+8; columns 2q, 2q+1, 2q, 2q+1
__device__ inline void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2] WHERE) {
#if defined(__CUDACC__)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    struct Fragment { float* d; const uint32_t *a, *b; } mine{d, a, b};
    shim::warp_operation<Fragment>("mma_m16n8k16", {file, line}, mine, [](Fragment* const* lanes) {
        alignas(16) float D[8][16], A[16][16], B[8][16];   // D (column, row), A (k, row), B (column, k)
        for (int l = 0; l < 32; l++) {
            const Fragment& f = *lanes[l];
            const int g = l / 4, q = l % 4;
            for (int i = 0; i < 4; i++) {
                const int row = g + 8 * (i % 2), k = 2 * q + 8 * (i / 2);
                A[k][row] = low_bf16(f.a[i]);
                A[k + 1][row] = high_bf16(f.a[i]);
            }
            for (int i = 0; i < 2; i++) {
                B[g][2 * q + 8 * i] = low_bf16(f.b[i]);
                B[g][2 * q + 8 * i + 1] = high_bf16(f.b[i]);
            }
            for (int i = 0; i < 4; i++) D[2 * q + i % 2][g + 8 * (i / 2)] = f.d[i];
        }
        shim::multiply_add(D, A, B, 8);
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) lanes[l]->d[i] = D[2 * (l % 4) + i % 2][l / 4 + 8 * (i / 2)];
    });
#endif
}

#if !defined(__CUDACC__)
namespace shim {
// `matrices` 8x8 matrices of 16-bit elements. Lane 8i + j passes the address of row j of matrix i (16
// bytes, aligned); register i of a lane gets elements (g, 2q) and (g, 2q+1) of matrix i, of its transpose
// if asked.
template <int matrices, bool transposed> void load_matrices(uint32_t* r, const void* row, Where where) {
    struct Load { uint32_t* r; const void* row; } mine{r, row};
    warp_operation<Load>("ldmatrix", where, mine, [](Load* const* lanes) {
        for (int i = 0; i < matrices; i++) {
            uint16_t m[8][8];
            for (int j = 0; j < 8; j++) {
                const void* source = lanes[8 * i + j]->row;
                if (reinterpret_cast<uintptr_t>(source) % 16)
                    fail("ldmatrix: lane %d's row is not 16-byte aligned", 8 * i + j);
                memcpy(m[j], source, 16);
            }
            for (int l = 0; l < 32; l++) {
                const int g = l / 4, q = l % 4;
                const uint16_t low = transposed ? m[2 * q][g] : m[g][2 * q];
                const uint16_t high = transposed ? m[2 * q + 1][g] : m[g][2 * q + 1];
                lanes[l]->r[i] = low | uint32_t(high) << 16;
            }
        }
    });
}
}  // namespace shim
#endif

// Matrix i's rows are addressed by lanes 8i..8i+7 (x2: lanes 16..31 pass any address).
__device__ inline void ldmatrix_x4(uint32_t r[4], const void* smem_row WHERE) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address(smem_row)) : "memory");
#else
    shim::load_matrices<4, false>(r, smem_row, {file, line});
#endif
}
__device__ inline void ldmatrix_x4_trans(uint32_t r[4], const void* smem_row WHERE) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem_address(smem_row)) : "memory");
#else
    shim::load_matrices<4, true>(r, smem_row, {file, line});
#endif
}
__device__ inline void ldmatrix_x2(uint32_t r[2], const void* smem_row WHERE) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(smem_address(smem_row)) : "memory");
#else
    shim::load_matrices<2, false>(r, smem_row, {file, line});
#endif
}
__device__ inline void ldmatrix_x2_trans(uint32_t r[2], const void* smem_row WHERE) {
#if defined(__CUDACC__)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(smem_address(smem_row)) : "memory");
#else
    shim::load_matrices<2, true>(r, smem_row, {file, line});
#endif
}

// ---- Asynchronous copies of a thread (Ampere). The destination is undefined until the copying thread
// has waited for the copy's group; other threads need a barrier after that.

// 16 bytes, both sides aligned to 16. Not valid: the destination becomes zero, the source is not read.
__device__ inline void cp_async_16(void* smem, const void* global, bool valid) {
#if defined(__CUDACC__)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(smem_address(smem)), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
#else
    shim::copy_async(smem, global, valid);
#endif
}
// Closes a group of the copies issued since the last one (it may be empty).
__device__ inline void cp_async_commit() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    shim::copy_commit();
#endif
}
// Returns when at most N groups, the latest, are still in flight.
template <int N> __device__ inline void cp_async_wait() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#else
    shim::copy_wait(N);
#endif
}

// Barrier of `threads` threads of the block (whole warps). id 1..15; 0 is __syncthreads.
__device__ inline void named_barrier(int id, int threads WHERE) {
#if defined(__CUDACC__)
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
#else
    shim::named_barrier(id, threads, {file, line});
#endif
}

#if HAS_SM90A
// ---- mbarrier: counts arrivals, and bytes of bulk copies, of one phase after another. A phase is
// complete when `count` arrivals have come and the expected bytes too; then the next begins. The first
// phase has parity 0, the next 1, then 0, ...

// One thread initialises, then mbarrier_init_fence(), then __syncthreads() before anyone else's use.
__device__ inline void mbarrier_init(uint64_t* bar, unsigned count) {
#if defined(__CUDACC__)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(smem_address(bar)), "r"(count) : "memory");
#else
    shim::mbarrier_init(bar, count);
#endif
}
// Makes initialised barriers visible to bulk copies, which use the async proxy.
__device__ inline void mbarrier_init_fence() {
#if defined(__CUDACC__)
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ inline void mbarrier_arrive(uint64_t* bar) {
#if defined(__CUDACC__)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem_address(bar)) : "memory");
#else
    shim::mbarrier_arrive(bar, 0);
#endif
}
// One arrival that also makes the current phase wait for `bytes` bytes of bulk copies.
__device__ inline void mbarrier_arrive_expect(uint64_t* bar, unsigned bytes) {
#if defined(__CUDACC__)
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(smem_address(bar)), "r"(bytes) : "memory");
#else
    shim::mbarrier_arrive(bar, bytes);
#endif
}
// Returns when the phase of this parity is complete, that is when the current phase has the other one
// (so parity 1 passes at once on a fresh barrier).
__device__ inline void mbarrier_wait(uint64_t* bar, unsigned parity WHERE) {
#if defined(__CUDACC__)
    unsigned complete;
    do {
        asm volatile("{\n\t.reg .pred p;\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                     "selp.u32 %0, 1, 0, p;\n\t}"
                     : "=r"(complete) : "r"(smem_address(bar)), "r"(parity) : "memory");
    } while (!complete);
#else
    shim::mbarrier_wait(bar, parity, {file, line});
#endif
}
// Copies `bytes` (a multiple of 16; both sides aligned to 16) and counts them towards the current phase of
// bar. Called by one thread. The destination is undefined until that phase is complete.
__device__ inline void bulk_copy(void* smem, const void* global, unsigned bytes, uint64_t* bar) {
#if defined(__CUDACC__)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(smem_address(smem)), "l"(__cvta_generic_to_global(global)), "r"(bytes),
                    "r"(smem_address(bar)) : "memory");
#else
    shim::bulk_copy(smem, global, bytes, bar);
#endif
}
// ---- wgmma: a warpgroup (4 warps, the first's index a multiple of 4) multiplies from shared memory.

// Describes a K-major operand at `smem`: 8-row groups of 1024 bytes, rows of 128 bytes (64 k of bf16), the
// 16-byte chunk c of row r at c ^ (r % 8). Tiles are aligned to 1024; the slice of 16 k at k0 starts 2 * k0
// bytes after the tile (the hardware swizzles the address bits).
// Bits 0-13 address / 16; 16-29 leading offset / 16 (unused with a swizzle: 1); 32-45 stride between
// 8-row groups / 16; 62-63 = 1: swizzle of 128 bytes.
__device__ inline uint64_t wgmma_descriptor(const void* smem) {
#if !defined(__CUDACC__)
    using shim::smem_address;
#endif
    return uint64_t((smem_address(smem) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}
// The descriptor of what lies `bytes` (a multiple of 16) further.
__device__ inline uint64_t wgmma_advance(uint64_t descriptor, unsigned bytes) {
    return descriptor + (bytes >> 4);
}

// Before the first wgmma, and after the accumulators were touched by anything else.
__device__ inline void wgmma_fence() {
#if defined(__CUDACC__)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    shim::wgmma_fence();
#endif
}
// Closes a group of the wgmmas issued since the last one.
__device__ inline void wgmma_commit() {
#if defined(__CUDACC__)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    shim::wgmma_commit();
#endif
}
// Returns when at most N groups, the latest, are in flight; the accumulators of the others can be read and
// the operands overwritten as far as this warp is concerned (the other warps of the group may be behind).
template <int N> __device__ inline void wgmma_wait() {
#if defined(__CUDACC__)
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
#else
    shim::wgmma_wait(N, {__FILE__, __LINE__});
#endif
}
// Keeps the compiler from moving uses of d across this point. Goes after the wgmma_wait that completes d and
// before the wgmma_fence that hands d over; d must not be in flight.
template <int COUNT> __device__ inline void wgmma_complete(float (&d)[COUNT]) {
#if defined(__CUDACC__)
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i]) :: "memory");
#else
    shim::wgmma_check_complete(d, COUNT);
#endif
}

#if defined(__CUDACC__)
// The text of N/2 registers "%0, %1, ...", the operands that go with them, and the instruction.
#define TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define REGISTERS_4 "%0,%1,%2,%3"
#define REGISTERS_8 REGISTERS_4 ",%4,%5,%6,%7"
#define REGISTERS_16 TEN() "%10,%11,%12,%13,%14,%15"
#define REGISTERS_32 TEN() TEN(1) TEN(2) "%30,%31"
#define REGISTERS_64 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60,%61,%62,%63"
#define REGISTERS_128 TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) \
    "%120,%121,%122,%123,%124,%125,%126,%127"
#define INOUT_4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define INOUT_8(i) INOUT_4(i), INOUT_4((i) + 4)
#define INOUT_16(i) INOUT_8(i), INOUT_8((i) + 8)
#define INOUT_32(i) INOUT_16(i), INOUT_16((i) + 16)
#define INOUT_64(i) INOUT_32(i), INOUT_32((i) + 32)
#define INOUT_128(i) INOUT_64(i), INOUT_64((i) + 64)
// Scale-d is a predicate (true: accumulate); then scale-a, scale-b = 1 and no transposition.
#define WGMMA(n, count, a_operand, b_operand)                                                            \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.eq.u32 p, 0, 0;\n\t"                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" REGISTERS_##count "}, "    \
                 a_operand ", " b_operand ", p, 1, 1, 0, 0;\n\t}"                                        \
                 : INOUT_##count(0) : "l"(a), "l"(b))
#endif

// D(64,N) += A(64,16) * B(N,16)^T, bf16 from shared memory, f32 accumulate; N = 8, 16, 32, 64, 128 or 256.
// Asynchronous: d is undefined, and A and B must not change, until its group has been waited for.
//   d[4j..4j+3]: rows g, g, g+8, g+8 of the 16 rows of the warp (16 * (warp % 4)); columns 8j + 2q, 2q+1
template <int N>
__device__ inline void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b WHERE) {
    static_assert(N == 8 || N == 16 || N == 32 || N == 64 || N == 128 || N == 256, "wgmma N");
#if defined(__CUDACC__)
    if constexpr (N == 8) WGMMA(8, 4, "%4", "%5");
    if constexpr (N == 16) WGMMA(16, 8, "%8", "%9");
    if constexpr (N == 32) WGMMA(32, 16, "%16", "%17");
    if constexpr (N == 64) WGMMA(64, 32, "%32", "%33");
    if constexpr (N == 128) WGMMA(128, 64, "%64", "%65");
    if constexpr (N == 256) WGMMA(256, 128, "%128", "%129");
#else
    shim::wgmma_issue(N, d, a, b, {file, line});
#endif
}

// Sets the registers per thread of a whole warpgroup; R is a multiple of 8 in 24..256.
template <int R> __device__ inline void registers_raise() {
    static_assert(R >= 24 && R <= 256 && R % 8 == 0, "registers per thread");
#if defined(__CUDACC__)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(R));
#endif
}
template <int R> __device__ inline void registers_lower() {
    static_assert(R >= 24 && R <= 256 && R % 8 == 0, "registers per thread");
#if defined(__CUDACC__)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(R));
#endif
}
#endif  // HAS_SM90A
