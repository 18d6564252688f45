// copy_pages: copies page pairs[i].0 of the KV cache to page pairs[i].1 for i below count, when
// sequences are forked inside a page. The pairs have no order: no page is written that another pair
// reads or writes.
//
// Shapes  pages: (.., page_len) bf16    pairs: (count, 2)
// Launch  grid = (count, any), block = 256 threads (any number works); the blocks of a column share
//         a page, ceil(page_len / 8192) of them give each thread four 16-byte chunks.
// Needs   page_len % 8 == 0, pages 16-byte aligned.
#include "device.cuh"

struct CopyPagesParams {
    bf16*           pages;
    const uint32_t* pairs;
    int             count, page_len;
};
static_assert(sizeof(CopyPagesParams) == 24, "mirror of src/ops/copy_pages.rs");

extern "C" __global__ void __launch_bounds__(1024)
copy_pages(const __grid_constant__ CopyPagesParams p) {
    if (blockIdx.x >= static_cast<unsigned>(p.count)) return;
    const int64_t from = p.pairs[2 * blockIdx.x], to = p.pairs[2 * blockIdx.x + 1];
    const uint4* source = reinterpret_cast<const uint4*>(p.pages + from * p.page_len);
    uint4* target = reinterpret_cast<uint4*>(p.pages + to * p.page_len);
    const int chunks = p.page_len / 8, step = static_cast<int>(gridDim.y * blockDim.x);
    for (int i = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); i < chunks; i += step)
        target[i] = source[i];
}
EXPORT_KERNEL(copy_pages, CopyPagesParams)
