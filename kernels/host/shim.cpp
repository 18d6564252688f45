// See shim.h. The fibres and their scheduler, barriers, collectives and the launch.
#include "machine.h"
#include <stdarg.h>
#include <sys/mman.h>
#include <algorithm>

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

// shim_switch_stack(&from, to): save the callee-saved registers and stack pointer, resume the other side.
asm(R"(.pushsection .text
.globl shim_switch_stack
.hidden shim_switch_stack
.type shim_switch_stack, @function
shim_switch_stack:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
.size shim_switch_stack, .-shim_switch_stack
.popsection
)");
extern "C" void shim_switch_stack(void** from, void* to);

namespace shim {
namespace {
char* stack_of(const Machine& m, unsigned thread) { return m.stacks + thread * (STACK + GUARD) + GUARD; }

// ---- Fibres ----

[[noreturn]] void report_deadlock(Machine& m) {
    fprintf(stderr, "shim: %s: block (%u,%u,%u): deadlock: all live threads wait\n", m.kernel, blockIdx.x,
            blockIdx.y, blockIdx.z);
    const Fiber* last = nullptr;
    for (unsigned t = 0; t < m.threads; t++) {
        const Fiber& f = m.fibers[t];
        const bool as_last = last && last->what == f.what && last->where.line == f.where.line &&
                             last->mbarrier == f.mbarrier;
        if (f.wait == Wait::Nothing || as_last) continue;
        fprintf(stderr, "  from thread %u: %s at %s:%d", t, f.what, f.where.file, f.where.line);
        if (f.mbarrier) print_mbarrier(f.mbarrier);
        fprintf(stderr, "\n");
        last = &f;
    }
    fflush(stderr);
    abort();
}

// The ready thread that runs next: lanes of the same warp first, so that warps run as far as they can on
// their own; in random order any.
unsigned pick(Machine& m) {
    while (!m.ready_warps) {   // nothing else can happen: an asynchronous copy arrives
        if (m.bulk.empty()) report_deadlock(m);
        perform_bulk(m, m.order == Order::Random ? m.random() % m.bulk.size() : 0);
    }
    unsigned w = m.current / 32, lane = m.current % 32;
    auto next = [&m](unsigned set, unsigned after) {   // cyclic, in the launch's direction
        const unsigned ahead = set & (m.order == Order::Reverse ? (1u << after) - 1 : ~1u << after);
        set = ahead ? ahead : set;
        return unsigned(m.order == Order::Reverse ? 31 - __builtin_clz(set) : __builtin_ctz(set));
    };
    if (m.order == Order::Random) {
        w = next(m.ready_warps, m.random() % 32);
        lane = next(m.warps[w].ready, m.random() % 32);
    } else {
        if (!m.warps[w].ready) {
            w = next(m.ready_warps, w);
            lane = m.order == Order::Reverse ? 0 : 31;   // start at the far end: the next is the first
        }
        lane = next(m.warps[w].ready, lane);
    }
    Warp& warp = m.warps[w];
    warp.ready &= ~(1u << lane);
    if (!warp.ready) m.ready_warps &= ~(1u << w);
    return w * 32 + lane;
}

// Leaves the running fibre (dying: for good) for the next ready one.
void switch_away(Machine& m, bool dying) {
    const unsigned from = m.current, to = pick(m);
    if (to == from) return;
    m.current = to;
    threadIdx = m.fibers[to].id;
#if defined(SHIM_ASAN)
    __sanitizer_start_switch_fiber(dying ? nullptr : &m.fibers[from].fake_stack, stack_of(m, to), STACK);
#else
    (void)dying;
#endif
    shim_switch_stack(&m.fibers[from].sp, m.fibers[to].sp);
#if defined(SHIM_ASAN)
    __sanitizer_finish_switch_fiber(m.fibers[from].fake_stack, nullptr, nullptr);
#endif
}

void block(Wait wait, const char* what, Where where) {
    Machine& m = *machine;
    Fiber& f = m.fibers[m.current];
    f.wait = wait;
    f.what = what;
    f.where = where;
    switch_away(m, false);
    f.wait = Wait::Nothing;
}

// The last to arrive goes on; in random order, anyone.
void completed(Machine& m) {
    if (m.order != Order::Random) return;
    set_ready(m, m.current / 32, 1u << m.current % 32);
    switch_away(m, false);
}

void thread_exit(Machine& m);

__attribute__((no_sanitize("address"))) void entry() {
    Machine& m = *machine;
#if defined(SHIM_ASAN)
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    if (!m.main_stack) m.main_stack = stack, m.main_stack_size = size;   // the first fibre: from launch
#endif
    m.body(m.params);
    thread_exit(m);
    if (m.live) {
        switch_away(m, true);
    } else {
#if defined(SHIM_ASAN)
        __sanitizer_start_switch_fiber(nullptr, m.main_stack, m.main_stack_size);
#endif
        void* unused;
        shim_switch_stack(&unused, m.main_sp);
    }
    __builtin_unreachable();
}

void release_stacks(Machine& m) {
    if (!m.stacks) return;
    ASAN_UNPOISON_MEMORY_REGION(m.stacks, m.stacks_mapped * (STACK + GUARD));
    munmap(m.stacks, m.stacks_mapped * (STACK + GUARD));
}

void map_stacks(Machine& m, unsigned threads) {
    if (threads <= m.stacks_mapped) return;
    release_stacks(m);
    const size_t stride = STACK + GUARD;
    void* at = mmap(nullptr, threads * stride, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (at == MAP_FAILED) fail("no memory for %u stacks", threads);
    m.stacks = static_cast<char*>(at);
    m.stacks_mapped = threads;
    for (unsigned t = 0; t < threads; t++)
        if (mprotect(m.stacks + t * stride, GUARD, PROT_NONE)) fail("can't guard a stack");
}

void start(Machine& m, unsigned thread) {
    Fiber& f = m.fibers[thread];
    // Tops at different offsets within a page, or the hot frames of all fibres share cache sets.
    char* top = stack_of(m, thread) + STACK - thread * 5 % 64 * 64;
    ASAN_UNPOISON_MEMORY_REGION(top - 1024, 1024);   // what entry's last run left
    auto* sp = reinterpret_cast<void**>(top) - 2;    // keeps rsp % 16 == 8 on entry, as after a call
    *sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.sp = sp;
    f.wait = Wait::Nothing;
    f.mbarrier = nullptr;
    f.copies.clear();
    f.copies_done = f.copy_groups = 0;
    f.fenced = false;
    f.fake_stack = nullptr;
}
}  // namespace

Machine::Machine() {
    smem = static_cast<char*>(aligned_alloc(2048, SMEM_WINDOW));   // at SMEM_BASE aligned to 1024, no more
    if (!smem) fail("no memory");
}

Machine::~Machine() {
    release_stacks(*this);
    ASAN_UNPOISON_MEMORY_REGION(smem, SMEM_WINDOW);
    free(smem);
}

void* dynamic_smem() { return machine->smem + SMEM_BASE; }

void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "shim: %s: block (%u,%u,%u) thread (%u,%u,%u): ", machine ? machine->kernel : "",
            blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    fflush(stderr);
    abort();
}

// ---- Barriers ----
namespace {
void release(Machine& m, Barrier& b) {
    const unsigned current = m.current;
    for (unsigned w = 0; w < m.warps.size(); w++) {
        unsigned lanes = b.lanes[w];
        if (w == current / 32) lanes &= ~(1u << current % 32);
        if (lanes) set_ready(m, w, lanes);
        b.lanes[w] = 0;
    }
    b.arrived = 0;
}

void arrive(Machine& m, Barrier& b, Where where) {
    if (!b.arrived) b.where = where;
    b.arrived++;
    b.lanes[m.current / 32] |= 1u << m.current % 32;
}

void release_syncthreads(Machine& m) {
    m.predicates = m.next_predicates;
    m.next_predicates = 0;
    release(m, m.barriers[0]);
}
}  // namespace

int block_barrier(bool predicate, Where where) {
    Machine& m = *machine;
    Barrier& b = m.barriers[0];
    if (b.arrived && (b.where.line != where.line || strcmp(b.where.file, where.file)))
        fail("divergent __syncthreads: %s:%d, others at %s:%d", where.file, where.line, b.where.file,
             b.where.line);
    arrive(m, b, where);
    m.next_predicates += predicate;
    if (b.arrived == m.live) {   // threads that have exited don't count
        release_syncthreads(m);
        const int predicates = m.predicates;
        completed(m);
        return predicates;
    }
    block(Wait::Block, "__syncthreads", where);
    return m.predicates;   // nobody can complete the next barrier before this thread arrives there
}

void named_barrier(int id, int threads, Where where) {
    Machine& m = *machine;
    if (id < 1 || id > 15 || threads <= 0 || threads % 32 || unsigned(threads) > m.warps.size() * 32)
        fail("named_barrier(%d, %d) at %s:%d: id 1..15, whole warps of the block", id, threads, where.file,
             where.line);
    Barrier& b = m.barriers[id];
    if (b.arrived && b.expected != unsigned(threads))
        fail("named_barrier(%d) at %s:%d waits for %d threads, others for %u", id, where.file, where.line,
             threads, b.expected);
    b.expected = unsigned(threads);
    arrive(m, b, where);
    if (b.arrived < b.expected) return block(Wait::Block, "named_barrier", where);
    for (unsigned w = 0; w < m.warps.size(); w++)
        if (b.lanes[w] && b.lanes[w] != m.warps[w].live)
            fail("named_barrier(%d) at %s:%d: only lanes %08x of warp %u", id, where.file, where.line,
                 b.lanes[w], w);
    release(m, b);
    completed(m);
}

namespace {
// Runs pending collective `i` of a warp and lets the lanes that wait for it go on.
void complete(Machine& m, unsigned w, size_t i) {
    Warp& warp = m.warps[w];
    const Collective c = warp.pending[i];
    warp.pending.erase(warp.pending.begin() + long(i));
    c.run(warp.args, c.arrived, c.context);
    const unsigned others = m.current / 32 == w ? c.arrived & ~(1u << m.current % 32) : c.arrived;
    if (others) set_ready(m, w, others);
}
}  // namespace

void warp_collective(unsigned mask, void* mine, void (*run)(void* const*, unsigned, Context), Context context,
                     const char* what, Where where) {
    Machine& m = *machine;
    const unsigned w = m.current / 32, bit = 1u << m.current % 32;
    Warp& warp = m.warps[w];
    if (!(mask & bit))
        fail("%s at %s:%d: mask %08x without the calling lane", what, where.file, where.line, mask);
    warp.args[m.current % 32] = mine;
    auto matches = [&](const Collective& c) { return c.context == context && c.mask == mask; };
    size_t i = 0;
    while (i < warp.pending.size() && !matches(warp.pending[i])) i++;
    if (i == warp.pending.size()) warp.pending.push_back({run, context, mask, 0});
    Collective& c = warp.pending[i];
    c.arrived |= bit;
    if (c.arrived != (mask & warp.live)) return block(Wait::Warp, what, where);
    complete(m, w, i);
    completed(m);
}

namespace {
// A thread that exits may be the one the others wait for.
void thread_exit(Machine& m) {
    const unsigned w = m.current / 32, bit = 1u << m.current % 32;
    Warp& warp = m.warps[w];
    if (warp.lane_issued[m.current % 32]) fail("a thread ends with wgmma in flight");
    warp.live &= ~bit;
    m.live--;
    for (size_t i = warp.pending.size(); i-- > 0;)
        if (warp.pending[i].arrived == (warp.pending[i].mask & warp.live)) complete(m, w, i);
    if (m.barriers[0].arrived && m.barriers[0].arrived == m.live) release_syncthreads(m);
}
}  // namespace

void multiply_add(float (*d)[16], const float (*a)[16], const float (*b)[16], int n) {
    typedef float Row __attribute__((vector_size(16), may_alias));
    const auto* left = reinterpret_cast<const Row(*)[4]>(a);
    for (int column = 0; column < n; column++) {
        auto* out = reinterpret_cast<Row*>(d[column]);
        Row s0 = out[0], s1 = out[1], s2 = out[2], s3 = out[3];
        for (int k = 0; k < 16; k++) {
            const float x = b[column][k];
            s0 += left[k][0] * x;
            s1 += left[k][1] * x;
            s2 += left[k][2] * x;
            s3 += left[k][3] * x;
        }
        out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
    }
}

// ---- Launch ----
namespace {
void check_launch(const char* kernel, const unsigned grid[3], const unsigned block[3], size_t smem) {
    const uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
    const bool grid_fits = grid[0] && grid[1] && grid[2] && grid[0] <= 0x7fffffff && grid[1] <= 65535 &&
                           grid[2] <= 65535;
    if (grid_fits && threads && threads <= MAX_THREADS && block[2] <= 64 && smem <= MAX_SMEM) return;
    fprintf(stderr, "shim: %s: invalid launch: grid (%u,%u,%u), block (%u,%u,%u), %zu bytes of dynamic "
            "shared memory (at most %zu)\n", kernel, grid[0], grid[1], grid[2], block[0], block[1], block[2],
            smem, MAX_SMEM);
    abort();
}

// Poisons the dynamic shared memory: what is read before it is written is NaN. Beyond it lies a canary.
void poison_smem(Machine& m) {
    char* base = m.smem + SMEM_BASE;
    ASAN_UNPOISON_MEMORY_REGION(m.smem, SMEM_WINDOW);
    memset(base, 0xff, m.smem_size);
    memset(base + m.smem_size, 0xa5, CANARY);
    ASAN_POISON_MEMORY_REGION(m.smem, SMEM_BASE);
    ASAN_POISON_MEMORY_REGION(base + m.smem_size, SMEM_WINDOW - SMEM_BASE - m.smem_size);
}

void check_block_end(Machine& m) {
    if (!m.bulk.empty()) fail("the block ends with a bulk copy in flight");
    for (size_t g = 0; g < m.warps.size() / 4; g++)
        for (size_t w = 4 * g; w < 4 * g + 4; w++)
            if (m.warps[w].performed != m.warpgroup_log[g].size())
                fail("the warps of warpgroup %zu issued different numbers of wgmmas", g);
    for (Barrier& b : m.barriers)
        if (b.arrived) fail("the block ends with %u threads at a barrier", b.arrived);
    ASAN_UNPOISON_MEMORY_REGION(m.smem, SMEM_WINDOW);
    for (size_t i = 0; i < CANARY; i++)
        if (m.smem[SMEM_BASE + m.smem_size + i] != char(0xa5))
            fail("a write %zu bytes past the dynamic shared memory", i);
}

void run_block(Machine& m) {
    poison_smem(m);
    m.live = m.threads;
    for (unsigned w = 0; w < m.warps.size(); w++) {
        Warp& warp = m.warps[w];
        const unsigned lanes = std::min(32u, m.threads - w * 32);
        warp.live = lanes == 32 ? ALL : (1u << lanes) - 1;
        warp.pending.clear();
        warp.performed = 0;
        memset(warp.lane_groups, 0, sizeof warp.lane_groups);
        set_ready(m, w, warp.live);
    }
    for (auto& log : m.warpgroup_log) log.clear();
    for (unsigned t = 0; t < m.threads; t++) start(m, t);

    m.current = m.order == Order::Reverse ? unsigned(m.warps.size() - 1) * 32 : 31;   // just before the first
    m.current = pick(m);
    threadIdx = m.fibers[m.current].id;
#if defined(SHIM_ASAN)
    __sanitizer_start_switch_fiber(&m.main_fake_stack, stack_of(m, m.current), STACK);
#endif
    shim_switch_stack(&m.main_sp, m.fibers[m.current].sp);
#if defined(SHIM_ASAN)
    __sanitizer_finish_switch_fiber(m.main_fake_stack, nullptr, nullptr);
#endif
    check_block_end(m);
}

thread_local std::string chosen_order;

// Unset, "reverse" or the seed of a random order.
void read_order(Machine& m) {
    const char* order = chosen_order.empty() ? getenv("SHIM_ORDER") : chosen_order.c_str();
    const std::string name = order ? order : "";
    m.order = name.empty() || name == "forward" ? Order::Forward : Order::Random;
    if (name == "reverse") m.order = Order::Reverse;
    if (m.order == Order::Random) m.random.seed(unsigned(atoi(order)) + 1);
}
}  // namespace

void launch(const char* kernel, const unsigned grid[3], const unsigned block[3], size_t smem,
            void (*body)(const void*), const void* params) {
    check_launch(kernel, grid, block, smem);
    static thread_local std::unique_ptr<Machine> owned;
    if (!owned) owned = std::make_unique<Machine>();
    Machine& m = *owned;
    machine = &m;
    m.kernel = kernel, m.body = body, m.params = params;
    m.threads = block[0] * block[1] * block[2];
    m.smem_size = smem;
    map_stacks(m, m.threads);
    read_order(m);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    m.fibers.resize(m.threads);
    m.warps.resize((m.threads + 31) / 32);
    for (unsigned i = 0; i < m.threads; i++)
        m.fibers[i].id = {i % block[0], i / block[0] % block[1], i / (block[0] * block[1])};

    const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    std::vector<uint32_t> order;
    if (m.order == Order::Random) {
        for (uint64_t i = 0; i < blocks; i++) order.push_back(uint32_t(i));
        std::shuffle(order.begin(), order.end(), m.random);
    }
    for (uint64_t i = 0; i < blocks; i++) {
        const uint64_t b = !order.empty() ? order[i] : m.order == Order::Reverse ? blocks - 1 - i : i;
        blockIdx = {unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / grid[0] / grid[1])};
        run_block(m);
    }
}
}  // namespace shim

void shim_order(const char* order) { shim::chosen_order = order ? order : ""; }

#include "async.h"
