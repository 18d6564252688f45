//! `matmul` and `gated_matmul`.

use std::fmt::{Display, Formatter, Result};

use half::bf16;
use inkling::{
    device::Device,
    ops::matmul::{Activation, Dtype, Weight, gate_turn, gated_matmul, interleave, matmul},
};

use crate::{
    reference::ops::{Matrix, gated, matmul as products, silu},
    tools::{
        Numbers, Stored, U, activations, activations_before, all_nan, close, first_difference,
    },
    tools::{kernel_devices, nan_activations, nans, on_every_device, on_every_family, read},
    tools::{read_rows, sizes},
};

/// (m, n, k): x is (m, k), the weight (n, k). Around the register tile (6 or 8 rows, 16 with AMX),
/// the pass over a panel (96 rows), the panel (16 columns), and the block of k (256; in pairs: 32).
fn shapes() -> Vec<(usize, usize, usize)> {
    let mut shapes = vec![(95, 17, 257), (96, 17, 40), (97, 17, 257), (200, 33, 40)];
    shapes.extend([15, 16, 17, 31, 32, 33, 48].map(|m| (m, 49, 65)));
    // AMX takes tiles of k in parts where there are more than 32 rows, 16 blocks of rows at a time, and
    // writes whole ones itself.
    shapes.extend([33, 48, 64, 65, 80, 96, 112, 300].map(|m| (m, 49, 352)));
    shapes.extend([32, 48, 256].map(|m| (m, 64, 672)));
    // Rows come in parts whose x stays in the cache: three.
    shapes.push((520, 33, 2080));
    // Few rows take up to 8 panels at a time.
    shapes.extend([1, 2, 3, 4].map(|m| (m, 250, 65)));
    for n in [1, 15, 16, 17, 33, 50] {
        for k in [1, 31, 32, 33, 255, 256, 257, 600] {
            shapes.extend((1..=9).chain([12, 13]).map(|m| (m, n, k)));
        }
    }
    shapes
}

/// f32s that products of so many rows of so many elements need: the rows, or tiles of bf16.
pub fn workspace(rows: usize, k: usize) -> usize {
    (rows * k).max(rows.next_multiple_of(16) * k.next_multiple_of(32) / 2)
}

/// Likewise around the kernels' tiles: 8 to 256 rows, 64 and 128 features, 64 of k. A block of the
/// last two goes around its ring of stages, with several tiles and with one.
fn kernel_shapes() -> Vec<(usize, usize, usize)> {
    let mut shapes = vec![(300, 136, 64), (257, 8, 128), (129, 200, 72)];
    for (n, k) in [(1, 8), (8, 64), (63, 72), (65, 136), (130, 320)] {
        shapes.extend([1, 7, 8, 9, 17, 33, 65, 130].map(|m| (m, n, k)));
    }
    shapes.extend([(9, 1500, 136), (40, 64, 1000)]);
    shapes
}

/// Names an output: the device, the shape, its row and its column.
struct At<'a>(&'a str, (usize, usize, usize), usize, usize);

impl Display for At<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "{} {:?} row {} column {}", self.0, self.1, self.2, self.3)
    }
}

pub fn pack(device: &Device, dtype: Dtype, (n, k): (usize, usize), values: &[f32]) -> Weight {
    let read_row = |row: usize, out: &mut [f32]| out.copy_from_slice(&values[row * k..][..k]);
    Weight::pack(device, dtype, (n, k), read_row).unwrap()
}

/// The weight as it is stored.
pub fn matrix<T: Stored>((rows, cols): (usize, usize), values: &[f32]) -> Matrix {
    Matrix { rows, cols, data: values.iter().map(|&v| T::nearest(v)).collect() }
}

/// Of each output: its value, and the sum of its terms' sizes.
pub fn wanted(x: &[f64], weight: &Matrix) -> (Vec<f64>, Vec<f64>) {
    let size = Matrix { data: sizes(&weight.data), ..*weight };
    (products(x, weight), products(&sizes(x), &size))
}

/// A chain of k multiplications and additions, cut into at most three blocks on the processor; a
/// tensor core may drop what falls below the largest of the 17 terms of a step, in f32. With AMX a
/// term goes through at most min(k, 16) roundings of its chain, those of k / 32 sums and one more: no
/// more than k + 2. In pairs it goes through at most k of one chain. (Inputs are multiples of 2⁻²⁵,
/// so no sum of products is denormal.)
pub fn chain_error(k: usize) -> f64 {
    (2 * k + 4) as f64 * U
}

/// The product, and a row of NaNs behind it. Where there are rows enough behind x AMX reads it as it is;
/// otherwise it is packed: the same bits.
fn multiply<T: Stored>(
    device: &Device,
    x: &[f32],
    (n, k): (usize, usize),
    weight: &[f32],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let m = x.len() / k;
    let mut weight = pack(device, T::DTYPE, (n, k), weight);
    if let Some(bias) = bias {
        weight = weight.with_bias(device, bias).unwrap();
    }
    let [packed, as_it_is] = [0, 16].map(|nan_rows| {
        let x = activations_before::<T>(device, k, x, nan_rows);
        let mut out = nans(device, (m + 1) * n);
        matmul(device, m, &x, &weight, &mut out).unwrap();
        read(&out)
    });
    assert_eq!(first_difference(&packed, &as_it_is), None, "({m}, {n}, {k}), packed or not");
    packed
}

fn check_matmul<T: Stored>(shapes: Vec<(usize, usize, usize)>, on: &[(String, Device)]) {
    for (m, n, k) in shapes {
        let mut numbers = Numbers::new((m * 1_000_000 + n * 1_000 + k) as u64);
        let x = numbers.with_outliers(m * k, 1000.0);
        let weight = numbers.with_outliers(n * k, 1000.0);
        let bias = numbers.with_outliers(n, 1000.0);
        let bias = (m % 2 == 1).then_some(&bias[..]);
        let mut results = Vec::new();
        if on.is_empty() {
            results = on_every_family::<T>(workspace(m, k), |device| {
                vec![multiply::<T>(device, &x, (n, k), &weight, bias)]
            });
        }
        for (name, device) in on {
            let product = multiply::<T>(device, &x, (n, k), &weight, bias);
            results.push((name.clone(), vec![product]));
        }
        let weight = matrix::<T>((n, k), &weight);
        for (name, outputs) in results {
            let (name, got) = (&name, &outputs[0]);
            for (row, x) in x.chunks_exact(k).enumerate() {
                let x: Vec<f64> = x.iter().map(|&v| T::nearest(v)).collect();
                let (want, size) = wanted(&x, &weight);
                for (column, (&want, size)) in want.iter().zip(&size).enumerate() {
                    let bias = bias.map_or(0.0, |bias| f64::from(bias[column]));
                    let tolerance = chain_error(k) * (size + bias.abs());
                    let got = got[row * n + column];
                    close(&At(name, (m, n, k), row, column), got, want + bias, tolerance);
                }
            }
            assert!(all_nan(&got[m * n..]), "{name} ({m}, {n}, {k}): other rows were written");
        }
    }
}

#[test]
fn matmul_of_f32() {
    check_matmul::<f32>(shapes(), &[]);
}

#[test]
fn matmul_of_bf16() {
    check_matmul::<bf16>(shapes(), &[]);
}

#[test]
fn matmul_of_bf16_by_kernels() {
    check_matmul::<bf16>(kernel_shapes(), &kernel_devices());
}

#[test]
fn a_row_of_matmul_does_not_depend_on_its_batch() {
    check_rows::<f32>(100, &[0, 1, 5, 6, 95, 96, 99], (50, 600));
    check_rows::<bf16>(270, &[0, 1, 7, 8, 15, 16, 63, 64, 127, 128, 269], (72, 200));
    // Rows in parts, and k too.
    check_rows::<bf16>(400, &[0, 31, 127, 128, 159, 160, 191, 192, 300], (40, 2080));
}

/// Alone, in batches of several tiles, and in one of all rows.
fn check_rows<T: Stored>(m: usize, rows: &[usize], (n, k): (usize, usize)) {
    let mut numbers = Numbers::new(1);
    let x = numbers.with_outliers(m * k, 1000.0);
    let weight = numbers.with_outliers(n * k, 1000.0);
    on_every_device::<T>(workspace(m, k), |device| {
        let multiply = |x: &[f32]| multiply::<T>(device, x, (n, k), &weight, None);
        let batch = multiply(&x);
        for &row in rows {
            for count in [1, 9, 20, 40, 100].into_iter().filter(|count| row + count <= m) {
                let some = multiply(&x[row * k..][..count * k]);
                let in_batch = &batch[row * n..][..count * n];
                assert_eq!(first_difference(&some[..count * n], in_batch), None, "row {row}");
            }
        }
        vec![batch]
    });
}

#[test]
fn gate_and_up_stand_in_turns() {
    for turn in [8, 16] {
        let mut want = Vec::new();
        for block in 0..3 {
            for is_up in [false, true] {
                want.extend((0..turn).map(|lane| (is_up, block * turn + lane)));
            }
        }
        let got: Vec<(bool, usize)> = (0..want.len()).map(|row| interleave(turn, row)).collect();
        assert_eq!(got, want);
    }
}

/// Inputs of one gated product; both halves are (`width`, k).
struct Gated {
    rows: usize,
    width: usize,
    k: usize,
    x: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

impl Gated {
    fn new(rows: usize, width: usize, k: usize) -> Self {
        let mut numbers = Numbers::new((rows * 1_000_000 + width * 1_000 + k) as u64);
        // With outliers nearly every gate is shut or open: some cases have none.
        let factor = if rows == 6 { 1.0 } else { 1000.0 };
        let x = numbers.with_outliers(rows * k, factor);
        let mut half =
            || -> Vec<f32> { numbers.list(width * k).iter().map(|v| v * 0.25).collect() };
        Self { rows, width, k, x, gate: half(), up: half() }
    }

    fn run<T: Stored>(&self, device: &Device, activation: Activation) -> Vec<f32> {
        let (rows, width, k) = (self.rows, self.width, self.k);
        let x = activations::<T>(device, k, &self.x);
        let turn = gate_turn(device);
        let read_row = |row: usize, out: &mut [f32]| {
            let (is_up, row) = interleave(turn, row);
            let half = if is_up { &self.up } else { &self.gate };
            out.copy_from_slice(&half[row * k..][..k]);
        };
        let weight = Weight::pack(device, T::DTYPE, (2 * width, k), read_row).unwrap();
        let mut out = nan_activations::<T>(device, rows + 1, width);
        gated_matmul(device, rows, &x, &weight, activation, &mut out).unwrap();
        read_rows(&out)
    }

    fn check<T: Stored>(&self, name: &str, activation: Activation, got: &[f32]) {
        let (rows, width, k) = (self.rows, self.width, self.k);
        let gate = matrix::<T>((width, k), &self.gate);
        let up = matrix::<T>((width, k), &self.up);
        for (row, x) in self.x.chunks_exact(k).enumerate() {
            let x: Vec<f64> = x.iter().map(|&v| T::nearest(v)).collect();
            let row_of = gated_row::<T>(&x, (&gate, &up), activation);
            for (column, &(want, tolerance)) in row_of.iter().enumerate() {
                let at = At(name, (rows, width, k), row, column);
                close(&at, got[row * width + column], want, tolerance);
            }
        }
        assert!(all_nan(&got[rows * width..]), "{name}: rows that are not active were written");
    }

    fn check_everywhere<T: Stored>(&self, activation: Activation) {
        let kernels_take_it = self.k.is_multiple_of(8);
        let run = |device: &Device| vec![self.run::<T>(device, activation)];
        let workspace = workspace(self.rows, self.k);
        let outputs = match kernels_take_it {
            true => on_every_device::<T>(workspace, run),
            false => on_every_family::<T>(workspace, run),
        };
        for (name, outputs) in outputs {
            self.check::<T>(&name, activation, &outputs[0]);
        }
    }
}

/// Of each feature of one row: `act(gate) * up`, and how far it may be off.
pub fn gated_row<T: Stored>(
    x: &[f64],
    (gate, up): (&Matrix, &Matrix),
    activation: Activation,
) -> Vec<(f64, f64)> {
    /// The exponential ends at 1.65e38, so a shut gate lets 1e-38 of its input through.
    const LEAK: f64 = 1e-24;
    /// Slope of silu and gelu; they are nowhere steeper.
    const SLOPE: f64 = 1.13;
    let chain = chain_error(x.len());
    let ((gate, gate_size), (up, up_size)) = (wanted(x, gate), wanted(x, up));
    let values = gated(&gate, &up, |x| define(activation, x));
    let tolerance = |(column, &want): (usize, &f64)| {
        let gate_error = SLOPE * chain * gate_size[column];
        let up_error = chain * up_size[column];
        let carried = gate_error * (up[column].abs() + up_error) + gate[column].abs() * up_error;
        // The exponential's two ulp, and what the rounding of its argument makes of it: no more
        // than e⁻ʸ·y < 1 of the gate's input. A sum, a quotient, a product; the result's type.
        let steep = if activation == Activation::Silu { 0.0 } else { 8.0 };
        let own = (8.0 * U + T::ROUNDOFF) * want.abs()
            + steep * U * gate[column].abs() * up[column].abs();
        (want, 1.01 * (carried + own) + LEAK)
    };
    values.iter().enumerate().map(tolerance).collect()
}

fn define(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => silu(x),
        Activation::GeluTanh => {
            let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + y.tanh())
        }
    }
}

#[test]
fn gated_matmul_is_the_activation_of_gate_times_up() {
    for width in [16, 48, 80] {
        for k in [1, 17, 72, 256, 257] {
            for rows in [1, 6, 7, 13, 17, 33] {
                let case = Gated::new(rows, width, k);
                case.check_everywhere::<f32>(Activation::Silu);
                case.check_everywhere::<bf16>(Activation::Silu);
                case.check_everywhere::<bf16>(Activation::GeluTanh);
            }
        }
    }
}
