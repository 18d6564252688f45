// attention: causal attention of each row of a step over the pages of its sequence.
//
//   out[row, head] = sum_j w[j] v[j] / sum_j w[j],  w[j] = exp(s[j] - max s),  s[j] = scale * q . k[j]
//   over j <= position, and j > position - window where window > 0;  s = cap * tanh(s / cap) where
//   soft_cap > 0.  Query head h reads key and value head h / (heads / kv_heads).
//
// One left fold (attention_fold.cuh) over tiles of 64 absolute positions in order, restarted every
// 1024 positions; chunk results are merged in ascending order. A (row, head) has the same bits in
// whichever kernel, item and batch it is folded.
//
// Work comes as items: rows that one block folds together. Two kernels, each for heads of up to HD
// columns (take the narrowest of 32, 64, 80, 96, 128, 256 that holds head_dim):
//   attention_narrow_HD   1 warp, so at most `per_warp` rows an item: decode
//   attention_wide_HD     4 warps, so at most 4 * per_warp rows: prefill and prefixes
// per_warp = 16 / min(16, heads / kv_heads): a warp's 16 M-rows are (row, query head of one kv head).
// An item is one of
//   prefix 0: rows of one sequence, folded to each row's own position and written to out.
//   prefix 1: rows of any sequences whose tables begin with the same pages. Only the item's tiles are
//             folded, all of whose positions lie before every row; the states are left in total and
//             open. A later launch with prefix 0 items of the same rows and tiles goes on from there.
//
// Shapes  qkv: (rows, width), rotated, q first as [heads][head_dim]
//         position: (rows)    list: row numbers    items: (grid.x)
//         pages: a page is 16 positions of a layer, K [kv_heads][16][head_dim], then V likewise
//         tables: (slots, layers, blocks), the page of each block of 16 positions
//         out: tiled activations of heads * head_dim columns, out_row_groups groups of 8 rows
//         total, open: (rows, heads, HD + 2): max, sum, out. total is used for rows beyond position
//         1023 and their neighbours in an item, open (and total) with prefixes; else both may be null.
// Types   qkv, total, open: f32.  pages, out: bf16; q and the weights are rounded to bf16.
// Needs   head_dim % 8 == 0; qkv, pages and out aligned to 16 bytes, total and open to 8. K and V of
//         the positions up to each row's own are written; later ones are not read, nor are table
//         entries beyond the block of the item's last position.
// Launch  grid = (items, kv_heads * ceil(heads / kv_heads / 16)), block = 32 * warps, dynamic shared
//         memory = (64 * tiles + 16 * warps) * 2 * (HD + 8) bytes, tiles = 1 narrow, 2 wide.
// Rows >= `rows` (not entered by this layer), NONE in the list and items of count 0 are passed over.
#include "attention_fold.cuh"

struct AttentionItem {
    uint32_t first, count;                 // list[first .. first + count]; count 0: idle
    uint32_t slot;                         // whose table is read
    uint32_t tiles_below, tiles_above;     // tiles of the prefix: at layers below cut, from cut on
    uint32_t cut;
    uint32_t prefix;                       // 1: fold these tiles; 0: go on after them, to out
    uint32_t from, last;                   // lowest and highest position of its rows
};
static_assert(sizeof(AttentionItem) == 36, "mirror of src/ops/attention/plan.rs");

struct AttentionParams {
    const float*         qkv;
    const uint32_t*      position;
    const bf16*          pages;
    const uint32_t*      tables;
    const uint32_t*      list;
    const AttentionItem* items;
    bf16*                out;
    float*               total;            // closed chunks, merged
    float*               open;             // the chunk at the prefix's end
    int32_t rows, width, heads, kv_heads, head_dim, layer, layers, blocks, out_row_groups, window;
    float   scale, soft_cap;
};
static_assert(sizeof(AttentionParams) == 120, "mirror of src/ops/attention.rs");

// Barrier of the block, which may be a single warp.
template <int WARPS>
__device__ inline void block_barrier() {
    if (WARPS == 1) __syncwarp();
    else __syncthreads();
}

// The query head and row of one of a warp's 16 M-rows. row -1: idle.
struct Owner {
    int row, head, position;
};

__device__ inline Owner owner(const AttentionParams& p, const AttentionItem& item, int m, int warp) {
    const int group = p.heads / p.kv_heads, side = group < M_ROWS ? group : M_ROWS;
    const int slices = (group + M_ROWS - 1) / M_ROWS, per_warp = M_ROWS / side;
    const int kv_head = blockIdx.y / slices, slice = blockIdx.y % slices;
    const int turn = m / side, head = slice * M_ROWS + m % side;
    const uint32_t i = warp * per_warp + turn;
    if (turn >= per_warp || head >= group || i >= item.count) return {-1, 0, -1};
    const int row = p.list[item.first + i];
    if (row < 0 || row >= p.rows) return {-1, 0, -1};
    return {row, kv_head * group + head, static_cast<int>(p.position[row])};
}

// Starts the copy of this warp's blocks of a tile of keys or values; positions after `last` become
// zeros. from: the kv head's first element in page 0.
template <int HD, int WARPS>
__device__ inline void copy_tile(bf16* to, const bf16* from, const uint32_t (&page)[4 / WARPS],
                                 int start, int last, const AttentionParams& p) {
    constexpr int CHUNKS = HD / 8;
    const int lane = threadIdx.x % WARP;
    const int64_t page_len = static_cast<int64_t>(2 * PAGE) * p.kv_heads * p.head_dim;
#pragma unroll
    for (int b = 0; b < 4 / WARPS; b++) {
        const int block = WARPS == 1 ? b : threadIdx.x / WARP;
        const bf16* source = from + page[b] * page_len;
#pragma unroll 4
        for (int i = lane; i < PAGE * CHUNKS; i += WARP) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            const bool valid = chunk * 8 < p.head_dim && start + block * PAGE + row <= last;
            cp_async_16(to + at<HD>(block * PAGE + row, chunk), source + row * p.head_dim + chunk * 8, valid);
        }
    }
}

// The pages of this warp's blocks of a tile; page 0 for blocks after `last`, which are not read.
template <int WARPS>
__device__ inline void look_up(uint32_t (&page)[4 / WARPS], const uint32_t* table, int tile, int last) {
#pragma unroll
    for (int b = 0; b < 4 / WARPS; b++) {
        const int block = tile * (TILE / PAGE) + (WARPS == 1 ? b : threadIdx.x / WARP);
        page[b] = block * PAGE <= last ? table[block] : 0;
    }
}

// Rounds a warp's queries to bf16 in shared memory; idle M-rows and columns from head_dim on are 0.
template <int HD>
__device__ inline void stage_queries(bf16* q, const Owner& mine, const AttentionParams& p) {
    constexpr int CHUNKS = HD / 8;
#pragma unroll
    for (int i = threadIdx.x % WARP; i < M_ROWS * CHUNKS; i += WARP) {
        const int m = i / CHUNKS, chunk = i % CHUNKS;
        const int row = __shfl_sync(FULL_WARP, mine.row, m), head = __shfl_sync(FULL_WARP, mine.head, m);
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (row >= 0 && chunk * 8 < p.head_dim) {
            const float* from = p.qkv + static_cast<int64_t>(row) * p.width + head * p.head_dim + chunk * 8;
            const float4 a = reinterpret_cast<const float4*>(from)[0];
            const float4 b = reinterpret_cast<const float4*>(from)[1];
            bits = make_uint4(pack_bf16(a.x, a.y), pack_bf16(a.z, a.w),
                              pack_bf16(b.x, b.y), pack_bf16(b.z, b.w));
        }
        *reinterpret_cast<uint4*>(q + at<HD>(m, chunk)) = bits;
    }
}

// Normalises a warp's outputs and writes them, gathered into 16-byte chunks in its own queries'
// shared memory.
template <int HD>
__device__ inline void write_outputs(const State<HD>& state, bf16* stage, const Owner& mine,
                                     const AttentionParams& p) {
    constexpr int CHUNKS = HD / 8;
    const int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    const float inverse[2] = {1.0f / state.sum[0], 1.0f / state.sum[1]};
    __syncwarp();   // the queries have been read
#pragma unroll
    for (int j = 0; j < CHUNKS; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Adding 0 turns -0 into 0: a masked position may turn one into the other.
            const float a = state.out[j][2 * half] * inverse[half] + 0.0f;
            const float b = state.out[j][2 * half + 1] * inverse[half] + 0.0f;
            *reinterpret_cast<uint32_t*>(stage + at<HD>(g + 8 * half, j) + 2 * q) = pack_bf16(a, b);
        }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < M_ROWS * CHUNKS; i += WARP) {
        const int m = i / CHUNKS, chunk = i % CHUNKS;
        const int row = __shfl_sync(FULL_WARP, mine.row, m), head = __shfl_sync(FULL_WARP, mine.head, m);
        if (row < 0 || chunk * 8 >= p.head_dim) continue;
        bf16* to = p.out + tile_chunk(row, head * (p.head_dim / 8) + chunk, p.out_row_groups);
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(stage + at<HD>(m, chunk));
    }
}

template <int HD, int WARPS>
__device__ __forceinline__ void attend(const AttentionParams& p) {
    const AttentionItem item = p.items[blockIdx.x];
    if (item.count == 0) return;
    const int shared_tiles = static_cast<uint32_t>(p.layer) < item.cut ? item.tiles_below : item.tiles_above;
    if (item.prefix && shared_tiles == 0) return;

    // Tiles before `seen` lie before every row's window. If the prefix does too, its states are fresh.
    const int from = item.from;
    const int seen = p.window > 0 && from >= p.window ? (from - p.window + 1) / TILE : 0;
    const bool resumed = !item.prefix && shared_tiles > 0 && seen <= shared_tiles;
    const int begin = item.prefix ? 0 : resumed ? shared_tiles : seen;
    const int end = item.prefix ? shared_tiles : item.last / TILE + 1;
    const int last = item.prefix ? end * TILE - 1 : item.last;   // position that may be read

    // A single warp has room for one tile at a time: keys, then values. So many warps share a
    // multiprocessor that some always wait for memory while others compute.
    constexpr bool IN_TURN = WARPS == 1;
    DYNAMIC_SMEM(bf16, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    bf16* const k = shared;
    bf16* const v = IN_TURN ? k : k + TILE * ROW_ELEMENTS<HD>;
    bf16* const q = v + TILE * ROW_ELEMENTS<HD> + warp * M_ROWS * ROW_ELEMENTS<HD>;

    const int slices = (p.heads / p.kv_heads + M_ROWS - 1) / M_ROWS;
    const int kv_len = PAGE * p.head_dim;
    const bf16* const keys = p.pages + static_cast<int64_t>(blockIdx.y / slices) * kv_len;
    const bf16* const values = keys + static_cast<int64_t>(p.kv_heads) * kv_len;
    const uint32_t* const table =
        p.tables + (static_cast<int64_t>(item.slot) * p.layers + p.layer) * p.blocks;

    // Copies are committed in the order K, V, K, V ...: what is read next has arrived when at most
    // AHEAD of them are under way.
    constexpr int AHEAD = IN_TURN ? 0 : 1;
    uint32_t page[4 / WARPS], next[4 / WARPS];   // of this tile, of the next one
    look_up<WARPS>(page, table, begin, last);
    copy_tile<HD, WARPS>(k, keys, page, begin * TILE, last, p);
    cp_async_commit();
    if (!IN_TURN) {
        copy_tile<HD, WARPS>(v, values, page, begin * TILE, last, p);
        cp_async_commit();
    }

    const Owner mine = owner(p, item, lane % M_ROWS, warp);
    stage_queries<HD>(q, mine, p);
    const int halves = __reduce_max_sync(FULL_WARP, lane % M_ROWS >= 8 ? mine.position : -1) >= 0 ? 2 : 1;

    Visible visible;
    visible.scale = p.scale;
    visible.cap = p.soft_cap;
    visible.inverse_cap = p.soft_cap > 0.0f ? 1.0f / p.soft_cap : 0.0f;
    int index[2];   // of both halves' states
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int m = lane / 4 + 8 * half;
        const int row = __shfl_sync(FULL_WARP, mine.row, m), head = __shfl_sync(FULL_WARP, mine.head, m);
        visible.last[half] = __shfl_sync(FULL_WARP, mine.position, m);
        visible.first[half] = p.window > 0 ? visible.last[half] - p.window + 1 : 0;
        index[half] = row < 0 ? -1 : row * p.heads + head;
    }

    State<HD> state;
    bool has_total = resumed && shared_tiles >= CHUNK_TILES;
    if (resumed) load_state(state, p.open, index);
    else clear(state);
    // Ends a chunk: total = merge(total, state). A quad's threads read what one of them writes.
    auto close_chunk = [&] {
        if (has_total) merge_earlier(state, p.total, index);
        __syncwarp();
        store_state(state, p.total, index);
        __syncwarp();
        clear(state);
        has_total = true;
    };

    for (int tile = begin; tile < end; tile++) {
        if (tile % CHUNK_TILES == 0 && tile > begin) close_chunk();
        const int start = tile * TILE;
        const bool more = tile + 1 < end;
        look_up<WARPS>(next, table, tile + 1, last);
        cp_async_wait<AHEAD>();
        block_barrier<WARPS>();
        float scores[TILE / 8][4];
        score_tile<HD>(scores, q, k);
        block_barrier<WARPS>();
        if (IN_TURN) copy_tile<HD, WARPS>(v, values, page, start, last, p);
        else if (more) copy_tile<HD, WARPS>(k, keys, next, start + TILE, last, p);
        cp_async_commit();
        uint32_t weights[TILE / 8][2];
        weigh_tile(state, weights, scores, visible, start, halves);
        cp_async_wait<AHEAD>();
        block_barrier<WARPS>();
        add_values<HD>(state, weights, v);
        block_barrier<WARPS>();
        if (more) {
            copy_tile<HD, WARPS>(IN_TURN ? k : v, IN_TURN ? keys : values, next, start + TILE, last, p);
            for (int b = 0; b < 4 / WARPS; b++) page[b] = next[b];
        }
        cp_async_commit();
    }

    if (item.prefix) {
        if (end % CHUNK_TILES == 0) close_chunk();
        store_state(state, p.open, index);
        return;
    }
    if (has_total) merge_earlier(state, p.total, index);
    write_outputs<HD>(state, q, mine, p);
}

#define ATTENTION(name, HD, WARPS)                                               \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP)                   \
        name(const __grid_constant__ AttentionParams p) {                        \
        attend<HD, WARPS>(p);                                                    \
    }                                                                            \
    static_assert(HD % 16 == 0, "whole k steps and pairs of column groups")
ATTENTION(attention_narrow_32, 32, 1);
EXPORT_KERNEL(attention_narrow_32, AttentionParams)
ATTENTION(attention_narrow_64, 64, 1);
EXPORT_KERNEL(attention_narrow_64, AttentionParams)
ATTENTION(attention_narrow_80, 80, 1);
EXPORT_KERNEL(attention_narrow_80, AttentionParams)
ATTENTION(attention_narrow_96, 96, 1);
EXPORT_KERNEL(attention_narrow_96, AttentionParams)
ATTENTION(attention_narrow_128, 128, 1);
EXPORT_KERNEL(attention_narrow_128, AttentionParams)
ATTENTION(attention_narrow_256, 256, 1);
EXPORT_KERNEL(attention_narrow_256, AttentionParams)
ATTENTION(attention_wide_32, 32, 4);
EXPORT_KERNEL(attention_wide_32, AttentionParams)
ATTENTION(attention_wide_64, 64, 4);
EXPORT_KERNEL(attention_wide_64, AttentionParams)
ATTENTION(attention_wide_80, 80, 4);
EXPORT_KERNEL(attention_wide_80, AttentionParams)
ATTENTION(attention_wide_96, 96, 4);
EXPORT_KERNEL(attention_wide_96, AttentionParams)
ATTENTION(attention_wide_128, 128, 4);
EXPORT_KERNEL(attention_wide_128, AttentionParams)
ATTENTION(attention_wide_256, 256, 4);
EXPORT_KERNEL(attention_wide_256, AttentionParams)
