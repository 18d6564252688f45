// Runs CUDA kernels on a CPU (x86-64, GCC or Clang): one fibre per CUDA thread, the blocks of a grid one
// after another on the calling OS thread. Several OS threads may launch at once: all state is theirs.
// A barrier or a collective suspends a fibre until its last participant arrives; asynchronous copies
// and wgmma happen as late as the rules allow, and their destinations are NaN until then.
// SHIM_ORDER=reverse or =SEED (or shim_order) runs threads and blocks in another order: a result that
// changes with it means a missing barrier.
#pragma once
#if !defined(__x86_64__)
#error "the shim switches stacks with x86-64 assembly"
#endif
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>
#include "cuda_types.h"
#pragma GCC diagnostic ignored "-Wunknown-pragmas"   // #pragma unroll (GCC 12 also needs the flag)

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __restrict__             // threads of a block do see each other's writes
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Kept between blocks and launches, so it can't be poisoned: prefer DYNAMIC_SMEM, which is.
#define __shared__ static thread_local

// __thread, not thread_local: no initialisation check at each use.
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// The order of this OS thread's launches: "forward", "reverse", a seed, or null for that of SHIM_ORDER.
extern "C" void shim_order(const char* order);

namespace shim {
struct Where { const char* file; int line; };

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void launch(const char* kernel, const unsigned grid[3], const unsigned block[3], size_t smem,
            void (*body)(const void*), const void* params);
int  block_barrier(bool predicate, Where);   // how many threads had a true predicate
void named_barrier(int id, int threads, Where);

// The lanes of `mask` meet; the last to arrive calls run(lanes, active, context) once, with lanes[l] =
// lane l's `mine` for the lanes in `active` (those of the mask that have not exited). `context` names
// the operation: only lanes with the same one meet.
using Context = void (*)();
void warp_collective(unsigned mask, void* mine, void (*run)(void* const* lanes, unsigned active, Context),
                     Context context, const char* what, Where);
template <class Arg>
void collective(const char* what, Where where, unsigned mask, Arg& mine, void (*run)(Arg* const*, unsigned)) {
    warp_collective(mask, &mine, [](void* const* lanes, unsigned active, Context context) {
        auto typed = reinterpret_cast<void (*)(Arg* const*, unsigned)>(context);
        typed(reinterpret_cast<Arg* const*>(lanes), active);
    }, reinterpret_cast<Context>(run), what, where);
}
// A collective that takes the whole warp, as mma and ldmatrix do.
template <class Arg> void warp_operation(const char* what, Where where, Arg& mine, void (*run)(Arg* const*)) {
    warp_collective(0xffffffffu, &mine, [](void* const* lanes, unsigned active, Context context) {
        if (active != 0xffffffffu) fail("a warp operation that takes 32 lanes has %08x", active);
        reinterpret_cast<void (*)(Arg* const*)>(context)(reinterpret_cast<Arg* const*>(lanes));
    }, reinterpret_cast<Context>(run), what, where);
}
// d(n)[m] += sum over k of a(k)[m] * b(n)[k], in ascending order of k (16 of them), rounded after each
// step. The arrays are aligned to 16 bytes.
void multiply_add(float (*d)[16], const float (*a)[16], const float (*b)[16], int n);

void* dynamic_smem();
void copy_async(void* to, const void* from, bool valid);
void copy_commit();
void copy_wait(unsigned groups_left);
void mbarrier_init(uint64_t* bar, unsigned count);
void mbarrier_arrive(uint64_t* bar, unsigned expect_bytes);
void mbarrier_wait(uint64_t* bar, unsigned parity, Where);
void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* bar);
unsigned smem_address(const void* p);   // as the GPU's 32-bit addresses: dynamic shared memory from 1024
void wgmma_fence();
void wgmma_issue(int n, float* d, uint64_t a, uint64_t b, Where);
void wgmma_commit();
void wgmma_wait(unsigned groups_left, Where);
void wgmma_check_complete(const float* d, int count);

// Value of the lane that `source` names; bits of ones (NaN) where that lane takes no part.
enum class ShuffleKind { Index, Xor, Down, Up };
template <class T> struct Shuffle { T value; int source; ShuffleKind kind; };
template <class T> T shuffle(ShuffleKind kind, unsigned mask, T v, int source, Where where) {
    static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "shuffle type");
    Shuffle<T> mine{v, source, kind};
    collective<Shuffle<T>>("a shuffle", where, mask, mine, [](Shuffle<T>* const* lanes, unsigned active) {
        const ShuffleKind all_kind = lanes[__builtin_ctz(active)]->kind;
        T all[32];
        memset(static_cast<void*>(all), 0xff, sizeof all);
        for (int l = 0; l < 32; l++) {
            if (!(active >> l & 1)) continue;
            if (lanes[l]->kind != all_kind) fail("lanes meet in different shuffles");
            all[l] = lanes[l]->value;
        }
        for (int l = 0; l < 32; l++) if (active >> l & 1) lanes[l]->value = all[lanes[l]->source];
    });
    return mine.value;
}
inline int lane() { return int((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32); }

// One word from each lane, combined; every lane gets the result.
template <class T> using Combine = T (*)(T, T);
template <class T> struct Reduction { T value; Combine<T> combine; };
template <class T> T reduce(unsigned mask, T v, Combine<T> combine, Where where) {
    Reduction<T> mine{v, combine};
    using Lanes = Reduction<T>* const*;
    collective<Reduction<T>>("a reduction", where, mask, mine, [](Lanes lanes, unsigned active) {
        const int first = __builtin_ctz(active);
        T total = lanes[first]->value;
        for (int l = first + 1; l < 32; l++) {
            if (!(active >> l & 1)) continue;
            if (lanes[l]->combine != lanes[first]->combine) fail("lanes meet in different reductions");
            total = lanes[l]->combine(total, lanes[l]->value);
        }
        for (int l = 0; l < 32; l++) if (active >> l & 1) lanes[l]->value = total;
    });
    return mine.value;
}
}  // namespace shim

// Trailing parameter that tells the shim the caller's line.
#define WHERE , const char* file = __builtin_FILE(), int line = __builtin_LINE()
#define SHIM_WHERE const char* file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SHIM_WHERE) { shim::block_barrier(false, {file, line}); }
inline int __syncthreads_count(int p WHERE) { return shim::block_barrier(p != 0, {file, line}); }
inline int __syncthreads_or(int p WHERE) { return shim::block_barrier(p != 0, {file, line}) != 0; }
inline int __syncthreads_and(int p WHERE) { return shim::block_barrier(p == 0, {file, line}) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu WHERE) {
    char none = 0;
    shim::collective<char>("__syncwarp", {file, line}, mask, none, [](char* const*, unsigned) {});
}

// The four shuffles of CUDA; a source outside the lane's segment of `width` lanes is the lane itself.
template <class T> T __shfl_sync(unsigned mask, T v, int source, int width = 32 WHERE) {
    const int base = shim::lane() & -width;
    return shim::shuffle(shim::ShuffleKind::Index, mask, v, base + (source & (width - 1)), {file, line});
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32 WHERE) {
    const int own = shim::lane(), end = (own & -width) + width, from = own ^ lanes;
    return shim::shuffle(shim::ShuffleKind::Xor, mask, v, from < end ? from : own, {file, line});
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32 WHERE) {
    const int own = shim::lane(), end = (own & -width) + width, from = own + int(delta);
    return shim::shuffle(shim::ShuffleKind::Down, mask, v, from < end ? from : own, {file, line});
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32 WHERE) {
    const int own = shim::lane(), from = own - int(delta);
    return shim::shuffle(shim::ShuffleKind::Up, mask, v, from >= (own & -width) ? from : own, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate WHERE) {
    return shim::reduce<unsigned>(mask, unsigned(predicate != 0) << shim::lane(),
                                  [](unsigned a, unsigned b) { return a | b; }, {file, line});
}
inline int __any_sync(unsigned mask, int predicate WHERE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate WHERE) {
    return __ballot_sync(mask, !predicate, file, line) == 0;
}
#define SHIM_REDUCE(name, T, expression)                                                          \
    inline T __reduce_##name##_sync(unsigned mask, T v WHERE) {                                   \
        return shim::reduce<T>(mask, v, [](T a, T b) -> T { return expression; }, {file, line});  \
    }
SHIM_REDUCE(add, unsigned, a + b)
SHIM_REDUCE(add, int, int(unsigned(a) + unsigned(b)))
SHIM_REDUCE(min, unsigned, min(a, b))
SHIM_REDUCE(min, int, min(a, b))
SHIM_REDUCE(max, unsigned, max(a, b))
SHIM_REDUCE(max, int, max(a, b))
SHIM_REDUCE(and, unsigned, a & b)
SHIM_REDUCE(or, unsigned, a | b)
SHIM_REDUCE(xor, unsigned, a ^ b)
#undef SHIM_REDUCE

// Plain memory operations: only one thread of a launch runs at a time. Integers only, since the order
// of floating-point atomics is not fixed.
#define SHIM_ATOMIC(name, expression)                                                             \
    template <class T> T name(T* at, typename std::common_type<T>::type v) {                      \
        static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "integer atomics of 32 or 64 bits"); \
        const T old = *at;                                                                        \
        *at = T(expression);                                                                      \
        return old;                                                                               \
    }
SHIM_ATOMIC(atomicAdd, old + v)
SHIM_ATOMIC(atomicSub, old - v)
SHIM_ATOMIC(atomicMax, v > old ? v : old)
SHIM_ATOMIC(atomicMin, v < old ? v : old)
SHIM_ATOMIC(atomicAnd, old & v)
SHIM_ATOMIC(atomicOr, old | v)
SHIM_ATOMIC(atomicXor, old ^ v)
SHIM_ATOMIC(atomicExch, (void(old), v))
#undef SHIM_ATOMIC
template <class T>
T atomicCAS(T* at, typename std::common_type<T>::type compare, typename std::common_type<T>::type v) {
    static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "integer atomics of 32 or 64 bits");
    const T old = *at;
    if (old == compare) *at = v;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { shim::fail("__trap"); }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, typename std::common_type<T>::type v) { *p = v; }

#define DYNAMIC_SMEM(T, name) T* name = static_cast<T*>(shim::dynamic_smem())
#define EXPORT_KERNEL(kernel, Params)                                                             \
    extern "C" void host_##kernel(const unsigned grid[3], const unsigned block[3], size_t smem,   \
                                  const Params* p) {                                              \
        shim::launch(#kernel, grid, block, smem,                                                  \
                     [](const void* params) { kernel(*static_cast<const Params*>(params)); }, p); \
    }
