//! `matmul` and `gated_matmul`.

use std::fmt::{Display, Formatter, Result};

use half::bf16;
use inkling::{
    device::Device,
    ops::matmul::{Dtype, Weight, gated_matmul, interleave, matmul},
};

use crate::{
    reference::ops::{Matrix, gated, matmul as products},
    tools::{Numbers, Stored, U, all_nan, close, first_difference, nans, on_every_isa},
    tools::{read, sizes, upload},
};

/// (m, n, k): x is (m, k), the weight (n, k). Around the register tile (6 rows), the pass over a
/// panel (96 rows), the panel (16 columns) and the block of k (256).
fn shapes() -> Vec<(usize, usize, usize)> {
    let mut shapes = vec![(95, 17, 257), (96, 17, 40), (97, 17, 257), (200, 33, 40)];
    for n in [1, 15, 16, 17, 33, 50] {
        for k in [1, 255, 256, 257, 600] {
            shapes.extend([1, 2, 5, 6, 7, 12, 13].map(|m| (m, n, k)));
        }
    }
    shapes
}

/// Names an output: the shape, its row and its column.
struct At((usize, usize, usize), usize, usize);

impl Display for At {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "{:?} row {} column {}", self.0, self.1, self.2)
    }
}

fn pack(device: &Device, dtype: Dtype, (n, k): (usize, usize), values: &[f32]) -> Weight {
    let read_row = |row: usize, out: &mut [f32]| out.copy_from_slice(&values[row * k..][..k]);
    Weight::pack(device, dtype, (n, k), read_row).unwrap()
}

/// The weight as it is stored.
fn matrix<T: Stored>((rows, cols): (usize, usize), values: &[f32]) -> Matrix {
    Matrix { rows, cols, data: values.iter().map(|&v| T::nearest(v)).collect() }
}

/// Of each output: its value, and the sum of its terms' sizes.
fn outputs(x: &[f64], weight: &Matrix) -> (Vec<f64>, Vec<f64>) {
    let size = Matrix { data: sizes(&weight.data), ..*weight };
    (products(x, weight), products(&sizes(x), &size))
}

/// A chain of k fused multiply-adds, cut into at most three blocks.
fn chain_error(k: usize) -> f64 {
    (k + 4) as f64 * U
}

fn multiply<T: Stored>(x: &[f32], (n, k): (usize, usize), weight: &[f32]) -> Vec<f32> {
    let m = x.len() / k;
    let mut outputs = on_every_isa((m + 6) * k, |device| {
        let x = upload::<T>(device, x, k);
        let weight = pack(device, T::DTYPE, (n, k), weight);
        let mut out = nans(device, (m + 1) * n);
        matmul(device, m, &x, &weight, &mut out);
        vec![read(&out)]
    });
    outputs.remove(0)
}

fn check_matmul<T: Stored>() {
    for (m, n, k) in shapes() {
        let mut numbers = Numbers::new((m * 1_000_000 + n * 1_000 + k) as u64);
        let x = numbers.with_outliers(m * k, 1000.0);
        let weight = numbers.with_outliers(n * k, 1000.0);
        let got = multiply::<T>(&x, (n, k), &weight);
        let weight = matrix::<T>((n, k), &weight);
        for (row, x) in x.chunks_exact(k).enumerate() {
            let x: Vec<f64> = x.iter().map(|&v| T::nearest(v)).collect();
            let (want, size) = outputs(&x, &weight);
            let got = got[row * n..].iter().zip(want.iter().zip(&size));
            for (column, (&got, (&want, size))) in got.enumerate() {
                let tolerance = chain_error(k) * size;
                close(&At((m, n, k), row, column), got, want, tolerance);
            }
        }
        assert!(all_nan(&got[m * n..]), "({m}, {n}, {k}): rows that are not active were written");
    }
}

#[test]
fn matmul_of_f32() {
    check_matmul::<f32>();
}

#[test]
fn matmul_of_bf16() {
    check_matmul::<bf16>();
}

#[test]
fn a_row_of_matmul_does_not_depend_on_its_batch() {
    let (m, n, k) = (100, 50, 600);
    let mut numbers = Numbers::new(1);
    let x = numbers.with_outliers(m * k, 1000.0);
    let weight = numbers.with_outliers(n * k, 1000.0);
    let batch = multiply::<f32>(&x, (n, k), &weight);
    for row in [0, 1, 5, 6, 95, 96, 99] {
        let alone = multiply::<f32>(&x[row * k..][..k], (n, k), &weight);
        let in_batch = &batch[row * n..][..n];
        assert_eq!(first_difference(&alone[..n], in_batch), None, "row {row}");
    }
}

#[test]
fn gate_and_up_stand_in_turns_of_a_panel() {
    let mut want = Vec::new();
    for block in 0..3 {
        for is_up in [false, true] {
            want.extend((0..16).map(|lane| (is_up, block * 16 + lane)));
        }
    }
    let got: Vec<(bool, usize)> = (0..want.len()).map(interleave).collect();
    assert_eq!(got, want);
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

    fn run<T: Stored>(&self) -> Vec<f32> {
        let (rows, width, k) = (self.rows, self.width, self.k);
        let mut outputs = on_every_isa((rows + 6) * k, |device| {
            let x = upload::<T>(device, &self.x, k);
            let read_row = |row: usize, out: &mut [f32]| {
                let (is_up, row) = interleave(row);
                let half = if is_up { &self.up } else { &self.gate };
                out.copy_from_slice(&half[row * k..][..k]);
            };
            let weight = Weight::pack(device, T::DTYPE, (2 * width, k), read_row).unwrap();
            let mut out = nans::<T>(device, (rows + 1) * width);
            gated_matmul(device, rows, &x, &weight, &mut out);
            vec![read(&out)]
        });
        outputs.remove(0)
    }

    fn check<T: Stored>(&self) {
        /// The exponential ends at 1.65e38, so a shut gate lets 1e-38 of its input through.
        const LEAK: f64 = 1e-24;
        /// Slope of silu; it is nowhere steeper.
        const SLOPE: f64 = 1.1;
        let (rows, width, k) = (self.rows, self.width, self.k);
        let got = self.run::<T>();
        let gate = matrix::<T>((width, k), &self.gate);
        let up = matrix::<T>((width, k), &self.up);
        for (row, x) in self.x.chunks_exact(k).enumerate() {
            let x: Vec<f64> = x.iter().map(|&v| T::nearest(v)).collect();
            let ((gate, gate_size), (up, up_size)) = (outputs(&x, &gate), outputs(&x, &up));
            for (column, &want) in gated(&gate, &up).iter().enumerate() {
                let gate_error = SLOPE * chain_error(k) * gate_size[column];
                let up_error = chain_error(k) * up_size[column];
                let carried =
                    gate_error * (up[column].abs() + up_error) + gate[column].abs() * up_error;
                // Two ulp of the exponential, a sum, a quotient, a product; the result's type.
                let own = (8.0 * U + T::ROUNDOFF) * want.abs();
                let tolerance = 1.01 * (carried + own) + LEAK;
                close(
                    &At((rows, width, k), row, column),
                    got[row * width + column],
                    want,
                    tolerance,
                );
            }
        }
        assert!(all_nan(&got[rows * width..]), "rows that are not active were written");
    }
}

#[test]
fn gated_matmul_is_silu_of_gate_times_up() {
    for width in [16, 48] {
        for k in [1, 17, 256, 257] {
            for rows in [1, 6, 7, 13] {
                let case = Gated::new(rows, width, k);
                case.check::<f32>();
                case.check::<bf16>();
            }
        }
    }
}
