// select_rows: out[i, :] = x[rows[i], :] for i below count, so that the output head runs only where
// it is needed, and each expert of a mixture only on its rows.
//
// Shapes  x, out: bf16 Tiles of `chunks` 16-byte chunks a row, zero padding included (k_tiles * 8)
//         rows: (count)
// Nothing rows[i] NONE: row i of out is left as it is.
// Launch  grid = count, block = 128 threads (any number works).
#include "device.cuh"

struct SelectRowsParams {
    const bf16*     x;
    bf16*           out;
    const uint32_t* rows;
    int             count, chunks, x_row_groups, out_row_groups;
};
static_assert(sizeof(SelectRowsParams) == 40, "mirror of src/ops/select_rows.rs");

extern "C" __global__ void __launch_bounds__(1024)
select_rows(const __grid_constant__ SelectRowsParams p) {
    const int to = static_cast<int>(blockIdx.x);
    if (to >= p.count) return;
    const uint32_t from = p.rows[to];
    if (from == NONE) return;
    for (int chunk = threadIdx.x; chunk < p.chunks; chunk += blockDim.x) {
        const bf16* x = p.x + tile_chunk(static_cast<int>(from), chunk, p.x_row_groups);
        bf16* out = p.out + tile_chunk(to, chunk, p.out_row_groups);
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(x);
    }
}
EXPORT_KERNEL(select_rows, SelectRowsParams)
