// matmul: out = x * weight^T (+ bias), the only operation that knows how weights are stored.
//
//   matmul_*:  out[t, n]  = sum_k x[t, k] * weight[n, k] (+ bias[n])           f32 row-major (rows, n)
//   gated_*:   out[t, f]  = bf16(act(gate) * up), the sums of a gate row and of the up row of feature f,
//              as Tiles. The weight's rows stand in turns of 8: 8 gate rows, the 8 up rows of the same
//              features, and so on. act: silu(g) = g / (1 + exp(-g)), or gelu's tanh approximation
//              g / 2 * (1 + tanh(z)) = g / (1 + exp(-2 z)), z = sqrt(2 / pi) (g + 0.044715 g^3).
//
// Groups  `blocks` says how many blocks of T tokens there are, and which of `weights` each is multiplied
//         by; n, k and the layout are the same for all. `rows`, a multiple of T, is then what x and out
//         have room for, and every row of a block is one: what nobody put there is multiplied too.
//
// Types   weight, x: bf16 in swizzled tiles (device.cuh); sums, bias: f32.
//         x is read in whole groups of 8 rows up to the group of the last row; what the rows beyond
//         `rows` hold (NaN too) has no influence, and such rows of out are never written.
// Order   the sum is one chain of steps of 16 k, ascending, whatever the tile: a row's bits depend
//         neither on the other rows, nor on the number of tokens of the tile, nor on the grid.
//         (The two families may differ in the last bit: tensor cores add the 16 products in their
//         own way.)
// Launch  kernels named *_wgmma_T need sm_90a, *_mma_T run anywhere; T = tokens of a tile. A block
//         takes tiles blockIdx.x, blockIdx.x + gridDim.x, ...; any grid is correct, the best is
//         min(tiles, blocks resident at once), tiles = ceil(rows / T) * ceil(n / features).
//         Alignment 128 bytes of weights and x, 16 of out; n >= 1; k_tiles >= 1.
//
//         kernel     features  threads  dynamic shared memory  blocks per multiprocessor
//         wgmma_8          64      160                 111296  2
//         wgmma_16         64      160                 113840  2
//         wgmma_32         64      160                 112784  2
//         wgmma_64         64      160                 102496  2
//         wgmma_128       128      288                 213088  1
//         wgmma_256       128      288                 229440  1
//         mma_16           64      128                  81920  2 where 164 KiB are shared
//         mma_64           64      128                  65536  2
//         mma_128         128      256                  98304  1
#include "matmul_mma.cuh"
#include "matmul_wgmma.cuh"

// The small tiles are bound by memory: they need many bytes under way. Two blocks share a
// multiprocessor, so that one loads while the other starts or stores.
using Wgmma8 = WgmmaShape<8, 1, 12>;
using Wgmma16 = WgmmaShape<16, 1, 11>;
using Wgmma32 = WgmmaShape<32, 1, 9>;
using Wgmma64 = WgmmaShape<64, 1, 6>;
using Wgmma128 = WgmmaShape<128, 2, 6>;
using Wgmma256 = WgmmaShape<256, 2, 4>;
using Mma16 = MmaShape<16, 1, 1, 8>;
using Mma64 = MmaShape<64, 1, 2, 4>;
using Mma128 = MmaShape<128, 2, 4, 3>;

constexpr int HALF_SMEM = 113 << 10, FULL_SMEM = 227 << 10;   // a block's share of Hopper's 228 KiB
static_assert(Wgmma8::SMEM == 111296 && Wgmma8::SMEM <= HALF_SMEM, "table above");
static_assert(Wgmma16::SMEM == 113840 && Wgmma16::SMEM <= HALF_SMEM, "table above");
static_assert(Wgmma32::SMEM == 112784 && Wgmma32::SMEM <= HALF_SMEM, "table above");
static_assert(Wgmma64::SMEM == 102496 && Wgmma64::SMEM <= HALF_SMEM, "table above");
static_assert(Wgmma128::SMEM == 213088 && Wgmma128::SMEM <= FULL_SMEM, "table above");
static_assert(Wgmma256::SMEM == 229440 && Wgmma256::SMEM <= FULL_SMEM, "table above");
static_assert(Mma16::SMEM == 81920 && Mma64::SMEM == 65536 && Mma128::SMEM == 98304, "table above");

extern "C" __global__ void __launch_bounds__(Wgmma8::THREADS, 2)
matmul_wgmma_8(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma8, false>(p);
}
EXPORT_KERNEL(matmul_wgmma_8, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma8::THREADS, 2)
gated_wgmma_8(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma8, true>(p);
}
EXPORT_KERNEL(gated_wgmma_8, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma16::THREADS, 2)
matmul_wgmma_16(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma16, false>(p);
}
EXPORT_KERNEL(matmul_wgmma_16, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma16::THREADS, 2)
gated_wgmma_16(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma16, true>(p);
}
EXPORT_KERNEL(gated_wgmma_16, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma32::THREADS, 2)
matmul_wgmma_32(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma32, false>(p);
}
EXPORT_KERNEL(matmul_wgmma_32, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma32::THREADS, 2)
gated_wgmma_32(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma32, true>(p);
}
EXPORT_KERNEL(gated_wgmma_32, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma64::THREADS, 2)
matmul_wgmma_64(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma64, false>(p);
}
EXPORT_KERNEL(matmul_wgmma_64, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma64::THREADS, 2)
gated_wgmma_64(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma64, true>(p);
}
EXPORT_KERNEL(gated_wgmma_64, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma128::THREADS, 1)
matmul_wgmma_128(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma128, false>(p);
}
EXPORT_KERNEL(matmul_wgmma_128, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma128::THREADS, 1)
gated_wgmma_128(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma128, true>(p);
}
EXPORT_KERNEL(gated_wgmma_128, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma256::THREADS, 1)
matmul_wgmma_256(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma256, false>(p);
}
EXPORT_KERNEL(matmul_wgmma_256, MatmulParams)

extern "C" __global__ void __launch_bounds__(Wgmma256::THREADS, 1)
gated_wgmma_256(const __grid_constant__ MatmulParams p) {
    wgmma_matmul<Wgmma256, true>(p);
}
EXPORT_KERNEL(gated_wgmma_256, MatmulParams)

extern "C" __global__ void __launch_bounds__(Mma16::THREADS, 2)
matmul_mma_16(const __grid_constant__ MatmulParams p) {
    mma_matmul<Mma16, false>(p);
}
EXPORT_KERNEL(matmul_mma_16, MatmulParams)

extern "C" __global__ void __launch_bounds__(Mma16::THREADS, 2)
gated_mma_16(const __grid_constant__ MatmulParams p) {
    mma_matmul<Mma16, true>(p);
}
EXPORT_KERNEL(gated_mma_16, MatmulParams)

extern "C" __global__ void __launch_bounds__(Mma64::THREADS, 2)
matmul_mma_64(const __grid_constant__ MatmulParams p) {
    mma_matmul<Mma64, false>(p);
}
EXPORT_KERNEL(matmul_mma_64, MatmulParams)

extern "C" __global__ void __launch_bounds__(Mma64::THREADS, 2)
gated_mma_64(const __grid_constant__ MatmulParams p) {
    mma_matmul<Mma64, true>(p);
}
EXPORT_KERNEL(gated_mma_64, MatmulParams)

extern "C" __global__ void __launch_bounds__(Mma128::THREADS, 1)
matmul_mma_128(const __grid_constant__ MatmulParams p) {
    mma_matmul<Mma128, false>(p);
}
EXPORT_KERNEL(matmul_mma_128, MatmulParams)

extern "C" __global__ void __launch_bounds__(Mma128::THREADS, 1)
gated_mma_128(const __grid_constant__ MatmulParams p) {
    mma_matmul<Mma128, true>(p);
}
EXPORT_KERNEL(gated_mma_128, MatmulParams)
