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
// Launch  kernels named *_wgmma_FxT need sm_90a, *_mma_FxT run anywhere; a tile has F features and T
//         tokens. A block takes tiles blockIdx.x, blockIdx.x + gridDim.x, ...; any grid is correct, the
//         best is min(tiles, blocks resident at once), tiles = ceil(rows / T) * ceil(n / F).
//         Alignment 128 bytes of weights and x, 16 of out; n >= 1; k_tiles >= 1.
//
//         kernel         threads  dynamic shared memory  blocks per multiprocessor
//         wgmma_64x8         160                 111296  2
//         wgmma_64x16        160                 113840  2
//         wgmma_64x32        160                 112784  2
//         wgmma_64x64        160                 102496  2
//         wgmma_64x128       160                 204928  1
//         wgmma_128x128      288                 213088  1
//         wgmma_192x128      416                 229456  1
//         wgmma_128x256      288                 229440  1
//         mma_64x16          128                  81920  2 where 164 KiB are shared
//         mma_64x64          128                  65536  2
//         mma_128x128        256                  98304  1
#include "matmul_mma.cuh"
#include "matmul_wgmma.cuh"

// The small tiles are bound by memory: they need many bytes under way. Two blocks share a
// multiprocessor, so that one loads while the other starts or stores.
using Wgmma64x8 = WgmmaShape<8, 1, 12>;
using Wgmma64x16 = WgmmaShape<16, 1, 11>;
using Wgmma64x32 = WgmmaShape<32, 1, 9>;
using Wgmma64x64 = WgmmaShape<64, 1, 6>;
using Wgmma64x128 = WgmmaShape<128, 1, 8>;
using Wgmma128x128 = WgmmaShape<128, 2, 6>;
using Wgmma192x128 = WgmmaShape<128, 3, 5>;
using Wgmma128x256 = WgmmaShape<256, 2, 4>;
using Mma64x16 = MmaShape<16, 1, 1, 8>;
using Mma64x64 = MmaShape<64, 1, 2, 4>;
using Mma128x128 = MmaShape<128, 2, 4, 3>;

constexpr int HALF_SMEM = 113 << 10, FULL_SMEM = 227 << 10;   // a block's share of Hopper's 228 KiB
static_assert(Wgmma64x8::SMEM == 111296 && Wgmma64x8::SMEM <= HALF_SMEM, "table above");
static_assert(Wgmma64x16::SMEM == 113840 && Wgmma64x16::SMEM <= HALF_SMEM, "table above");
static_assert(Wgmma64x32::SMEM == 112784 && Wgmma64x32::SMEM <= HALF_SMEM, "table above");
static_assert(Wgmma64x64::SMEM == 102496 && Wgmma64x64::SMEM <= HALF_SMEM, "table above");
static_assert(Wgmma64x128::SMEM == 204928 && Wgmma64x128::SMEM <= FULL_SMEM, "table above");
static_assert(Wgmma128x128::SMEM == 213088 && Wgmma128x128::SMEM <= FULL_SMEM, "table above");
static_assert(Wgmma192x128::SMEM == 229456 && Wgmma192x128::SMEM <= FULL_SMEM, "table above");
static_assert(Wgmma128x256::SMEM == 229440 && Wgmma128x256::SMEM <= FULL_SMEM, "table above");
static_assert(Mma64x16::SMEM == 81920 && Mma64x64::SMEM == 65536 && Mma128x128::SMEM == 98304, "table above");

// RESIDENT: blocks of a multiprocessor at least.
#define PRODUCT(name, product, Shape, GATED, RESIDENT)                           \
    extern "C" __global__ void __launch_bounds__(Shape::THREADS, RESIDENT)       \
        name(const __grid_constant__ MatmulParams p) {                           \
        product<Shape, GATED>(p);                                                \
    }                                                                            \
    static_assert(Shape::THREADS <= 1024, "a block")
PRODUCT(matmul_wgmma_64x8, wgmma_matmul, Wgmma64x8, false, 2);
EXPORT_KERNEL(matmul_wgmma_64x8, MatmulParams)
PRODUCT(gated_wgmma_64x8, wgmma_matmul, Wgmma64x8, true, 2);
EXPORT_KERNEL(gated_wgmma_64x8, MatmulParams)
PRODUCT(matmul_wgmma_64x16, wgmma_matmul, Wgmma64x16, false, 2);
EXPORT_KERNEL(matmul_wgmma_64x16, MatmulParams)
PRODUCT(gated_wgmma_64x16, wgmma_matmul, Wgmma64x16, true, 2);
EXPORT_KERNEL(gated_wgmma_64x16, MatmulParams)
PRODUCT(matmul_wgmma_64x32, wgmma_matmul, Wgmma64x32, false, 2);
EXPORT_KERNEL(matmul_wgmma_64x32, MatmulParams)
PRODUCT(gated_wgmma_64x32, wgmma_matmul, Wgmma64x32, true, 2);
EXPORT_KERNEL(gated_wgmma_64x32, MatmulParams)
PRODUCT(matmul_wgmma_64x64, wgmma_matmul, Wgmma64x64, false, 2);
EXPORT_KERNEL(matmul_wgmma_64x64, MatmulParams)
PRODUCT(gated_wgmma_64x64, wgmma_matmul, Wgmma64x64, true, 2);
EXPORT_KERNEL(gated_wgmma_64x64, MatmulParams)
PRODUCT(matmul_wgmma_64x128, wgmma_matmul, Wgmma64x128, false, 1);
EXPORT_KERNEL(matmul_wgmma_64x128, MatmulParams)
PRODUCT(gated_wgmma_64x128, wgmma_matmul, Wgmma64x128, true, 1);
EXPORT_KERNEL(gated_wgmma_64x128, MatmulParams)
PRODUCT(matmul_wgmma_128x128, wgmma_matmul, Wgmma128x128, false, 1);
EXPORT_KERNEL(matmul_wgmma_128x128, MatmulParams)
PRODUCT(gated_wgmma_128x128, wgmma_matmul, Wgmma128x128, true, 1);
EXPORT_KERNEL(gated_wgmma_128x128, MatmulParams)
PRODUCT(matmul_wgmma_192x128, wgmma_matmul, Wgmma192x128, false, 1);
EXPORT_KERNEL(matmul_wgmma_192x128, MatmulParams)
PRODUCT(gated_wgmma_192x128, wgmma_matmul, Wgmma192x128, true, 1);
EXPORT_KERNEL(gated_wgmma_192x128, MatmulParams)
PRODUCT(matmul_wgmma_128x256, wgmma_matmul, Wgmma128x256, false, 1);
EXPORT_KERNEL(matmul_wgmma_128x256, MatmulParams)
PRODUCT(gated_wgmma_128x256, wgmma_matmul, Wgmma128x256, true, 1);
EXPORT_KERNEL(gated_wgmma_128x256, MatmulParams)
PRODUCT(matmul_mma_64x16, mma_matmul, Mma64x16, false, 2);
EXPORT_KERNEL(matmul_mma_64x16, MatmulParams)
PRODUCT(gated_mma_64x16, mma_matmul, Mma64x16, true, 2);
EXPORT_KERNEL(gated_mma_64x16, MatmulParams)
PRODUCT(matmul_mma_64x64, mma_matmul, Mma64x64, false, 2);
EXPORT_KERNEL(matmul_mma_64x64, MatmulParams)
PRODUCT(gated_mma_64x64, mma_matmul, Mma64x64, true, 2);
EXPORT_KERNEL(gated_mma_64x64, MatmulParams)
PRODUCT(matmul_mma_128x128, mma_matmul, Mma128x128, false, 1);
EXPORT_KERNEL(matmul_mma_128x128, MatmulParams)
PRODUCT(gated_mma_128x128, mma_matmul, Mma128x128, true, 1);
EXPORT_KERNEL(gated_mma_128x128, MatmulParams)
