// Asynchronous copies, mbarriers and wgmma. A part of shim.cpp.
#pragma once
#include "machine.h"

namespace shim {
// ---- cp.async: performed when its thread waits ----

void copy_async(void* to, const void* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
        fail("cp_async_16 from %p to %p: not aligned to 16 bytes", from, to);
    Fiber& f = self();
    memset(to, 0xff, 16);
    f.copies.push_back({to, valid ? from : nullptr, f.copy_groups});
}

void copy_commit() { self().copy_groups++; }

void copy_wait(unsigned groups_left) {
    Fiber& f = self();
    for (; f.copies_done < f.copies.size(); f.copies_done++) {
        const Copy& c = f.copies[f.copies_done];
        if (c.group + groups_left >= f.copy_groups) return;
        if (c.from) memcpy(c.to, c.from, 16); else memset(c.to, 0, 16);
    }
    f.copies.clear();
    f.copies_done = 0;
}

// ---- mbarriers ----
namespace {
struct MbarrierWord {
    uint64_t pending : 20, count : 20;   // arrivals that the current phase lacks, and of each phase
    int64_t bytes : 23;                  // that the current phase lacks
    uint64_t phase : 1;                  // parity of the current phase
};
static_assert(sizeof(MbarrierWord) == 8, "an mbarrier is 64 bits");

MbarrierWord load_mbarrier(const uint64_t* bar) {
    const void* at = bar;
    if (reinterpret_cast<uintptr_t>(bar) % 8) fail("mbarrier at %p: not aligned to 8 bytes", at);
    MbarrierWord word;
    memcpy(&word, bar, 8);
    if (word.count == 0 || word.count == 0xfffff) fail("mbarrier at %p is not initialised", at);
    return word;
}

void print_mbarrier(const uint64_t* bar) {
    MbarrierWord word;
    memcpy(&word, bar, 8);
    fprintf(stderr, " (phase of parity %d lacks %d of %d arrivals, %d bytes)", int(word.phase),
            int(word.pending), int(word.count), int(word.bytes));
}

// Stores a changed word; where it ends the phase, begins the next and wakes those who wait.
void store_mbarrier(Machine& m, uint64_t* bar, MbarrierWord word) {
    const bool complete = word.pending == 0 && word.bytes == 0;
    if (complete) {
        word.phase = !word.phase;
        word.pending = word.count;
    }
    memcpy(bar, &word, 8);
    for (unsigned t = 0; complete && t < m.threads; t++)
        if (m.fibers[t].mbarrier == bar) {
            m.fibers[t].mbarrier = nullptr;
            set_ready(m, t / 32, 1u << t % 32);
        }
}

void perform_bulk(Machine& m, size_t index) {
    const BulkCopy c = m.bulk[index];
    m.bulk.erase(m.bulk.begin() + long(index));
    memcpy(c.to, c.from, c.bytes);
    MbarrierWord word = load_mbarrier(c.bar);
    word.bytes -= c.bytes;
    store_mbarrier(m, c.bar, word);
}
}  // namespace

void mbarrier_init(uint64_t* bar, unsigned count) {
    if (count == 0 || count >= 0xfffff) fail("mbarrier_init with count %u", count);
    MbarrierWord word{};
    word.pending = word.count = count;
    memcpy(bar, &word, 8);
}

void mbarrier_arrive(uint64_t* bar, unsigned expect_bytes) {
    if (expect_bytes >= 1u << 20) fail("mbarrier_arrive_expect: %u bytes, at most 2^20 - 1", expect_bytes);
    MbarrierWord word = load_mbarrier(bar);
    if (word.pending == 0) fail("mbarrier_arrive: more than %u arrivals in a phase", unsigned(word.count));
    word.bytes += expect_bytes;
    word.pending--;
    store_mbarrier(*machine, bar, word);
}

void mbarrier_wait(uint64_t* bar, unsigned parity, Where where) {
    Machine& m = *machine;
    if (parity > 1) fail("mbarrier_wait at %s:%d: parity %u", where.file, where.line, parity);
    while (load_mbarrier(bar).phase == parity) {
        size_t i = 0;
        while (i < m.bulk.size() && m.bulk[i].bar != bar) i++;
        if (i < m.bulk.size()) {
            perform_bulk(m, i);
        } else {
            self().mbarrier = bar;
            block(Wait::Mbarrier, "mbarrier_wait", where);
        }
    }
}

void bulk_copy(void* to, const void* from, unsigned bytes, uint64_t* bar) {
    const uintptr_t all = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
    if (all % 16 || !bytes)
        fail("bulk_copy of %u bytes from %p to %p: multiples of 16", bytes, from, to);
    load_mbarrier(bar);
    memset(to, 0xff, bytes);
    machine->bulk.push_back({to, from, bytes, bar});
}

// ---- wgmma: each warp performs its 16 rows when it waits, so that a slow warp still reads the operands
// after the others are done. What it then reads must be what was there at issue: a hash is compared.

unsigned smem_address(const void* p) {
    const char* at = static_cast<const char*>(p);
    const char* base = machine->smem + SMEM_BASE;
    if (at < base || at >= base + machine->smem_size) fail("%p is not in dynamic shared memory", p);
    return unsigned(at - machine->smem);
}

namespace {
// Two of the eight 16-byte chunks in each 128-byte row of a tile, swizzled.
struct Operand {
    const char* tile;
    unsigned chunk;
    const char* at(int row, int half) const { return tile + row * 128 + ((chunk + half) ^ (row & 7)) * 16; }
};

Operand operand(const Machine& m, uint64_t descriptor) {
    const unsigned address = unsigned(descriptor & 0x3fff) << 4;
    return {m.smem + (address & ~1023u), address >> 4 & 7};
}

void check_operand(const Machine& m, uint64_t d, int rows, Where where) {
    const unsigned tile = (unsigned(d & 0x3fff) << 4) & ~1023u;
    if (d >> 62 != 1 || (d >> 32 & 0x3fff) != 1024 >> 4 || (d >> 49 & 7) || (d & 0x39) || tile < SMEM_BASE ||
        tile + unsigned(rows) * 128 > SMEM_BASE + m.smem_size)
        fail("wgmma at %s:%d: descriptor %016llx: want a 128-byte swizzle, stride 1024, a tile aligned to "
             "1024 within the dynamic shared memory, and 16 k at a multiple of 32 bytes in its rows",
             where.file, where.line, static_cast<unsigned long long>(d));
}

uint64_t mix(uint64_t hash, const char* chunk) {
    uint64_t words[2];
    memcpy(words, chunk, 16);
    return ((hash << 9 | hash >> 55) ^ words[0]) + words[1] * 0x9e3779b97f4a7c15u;
}

uint64_t hash_rows(uint64_t hash, Operand from, int first, int rows) {
    for (int row = first; row < first + rows; row++) hash = mix(mix(hash, from.at(row, 0)), from.at(row, 1));
    return hash;
}

// Of all that warp w reads for it.
uint64_t hash_operands(const Machine& m, const Wgmma& op, unsigned w) {
    return hash_rows(hash_rows(0, operand(m, op.a), int(w % 4) * 16, 16), operand(m, op.b), 0, op.n);
}

void load_row(Operand from, int row, float to[16]) {
    for (int half = 0; half < 2; half++) {
        uint16_t bits[8];
        memcpy(bits, from.at(row, half), 16);
        for (int i = 0; i < 8; i++) to[8 * half + i] = __uint_as_float(unsigned(bits[i]) << 16);
    }
}

float& element(Accumulator& tile, unsigned lane, int e) {
    return tile.tile[e / 4 * 8 + int(lane % 4) * 2 + e % 2][int(lane / 4) + e / 2 % 2 * 8];
}

// The accumulator of a lane's d, taking it over (and leaving NaN) if it isn't in flight.
size_t accumulator_of(Warp& warp, unsigned lane, int n, float* d, Where where) {
    size_t i = 0;
    while (i < warp.accumulators.size() && warp.accumulators[i]->d[lane] != d) i++;
    if (i < warp.accumulators.size()) return i;
    for (i = 0; i < warp.accumulators.size(); i++) {
        const Accumulator& free = *warp.accumulators[i];   // by all lanes, or taken by some as this lane's
        if (!free.d[lane] && (free.n == n || free.n == 0)) break;
    }
    if (i == warp.accumulators.size()) warp.accumulators.push_back(std::make_unique<Accumulator>());
    if (!self().fenced) fail("wgmma at %s:%d: no wgmma_fence since the last wait", where.file, where.line);
    Accumulator& tile = *warp.accumulators[i];
    tile.n = n;
    tile.d[lane] = d;
    for (int e = 0; e < n / 2; e++) {
        element(tile, lane, e) = d[e];
        d[e] = __uint_as_float(ALL);
    }
    return i;
}

void finish(Accumulator& tile) {
    for (unsigned lane = 0; lane < 32; lane++) {
        for (int e = 0; e < tile.n / 2; e++) tile.d[lane][e] = element(tile, lane, e);
        tile.d[lane] = nullptr;
    }
    tile.n = 0;
}

void perform_wgmma(Machine& m, unsigned w, const Wgmma& op) {
    if (hash_operands(m, op, w) != op.hash) fail("wgmma operands changed between issue and wait");
    Accumulator& tile = *m.warps[w].accumulators[op.accumulator];
    alignas(16) float a[16][16], b[256][16];
    float row[16];
    for (int r = 0; r < 16; r++) {
        load_row(operand(m, op.a), int(w % 4) * 16 + r, row);
        for (int k = 0; k < 16; k++) a[k][r] = row[k];
    }
    for (int n = 0; n < op.n; n++) load_row(operand(m, op.b), n, b[n]);
    multiply_add(tile.tile, a, b, op.n);
    if (--tile.uses == 0) finish(tile);
}

bool same(const Wgmma& x, const Wgmma& y) { return x.n == y.n && x.a == y.a && x.b == y.b; }

// The warps of a warpgroup issue the same operations in the same order.
void check_warpgroup(Machine& m, unsigned w, size_t place, const Wgmma& op, Where where) {
    auto& log = m.warpgroup_log[w / 4];
    if (place == log.size()) log.push_back(op);
    if (!same(log[place], op))
        fail("wgmma at %s:%d: the warps of the warpgroup disagree", where.file, where.line);
}
}  // namespace

void wgmma_fence() { self().fenced = true; }

void wgmma_issue(int n, float* d, uint64_t a, uint64_t b, Where where) {
    Machine& m = *machine;
    const unsigned w = m.current / 32, lane = m.current % 32;
    if (w / 4 * 4 + 4 > m.warps.size())
        fail("wgmma at %s:%d: warp %u is not in a whole warpgroup", where.file, where.line, w);
    Warp& warp = m.warps[w];
    Wgmma op{n, a, b, 0, warp.lane_groups[lane], accumulator_of(warp, lane, n, d, where)};
    const unsigned index = warp.lane_issued[lane]++;
    if (index < warp.issued.size()) {
        const Wgmma& first = warp.issued[index];
        if (!same(op, first) || op.group != first.group || op.accumulator != first.accumulator)
            fail("wgmma at %s:%d: the lanes of the warp disagree", where.file, where.line);
        return;
    }
    check_operand(m, a, 64, where);
    check_operand(m, b, n, where);
    op.hash = hash_operands(m, op, w);
    warp.issued.push_back(op);
    warp.accumulators[op.accumulator]->uses++;
    check_warpgroup(m, w, warp.performed + index, op, where);
}

void wgmma_commit() { machine->warps[machine->current / 32].lane_groups[machine->current % 32]++; }

void wgmma_wait(unsigned groups_left, Where where) {
    unsigned mine = groups_left;
    self().fenced = false;
    warp_operation<unsigned>("wgmma_wait", where, mine, [](unsigned* const* lanes) {
        Machine& m = *machine;
        const unsigned w = m.current / 32, left = *lanes[0];
        Warp& warp = m.warps[w];
        const unsigned groups = warp.lane_groups[0];
        const size_t issued = warp.issued.size();
        for (unsigned l = 0; l < 32; l++)
            if (warp.lane_issued[l] != issued || warp.lane_groups[l] != groups || *lanes[l] != left)
                fail("wgmma_wait: lane %u has issued or committed other wgmmas than lane 0", l);
        unsigned done = 0;
        for (; done < issued && warp.issued[done].group + left < groups; done++)
            perform_wgmma(m, w, warp.issued[done]);
        warp.issued.erase(warp.issued.begin(), warp.issued.begin() + done);
        for (unsigned& count : warp.lane_issued) count -= done;
        warp.performed += done;
    });
}

void wgmma_check_complete(const float* d, int count) {
    for (const auto& tile : machine->warps[machine->current / 32].accumulators) {
        const float* at = tile->d[machine->current % 32];
        if (at && at < d + count && d < at + tile->n / 2) fail("wgmma_complete: d is in flight");
    }
}
}  // namespace shim
