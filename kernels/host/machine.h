// The state of one OS thread's launches: fibres, warps, barriers, copies in flight. For shim.cpp and async.h.
#pragma once
#include "shim.h"
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SHIM_ASAN 1
#endif
#endif
#if defined(SHIM_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size) (void(at), void(size))
#define ASAN_UNPOISON_MEMORY_REGION(at, size) (void(at), void(size))
#endif

namespace shim {
namespace {
constexpr size_t GUARD = 4096;   // an unreadable page under each stack
#if defined(SHIM_ASAN)
constexpr size_t STACK = 512 << 10;
#else
constexpr size_t STACK = 128 << 10;
#endif
constexpr unsigned MAX_THREADS = 1024;
constexpr size_t MAX_SMEM = 227 << 10;      // dynamic shared memory of a block on Hopper
constexpr unsigned SMEM_BASE = 1024;        // its address; the GPU keeps what is below to itself
constexpr size_t CANARY = 256;              // bytes after it that must stay as they are
constexpr size_t SMEM_WINDOW = (SMEM_BASE + MAX_SMEM + CANARY + 2047) / 2048 * 2048;
constexpr unsigned ALL = 0xffffffffu;

enum class Wait { Nothing, Block, Warp, Mbarrier };

struct Copy { void* to; const void* from; unsigned group; };   // 16 bytes; from null: zeros

struct alignas(64) Fiber {
    void* sp;
    uint3 id;
    Wait wait;
    const char* what;   // what it waits for, and where, for messages
    Where where;
    const uint64_t* mbarrier;
    bool fenced;                     // wgmma_fence since the last wait
    std::vector<Copy> copies;        // cp.async not yet performed, from `copies_done` on
    size_t copies_done;
    unsigned copy_groups;
    void* fake_stack;                // AddressSanitizer's
};

struct Collective { void (*run)(void* const*, unsigned, Context); Context context; unsigned mask, arrived; };

// An accumulator of a warp between issue and wait: 16 rows of column n, for each n.
struct Accumulator { int n; unsigned uses; float* d[32]; alignas(16) float tile[256][16]; };
struct Wgmma { int n; uint64_t a, b, hash; unsigned group; size_t accumulator; };

struct Warp {
    unsigned live, ready;            // lanes
    void* args[32];
    std::vector<Collective> pending;
    std::vector<Wgmma> issued;       // in flight; lane l has issued the first lane_issued[l]
    unsigned lane_issued[32], lane_groups[32];
    size_t performed;                // before those in flight
    std::vector<std::unique_ptr<Accumulator>> accumulators;
};

struct Barrier { unsigned arrived, expected; Where where; unsigned lanes[MAX_THREADS / 32]; };
struct BulkCopy { void* to; const void* from; unsigned bytes; uint64_t* bar; };

enum class Order { Forward, Reverse, Random };

struct Machine {
    const char* kernel = "";
    void (*body)(const void*) = nullptr;
    const void* params = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned threads = 0, live = 0, current = 0;
    unsigned ready_warps = 0;                // warps with a ready lane
    int predicates = 0, next_predicates = 0; // of the last __syncthreads_count, of the one being gathered
    Barrier barriers[16] = {};
    std::vector<BulkCopy> bulk;              // not yet performed
    std::vector<Wgmma> warpgroup_log[MAX_THREADS / 128];   // what the first warp to get there issued
    Order order = Order::Forward;
    std::minstd_rand random;
    char* stacks = nullptr;
    size_t stacks_mapped = 0;
    char* smem = nullptr;                    // window: address 0 of shared memory
    size_t smem_size = 0;
    void *main_sp = nullptr, *main_fake_stack = nullptr;
    const void* main_stack = nullptr;
    size_t main_stack_size = 0;

    Machine();
    ~Machine();
};

__thread Machine* machine;   // of this OS thread

Fiber& self() { return machine->fibers[machine->current]; }

void set_ready(Machine& m, unsigned warp, unsigned lanes) {
    m.warps[warp].ready |= lanes;
    m.ready_warps |= 1u << warp;
}

void block(Wait wait, const char* what, Where where);   // suspends the running fibre until it is made ready
void perform_bulk(Machine& m, size_t index);
void print_mbarrier(const uint64_t* bar);
}  // namespace
}  // namespace shim
