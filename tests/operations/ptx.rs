//! What the kernels are made of: each instruction of ptx.cuh, the functions of math.cuh, and the
//! operations of warps and blocks, against plain definitions, on everything that runs kernels. Also
//! the random weights of measurements, which no operation's test reaches.

use half::bf16;
use inkling::{
    device::{Buffer, Device, cuda::MatrixPath},
    ops::{
        Float,
        matmul::{Dtype, Weight, matmul},
        probes::{self, WARP_ROWS, WGMMA_WIDTHS},
    },
};

use crate::tools::{Numbers, U, activations, all_nan, close, first_difference, kernel_devices};
use crate::tools::{nans, on_every_device, read, read_u32, upload};

/// No kernel writes it.
const UNSET: u32 = 0x5e57_11e1;

/// Everything that runs kernels, of which there must be something.
fn devices() -> Vec<(String, Device)> {
    let devices = kernel_devices();
    assert!(!devices.is_empty(), "nothing runs the kernels");
    devices
}

fn is_gpu(device: &Device) -> bool {
    matches!(device, Device::Cuda(cuda) if cuda.is_gpu())
}

/// Operands of c(m, n) += a(m, k) · b(n, k)ᵀ.
struct Product {
    m: usize,
    n: usize,
    k: usize,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
}

impl Product {
    /// Whole numbers up to 8: every sum is exact, in whatever order it is made.
    fn exact((m, n, k): (usize, usize, usize)) -> Self {
        let mut numbers = Numbers::new((m * n + k) as u64);
        let mut list =
            |count| -> Vec<f32> { numbers.list(count).iter().map(|v| (8.0 * v).round()).collect() };
        Self { m, n, k, a: list(m * k), b: list(n * k), c: list(m * n) }
    }

    /// bf16 numbers with outliers.
    fn rough((m, n, k): (usize, usize, usize)) -> Self {
        let mut numbers = Numbers::new((m * n + k) as u64);
        let mut list = |count| -> Vec<f32> {
            let numbers = numbers.with_outliers(count, 1000.0);
            numbers.iter().map(|&v| bf16::from_f32(v).to_f32()).collect()
        };
        Self { m, n, k, a: list(m * k), b: list(n * k), c: list(m * n) }
    }

    /// Every element as one chain in the order of k, rounded after each step: the processor's
    /// result, bit for bit.
    fn chains(&self) -> Vec<f32> {
        let chain = |at| {
            let (a, b) = self.operands(at);
            a.iter().zip(b).fold(self.c[at], |sum, (a, b)| sum + a * b)
        };
        (0..self.c.len()).map(chain).collect()
    }

    /// Of an element of c.
    fn operands(&self, at: usize) -> (&[f32], &[f32]) {
        let (row, column) = (at / self.n, at % self.n);
        (&self.a[row * self.k..][..self.k], &self.b[column * self.k..][..self.k])
    }

    /// A tensor core adds the 16 exact products of a step and the sum so far at once: it aligns
    /// them to the largest and may drop what lies below the last place of that one, one part in 2²³
    /// for each of the 17, and again when it rounds. No term is larger than the sum of all sizes.
    fn check_on_tensor_cores(&self, name: &str, got: &[f32]) {
        for (at, (&got, &c)) in got.iter().zip(&self.c).enumerate() {
            let (a, b) = self.operands(at);
            let terms = || a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
            let size = f64::from(c).abs() + terms().map(f64::abs).sum::<f64>();
            let tolerance = (self.k / 16) as f64 * 36.0 * U * size;
            let what = format!("{name}, ({}, {}, {}), {at}", self.m, self.n, self.k);
            close(&what, got, f64::from(c) + terms().sum::<f64>(), tolerance);
        }
    }

    /// Whether `got`, from a device, is the product. Exact sums are the same everywhere.
    fn check(&self, is_exact: bool, name: &str, device: &Device, got: &[f32]) {
        if is_gpu(device) && !is_exact {
            self.check_on_tensor_cores(name, got);
            return;
        }
        let what = format!("{name}, ({}, {}, {})", self.m, self.n, self.k);
        assert_eq!(first_difference(got, &self.chains()), None, "{what}");
    }
}

fn upload_bf16(device: &Device, values: &[f32]) -> Buffer<bf16> {
    upload(device, values, 0)
}

/// Runs exact and rough products.
fn check_products(
    devices: &[(String, Device)],
    shape: (usize, usize, usize),
    run: impl Fn(&Device, &Product) -> Vec<f32>,
) {
    for (is_exact, product) in [(true, Product::exact(shape)), (false, Product::rough(shape))] {
        for (name, device) in devices {
            product.check(is_exact, name, device, &run(device, &product));
        }
    }
}

#[test]
#[cfg_attr(not(feature = "host-kernels"), ignore = "needs host kernels or a GPU")]
fn mma_multiplies_matrices() {
    let devices = devices();
    for steps in [1, 2, 5] {
        check_products(&devices, (16, 8, 16 * steps), |device, product| {
            let [a, b] = [&product.a, &product.b].map(|values| upload_bf16(device, values));
            let mut c = upload::<f32>(device, &product.c, 8);
            probes::mma(device, steps, &a, &b, &mut c).unwrap();
            let mut c = read(&c);
            assert!(all_nan(&c.split_off(128)), "beyond c");
            c
        });
    }
}

/// (rows, 64 `k_tiles`) as (`k_tiles`, rows, 64), the 16-byte chunks of row r at c ^ (r % 8).
fn swizzled(values: &[f32], rows: usize, k_tiles: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    for (at, &value) in values.iter().enumerate() {
        let (row, k) = (at / (64 * k_tiles), at % (64 * k_tiles));
        let chunk = (k % 64 / 8) ^ (row % 8);
        out[(k / 64 * rows + row) * 64 + chunk * 8 + k % 8] = value;
    }
    out
}

/// With mbarriers, bulk copies and register reallocation: a ring of two stages, gone round up to
/// three times.
#[test]
#[cfg_attr(not(feature = "host-kernels"), ignore = "needs host kernels or a GPU")]
fn wgmma_multiplies_matrices() {
    let mut devices = devices();
    devices.retain(|(_, device)| {
        !is_gpu(device) || matches!(device, Device::Cuda(cuda) if cuda.path() == MatrixPath::Wgmma)
    });
    for width in WGMMA_WIDTHS {
        for k_tiles in [1, 2, 5] {
            check_products(&devices, (128, width, 64 * k_tiles), |device, product| {
                let (upper, lower) = product.a.split_at(product.a.len() / 2);
                let halves = [upper, lower].map(|half| swizzled(half, 64, k_tiles));
                let a = upload_bf16(device, &halves.concat());
                let b = upload_bf16(device, &swizzled(&product.b, width, k_tiles));
                let mut c = upload::<f32>(device, &product.c, width);
                probes::wgmma(device, (width, k_tiles), &a, &b, &mut c).unwrap();
                let mut c = read(&c);
                assert!(all_nan(&c.split_off(128 * width)), "beyond c");
                c
            });
        }
    }
}

#[test]
#[cfg_attr(not(feature = "host-kernels"), ignore = "needs host kernels or a GPU")]
fn ldmatrix_hands_rows_or_columns_to_lanes() {
    let element = |matrix: usize, row: usize, column: usize| {
        (1000 * matrix + 100 * row + 10 * column + 7) as u32
    };
    let pair = |low: u32, high: u32| low | high << 16;
    let word = |at: usize| {
        let (matrix, row, column) = (at / 32, at / 4 % 8, at % 4 * 2);
        pair(element(matrix, row, column), element(matrix, row, column + 1))
    };
    let input: Vec<u32> = (0..128).map(word).collect();
    let want = |at: usize| {
        let (kind, lane, register) = (at / 128, at / 4 % 32, at % 4);
        let (g, q) = (lane / 4, lane % 4);
        match kind {
            2 | 3 if register > 1 => 0, // two matrices
            0 | 2 => pair(element(register, g, 2 * q), element(register, g, 2 * q + 1)),
            _ => pair(element(register, 2 * q, g), element(register, 2 * q + 1, g)),
        }
    };
    let want: Vec<u32> = (0..512).map(want).chain([UNSET; 4]).collect();
    for (name, device) in &devices() {
        let mut out = Buffer::upload(device, &[UNSET; 516]).unwrap();
        probes::ldmatrix(device, &Buffer::upload(device, &input).unwrap(), &mut out).unwrap();
        assert_eq!(read_u32(&out), want, "{name}");
    }
}

#[test]
#[cfg_attr(not(feature = "host-kernels"), ignore = "needs host kernels or a GPU")]
fn cp_async_copies_or_fills_with_zeros() {
    let devices = devices();
    for tiles in [1, 2, 3, 4, 8] {
        let chunks = 128 * tiles;
        for valid in [0, 1, 127, 128, 129, chunks - 1, chunks] {
            let valid = valid.min(chunks);
            // Exactly as long as what may be read.
            let input: Vec<u32> = (0..4 * valid as u32).map(|i| i * 3 + 1).collect();
            let mut want = input.clone();
            want.resize(4 * chunks, 0);
            want.resize(4 * chunks + 4, UNSET);
            for (name, device) in &devices {
                let mut out = Buffer::upload(device, &vec![UNSET; 4 * chunks + 4]).unwrap();
                let input = Buffer::upload(device, &input).unwrap();
                probes::cp_async(device, (tiles, valid), &input, &mut out).unwrap();
                assert_eq!(read_u32(&out), want, "{name}, {valid} of {chunks} chunks");
            }
        }
    }
}

/// Numbers of every size, the borders of the functions' ranges, and what is no number.
fn arguments() -> Vec<f32> {
    let mut x: Vec<f32> = (0..=u32::MAX).step_by(65_521).map(f32::from_bits).collect();
    x.extend((-9000..9000).map(|i| i as f32 / 100.0));
    // Where the logarithm's exponent hides nothing of its polynomial.
    x.extend((70_000..145_000).map(|i| i as f32 / 100_000.0));
    let borders = [0.0, 1.0, 87.3, 88.0, 88.5, 0.5f32.sqrt(), 2.0f32.sqrt(), f32::MIN_POSITIVE];
    for border in borders {
        let bits = border.to_bits();
        for bits in [bits.saturating_sub(1), bits, bits + 1] {
            x.extend([f32::from_bits(bits), -f32::from_bits(bits)]);
        }
    }
    // Ties of the rounding to bf16, to even and away from it.
    x.extend([0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_8000].map(f32::from_bits));
    x.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN]);
    x
}

/// The same number, to the bit, or both none.
#[track_caller]
fn same(name: &str, function: &str, x: f32, got: f32, want: f32) {
    let is_same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
    assert!(is_same, "{name}: {function}({x:e}) = {got:e} instead of {want:e}");
}

#[test]
#[cfg_attr(not(feature = "host-kernels"), ignore = "needs host kernels or a GPU")]
fn elementary_functions_are_the_processors_to_the_bit() {
    let x = arguments();
    for (name, device) in &devices() {
        let input = upload::<f32>(device, &x, 0);
        let [mut exp, mut ln] = [nans(device, x.len() + 1), nans(device, x.len() + 1)];
        let mut rounded = Buffer::upload(device, &vec![UNSET; x.len() + 1]).unwrap();
        probes::math(device, &input, &mut exp, &mut ln, &mut rounded).unwrap();
        let (exp, ln, rounded) = (read(&exp), read(&ln), read_u32(&rounded));
        for (i, &x) in x.iter().enumerate() {
            same(name, "exp", x, exp[i], probes::exp(x));
            // The logarithm is of normal positive numbers.
            if x.is_normal() && x > 0.0 {
                same(name, "ln", x, ln[i], probes::ln(x));
            }
            let half = |bits: u32| f32::from_bits(bits << 16);
            let round = |x: f32| <bf16 as Float>::from_f32(x).to_f32();
            same(name, "bf16, low half,", x, half(rounded[i] & 0xffff), round(x));
            same(name, "bf16, high half,", -x, half(rounded[i] >> 16), round(-x));
        }
        assert!(exp[x.len()].is_nan() && ln[x.len()].is_nan() && rounded[x.len()] == UNSET);
    }
}

/// What each lane of each warp is to get in each row of `probe_warp`.
fn warp_rows(x: &[u32]) -> Vec<u32> {
    let as_bits = |value: u32| (value as f32).to_bits();
    let whole = |modulus: u32| as_bits(x.iter().map(|v| v % modulus).sum());
    let mut out = Vec::new();
    for row in 0..WARP_ROWS {
        for thread in 0..128 {
            let (own, lane) = (x[thread], thread % 32);
            let warp = &x[thread - lane..][..32];
            let odd = x.iter().filter(|v| **v % 2 == 1).count();
            let hundreds = warp.iter().filter(|v| **v % 100 == 0).count();
            let thousandths = || warp.iter().map(|v| v % 1000);
            out.push(match row {
                0 => warp[lane ^ 5],
                1 => *warp.get(lane + 3).unwrap_or(&own),
                2 if lane < 3 => own,
                2 => warp[lane - 3],
                3 => warp[(lane * 7 + 3) % 32],
                4 if lane % 8 > 4 => own,
                4 => warp[lane + 3],
                5 => (0..32).map(|l| (warp[l] & 1) << l).sum(),
                6 => u32::from(hundreds > 0) + 2 * u32::from(hundreds == 0),
                7 => warp.iter().fold(0, |sum: u32, &v| sum.wrapping_add(v)),
                8 => *warp.iter().max().unwrap(),
                9 => warp.iter().map(|&v| v as i32).min().unwrap() as u32,
                10 => odd as u32,
                // Sums of whole numbers: exact in any order.
                11 => as_bits(thousandths().sum()),
                12 => as_bits(thousandths().max().unwrap()),
                13 => whole(1000),
                14 => whole(77),
                15 => warp[lane ^ if lane % 2 == 1 { 2 } else { 4 }],
                _ if thread < 64 => 0,
                _ => x[thread - 64],
            });
        }
    }
    out
}

#[test]
#[cfg_attr(not(feature = "host-kernels"), ignore = "needs host kernels or a GPU")]
fn warps_and_blocks_exchange_and_reduce() {
    // One warp has multiples of 100, the others none; half of the numbers are negative as i32.
    let spread = |i: u32| i.wrapping_mul(0x9e37_79b9) ^ 0x1234_5678;
    let number = |i: u32| spread(i) / 100 * 100 + if i / 32 == 2 { i % 3 * 50 } else { i % 99 + 1 };
    let x: Vec<u32> = (0..128).map(number).collect();
    let mut rows = warp_rows(&x);
    rows.resize(rows.len() + 4, UNSET);
    let largest = (1u64 << 40) + u64::from(*x.iter().max().unwrap());
    let devices = devices();
    for before in [0, largest + 1] {
        for (name, device) in &devices {
            let mut out = Buffer::upload(device, &vec![UNSET; rows.len()]).unwrap();
            let mut sum = Buffer::upload(device, &[41, UNSET]).unwrap();
            let words = [before as u32, (before >> 32) as u32, UNSET];
            let mut max = Buffer::upload(device, &words).unwrap();
            let x_buffer = Buffer::upload(device, &x).unwrap();
            probes::warp(device, &x_buffer, &mut out, &mut sum, &mut max).unwrap();
            let out = read_u32(&out);
            for (row, (got, want)) in out.chunks(128).zip(rows.chunks(128)).enumerate() {
                assert_eq!(got, want, "{name}: row {row}");
            }
            let total = x.iter().fold(41, |sum: u32, &v| sum.wrapping_add(v));
            assert_eq!(read_u32(&sum), [total, UNSET], "{name}: atomic sum");
            let most = largest.max(before);
            let words = [most as u32, (most >> 32) as u32, UNSET];
            assert_eq!(read_u32(&max), words, "{name}: atomic maximum");
        }
    }
}

/// The finaliser of `SplitMix64`.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Element (row, k) of a random weight of standard deviation 1: four of the eight bytes of a word
/// that is mixed from seed, row and k / 2; the lower ones for even k.
fn random_element(seed: u64, row: u64, k: u64) -> f32 {
    let counter = (row << 32) | (k / 2 * 2);
    let word = mix(mix(seed).wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let bytes = word.to_le_bytes();
    let half = if k.is_multiple_of(2) { &bytes[..4] } else { &bytes[4..] };
    let sum: u32 = half.iter().map(|&byte| u32::from(byte)).sum();
    (sum as f32 - 510.0) * 6.765_8e-3
}

#[test]
fn random_weights_are_a_function_of_seed_row_and_column() {
    let (n, k, seed, deviation) = (70, 136, 0x1234_5678_9abc_def0, 0.25);
    // Row i of x picks column i of the weight; the sums have one term that is not zero.
    let unit: Vec<f32> = (0..k * k).map(|at| f32::from(u8::from(at / k == at % k))).collect();
    let element = |at: usize| {
        let (column, row) = (at / n, at % n);
        let value = deviation * random_element(seed, row as u64, column as u64);
        bf16::from_f32(value).to_f32()
    };
    let want: Vec<f32> = (0..k * n).map(element).collect();
    let outputs = on_every_device::<bf16>((k + 6) * k, |device| {
        let weight = Weight::random(device, Dtype::Bf16, (n, k), seed, deviation, false).unwrap();
        let mut out = nans(device, k * n);
        matmul(device, k, &activations::<bf16>(device, k, &unit), &weight, &mut out).unwrap();
        vec![read(&out)]
    });
    for (name, outputs) in outputs {
        assert_eq!(outputs[0], want, "{name}");
    }
    let count = want.len() as f64;
    let moment =
        |power: i32| want.iter().map(|v| f64::from(*v / deviation).powi(power)).sum::<f64>();
    let (mean, variance) = (moment(1) / count, moment(2) / count);
    // Four standard deviations of the mean of `count` draws, and of their mean square.
    assert!(mean.abs() < 4.0 / count.sqrt(), "mean {mean}");
    assert!((variance - 1.0).abs() < 4.0 * (2.0 / count).sqrt(), "variance {variance}");
}
