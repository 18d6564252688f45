//! `experts`.

use half::bf16;
use inkling::{
    device::{Cpu, Device},
    ops::{
        experts::{Experts, ExpertsSizes, Routed, experts},
        matmul::{Activation, Weight, WeightSet, gate_turn, gated_matmul, interleave, matmul},
    },
};

use crate::{
    matmul::{chain_error, gated_row, matrix, pack, wanted, workspace},
    reference::ops::{Matrix, softmax},
    tools::{
        Numbers, Stored, U, activations, all_nan, close, families, first_difference,
        nan_activations, nans, on_every_device, read, read_u32,
    },
};

/// Features of gate and up are padded to whole panels with zeros.
const PANEL: usize = 16;

/// A mixture and rows for it.
struct Case {
    rows: usize,
    dim: usize,
    /// Without padding.
    ffn: usize,
    count: usize,
    used: usize,
    normalise: bool,
    activation: Activation,
    x: Vec<f32>,
    /// (count, dim)
    router: Vec<f32>,
    /// Of each expert: (ffn, dim), (ffn, dim), (dim, ffn).
    weights: Vec<[Vec<f32>; 3]>,
}

/// What one row's definition is.
struct Want {
    chosen: Vec<usize>,
    weights: Vec<f64>,
    /// How far a weight may be off, as a part of it.
    relative: f64,
}

impl Case {
    /// Rows for which the choice is clear, see [`Case::is_clear`]. `favourite`: the first expert of every row.
    fn new(
        (rows, dim, ffn): (usize, usize, usize),
        (count, used): (usize, usize),
        favourite: Option<usize>,
    ) -> Self {
        let mut numbers = Numbers::new((rows * 1_000_000 + dim * 1_000 + count) as u64);
        let mut scaled = |len: usize, scale: f32| -> Vec<f32> {
            numbers.with_outliers(len, 10.0).iter().map(|v| v * scale).collect()
        };
        let mut router = scaled(count * dim, 2.0 / (dim as f32).sqrt());
        let weights = (0..count)
            .map(|_| [scaled(ffn * dim, 0.25), scaled(ffn * dim, 0.25), scaled(dim * ffn, 0.25)])
            .collect();
        if let Some(favourite) = favourite {
            (0..count).for_each(|expert| router[expert * dim] = 0.0);
            router[favourite * dim] = 16.0;
        }
        let mut case = Self {
            rows,
            dim,
            ffn,
            count,
            used,
            normalise: rows % 2 == 1,
            activation: if count % 2 == 0 { Activation::Silu } else { Activation::GeluTanh },
            x: Vec::new(),
            router,
            weights,
        };
        while case.x.len() < rows * dim {
            let mut row = numbers.with_outliers(dim, 30.0);
            if favourite.is_some() {
                row[0] = 4.0;
            }
            if case.is_clear::<f32>(&row) && case.is_clear::<bf16>(&row) {
                case.x.extend(row);
            }
        }
        case
    }

    /// The logits in f64, and how far any of them may be off.
    fn logits<T: Stored>(&self, x: &[f32]) -> (Vec<f64>, f64) {
        let x: Vec<f64> = x.iter().map(|&v| T::nearest(v)).collect();
        let (logits, sizes) = wanted(&x, &matrix::<T>((self.count, self.dim), &self.router));
        (logits, chain_error(self.dim) * sizes.iter().copied().fold(0.0, f64::max))
    }

    /// Experts by descending logit, ties to the lowest id (the sort is stable).
    fn order(logits: &[f64]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        order
    }

    /// Whether the chosen, and the first that is not, are further apart than two logits may be off, so
    /// that every device must choose the same in the same order.
    fn is_clear<T: Stored>(&self, x: &[f32]) -> bool {
        let (logits, error) = self.logits::<T>(x);
        let order = Self::order(&logits);
        let last = self.count.min(self.used + 1);
        order[..last].windows(2).all(|of| logits[of[0]] - logits[of[1]] > 2.02 * error)
    }

    fn want<T: Stored>(&self, x: &[f32]) -> Want {
        let (logits, error) = self.logits::<T>(x);
        let mut chosen = Self::order(&logits);
        chosen.truncate(self.used);
        let p = softmax(&logits);
        let all: f64 = if self.normalise { chosen.iter().map(|&id| p[id]).sum() } else { 1.0 };
        let weights = chosen.iter().map(|&id| p[id] / all).collect();
        // exp(logit - max) of both terms of a quotient: twice the logits' error and the difference's
        // rounding, then two ulp; a sum of no more than `count` terms, and a quotient.
        let min = logits.iter().copied().fold(f64::INFINITY, f64::min);
        let exponent = 2.0 * error + U * (logits[chosen[0]] - min + 2.0 * error);
        let relative = (2.0 * exponent).exp_m1() + (self.count + 16) as f64 * U;
        Want { chosen, weights, relative }
    }

    fn padded(&self) -> usize {
        self.ffn.next_multiple_of(PANEL)
    }

    fn sizes(&self) -> ExpertsSizes {
        let (experts, used) = (self.count, self.used);
        ExpertsSizes { experts, used, dim: self.dim, ffn: self.padded() }
    }

    fn workspace(&self, rows: usize) -> usize {
        workspace(rows, self.dim).max(workspace(rows, self.padded()))
    }

    fn gate_up<T: Stored>(&self, device: &Device, [gate, up, _]: &[Vec<f32>; 3]) -> Weight {
        let (dim, turn) = (self.dim, gate_turn(device));
        let read_row = |row: usize, out: &mut [f32]| {
            let (is_up, row) = interleave(turn, row);
            let half = if is_up { up } else { gate };
            match row < self.ffn {
                true => out.copy_from_slice(&half[row * dim..][..dim]),
                false => out.fill(0.0),
            }
        };
        Weight::pack(device, T::DTYPE, (2 * self.padded(), dim), read_row).unwrap()
    }

    fn down<T: Stored>(&self, device: &Device, [_, _, down]: &[Vec<f32>; 3]) -> Weight {
        let read_row = |row: usize, out: &mut [f32]| {
            out.fill(0.0);
            out[..self.ffn].copy_from_slice(&down[row * self.ffn..][..self.ffn]);
        };
        Weight::pack(device, T::DTYPE, (self.dim, self.padded()), read_row).unwrap()
    }

    fn experts<T: Stored>(&self, device: &Device) -> Experts {
        let gate_up = self.weights.iter().map(|of| self.gate_up::<T>(device, of)).collect();
        let down = self.weights.iter().map(|of| self.down::<T>(device, of)).collect();
        Experts {
            router: pack(device, T::DTYPE, (self.count, self.dim), &self.router),
            gate_up: WeightSet::new(device, gate_up).unwrap(),
            down: WeightSet::new(device, down).unwrap(),
            used: self.used,
            normalise: self.normalise,
            activation: self.activation,
        }
    }

    /// The output of these rows and a row of NaNs behind, their experts, and the experts' weights.
    fn call<T: Stored>(
        &self,
        device: &Device,
        x: &[f32],
        of: &Experts,
        routed: &mut Routed<T>,
    ) -> Vec<Vec<f32>> {
        let rows = x.len() / self.dim;
        let x = activations::<T>(device, self.dim, x);
        let mut out = nans(device, (rows + 1) * self.dim);
        experts(device, rows, &x, of, routed, &mut out).unwrap();
        let chosen = read_u32(routed.chosen()).into_iter().map(|id| id as f32);
        let weights = read(routed.weights())[..rows * self.used].to_vec();
        vec![read(&out), chosen.take(rows * self.used).collect(), weights]
    }

    /// All rows, in room for a few more that held rows of NaNs before.
    fn run<T: Stored>(&self, device: &Device) -> Vec<Vec<f32>> {
        let of = self.experts::<T>(device);
        let mut routed = Routed::<T>::new(device, self.rows + 3, self.sizes()).unwrap();
        let dead = vec![f32::NAN; (self.rows + 3) * self.dim];
        self.call(device, &dead, &of, &mut routed);
        self.call(device, &self.x, &of, &mut routed)
    }

    fn check<T: Stored>(&self) {
        let run = |device: &Device| self.run::<T>(device);
        let matrices: Vec<[Matrix; 3]> =
            self.weights.iter().map(|of| self.matrices::<T>(of)).collect();
        for (device, outputs) in on_every_device::<T>(self.workspace(self.rows + 3), run) {
            let (count, used) = (self.count, self.used);
            let case =
                format!("{device} ({}, {}, {}) {used} of {count}", self.rows, self.dim, self.ffn);
            self.check_outputs::<T>(&case, &matrices, &outputs);
        }
    }

    fn matrices<T: Stored>(&self, [gate, up, down]: &[Vec<f32>; 3]) -> [Matrix; 3] {
        let (dim, ffn) = (self.dim, self.ffn);
        [matrix::<T>((ffn, dim), gate), matrix::<T>((ffn, dim), up), matrix::<T>((dim, ffn), down)]
    }

    fn check_outputs<T: Stored>(&self, case: &str, experts: &[[Matrix; 3]], outputs: &[Vec<f32>]) {
        let (dim, used) = (self.dim, self.used);
        let [out, chosen, weights] = outputs else { panic!("three outputs") };
        for (row, x) in self.x.chunks_exact(dim).enumerate() {
            let want = self.want::<T>(x);
            let got: Vec<usize> =
                chosen[row * used..][..used].iter().map(|&id| id as usize).collect();
            assert_eq!(got, want.chosen, "{case} row {row}");
            for (&got, &weight) in weights[row * used..][..used].iter().zip(&want.weights) {
                close(&format!("{case} row {row} weight"), got, weight, want.relative * weight);
            }
            let x: Vec<f64> = x.iter().map(|&v| T::nearest(v)).collect();
            let (values, tolerances) = self.sum::<T>(&x, &want, experts);
            for (column, (&value, &tolerance)) in values.iter().zip(&tolerances).enumerate() {
                let at = format!("{case} row {row} column {column}");
                close(&at, out[row * dim + column], value, 1.01 * tolerance);
            }
        }
        assert!(all_nan(&out[self.rows * dim..]), "{case}: other rows were written");
    }

    /// The weighted sum of one row, and how far it may be off.
    fn sum<T: Stored>(
        &self,
        x: &[f64],
        want: &Want,
        experts: &[[Matrix; 3]],
    ) -> (Vec<f64>, Vec<f64>) {
        let (mut values, mut tolerances) = (vec![0.0; self.dim], vec![0.0; self.dim]);
        for (&id, &weight) in want.chosen.iter().zip(&want.weights) {
            let [gate, up, down] = &experts[id];
            let gated = gated_row::<T>(x, (gate, up), self.activation);
            let inner: Vec<f64> = gated.iter().map(|(value, _)| *value).collect();
            for column in 0..self.dim {
                let terms = || down.row(column).iter().zip(&gated);
                let value: f64 = down.row(column).iter().zip(&inner).map(|(d, g)| d * g).sum();
                let carried: f64 = terms().map(|(d, (_, error))| d.abs() * error).sum();
                let size: f64 = terms().map(|(d, (g, error))| d.abs() * (g.abs() + error)).sum();
                let error = carried + chain_error(self.padded()) * size;
                values[column] += weight * value;
                // The weight's own error, the product's, and the roundings of the sum's chain.
                let relative = want.relative + self.used as f64 * U;
                tolerances[column] += weight * ((1.0 + relative) * error + relative * value.abs());
            }
        }
        (values, tolerances)
    }
}

/// Rows, dim, ffn, experts, used. Around the tiles of tokens; widths that are no multiple of a tile or a panel.
const SHAPES: [[usize; 5]; 16] = [
    [1, 72, 40, 5, 2],
    [7, 72, 40, 5, 2],
    [65, 72, 40, 5, 2],
    [200, 72, 40, 5, 2],
    // One expert; all of them.
    [9, 72, 40, 1, 1],
    [33, 64, 48, 4, 4],
    [200, 72, 24, 2, 2],
    // Tiles of 128 and of 256 tokens.
    [100, 72, 136, 2, 2],
    [300, 72, 136, 2, 2],
    // Most experts have no rows; no more than a warp's lanes, and one more.
    [1, 72, 24, 128, 8],
    [5, 136, 24, 128, 8],
    [40, 72, 24, 32, 3],
    [6, 72, 24, 33, 32],
    // Several stages of k, and tiles of features.
    [20, 648, 200, 6, 3],
    [64, 200, 136, 3, 1],
    [130, 136, 72, 3, 2],
];

#[test]
fn a_mixture_is_the_weighted_sum_of_its_experts() {
    for [rows, dim, ffn, count, used] in SHAPES {
        let mut case = Case::new((rows, dim, ffn), (count, used), None);
        case.check::<bf16>();
        case.check::<f32>();
        case.normalise = !case.normalise;
        case.check::<bf16>();
    }
}

#[test]
fn all_rows_may_go_to_one_expert() {
    for (rows, of) in [(3, (5, 1)), (70, (5, 1)), (65, (6, 2))] {
        let case = Case::new((rows, 72, 40), of, Some(3));
        case.check::<bf16>();
        case.check::<f32>();
    }
}

#[test]
fn a_row_of_a_mixture_does_not_depend_on_its_batch() {
    check_rows::<f32>();
    check_rows::<bf16>();
}

/// Alone, in other batches and between rows of NaNs; with one thread and several.
fn check_rows<T: Stored>() {
    let case = Case::new((150, 72, 40), (7, 3), None);
    let dim = case.dim;
    let rows = |x: &[f32], first: usize, count: usize| x[first * dim..][..count * dim].to_vec();
    let run = |device: &Device| {
        let of = case.experts::<T>(device);
        let mut routed = Routed::<T>::new(device, 300, case.sizes()).unwrap();
        let mut call = |x: &[f32]| case.call(device, x, &of, &mut routed);
        let batch = call(&case.x);
        for first in [0, 1, 64, 149] {
            for count in [1, 4, 20, 70].into_iter().filter(|count| first + count <= case.rows) {
                let some = call(&rows(&case.x, first, count));
                let (some, in_batch) = (&some[0][..count * dim], rows(&batch[0], first, count));
                assert_eq!(first_difference(some, &in_batch), None, "{count} from {first}");
            }
        }
        check_among_dead(&case, &batch, call);
        batch
    };
    let alone = on_every_device::<T>(case.workspace(300), run);
    for (family, isas) in families::<T>() {
        let several = Device::Cpu(Cpu::new(isas[0], 3, case.workspace(300)).unwrap());
        let one = alone.iter().find(|(name, _)| *name == family).expect("the same families");
        for (several, one) in run(&several).iter().zip(&one.1) {
            assert_eq!(first_difference(several, one), None, "{family}: threads");
        }
    }
}

/// Rows that are not of numbers get valid experts, NaN, and no influence.
fn check_among_dead(
    case: &Case,
    batch: &[Vec<f32>],
    mut call: impl FnMut(&[f32]) -> Vec<Vec<f32>>,
) {
    let (dim, used) = (case.dim, case.used);
    let mut x = Vec::new();
    for (row, values) in case.x.chunks_exact(dim).enumerate() {
        // The first has all its bits, as a GPU's own NaN.
        let dead = [f32::from_bits(0x7fff_ffff), -f32::NAN, f32::INFINITY][row % 3];
        x.extend(values);
        x.resize(x.len() + dim, dead);
    }
    let outputs = call(&x);
    for row in 0..case.rows {
        let alive = &outputs[0][2 * row * dim..][..dim];
        assert_eq!(first_difference(alive, &batch[0][row * dim..][..dim]), None, "row {row}");
        assert!(all_nan(&outputs[0][(2 * row + 1) * dim..][..dim]), "the row after {row}");
        let mut chosen = outputs[1][(2 * row + 1) * used..][..used].to_vec();
        chosen.sort_by(f32::total_cmp);
        let distinct = chosen.windows(2).all(|of| of[0] < of[1]);
        assert!(distinct && chosen[used - 1] < case.count as f32, "experts {chosen:?}");
    }
}

#[test]
fn ties_go_to_the_lowest_expert() {
    let mut case = Case::new((9, 72, 40), (40, 6), None);
    // Experts e and e + 20 have the same logit; then all have.
    let (half, all) = (20 * case.dim, 40 * case.dim);
    case.router.copy_within(..half, half);
    let outputs = on_every_device::<bf16>(case.workspace(12), |device| case.run::<bf16>(device));
    for (device, outputs) in outputs {
        for (chosen, weights) in outputs[1].chunks_exact(2).zip(outputs[2].chunks_exact(2)) {
            assert!(chosen[0] + 20.0 == chosen[1], "{device}: {chosen:?}");
            assert!(weights[0] == weights[1], "{device}: {weights:?}");
        }
    }
    case.router[..all].fill(0.0);
    for normalise in [false, true] {
        case.normalise = normalise;
        let run = |device: &Device| case.run::<bf16>(device);
        for (device, outputs) in on_every_device::<bf16>(case.workspace(12), run) {
            for (chosen, weights) in outputs[1].chunks_exact(6).zip(outputs[2].chunks_exact(6)) {
                assert_eq!(chosen, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "{device}");
                let want = if normalise { 1.0 / 6.0 } else { 1.0 / 40.0 };
                assert_eq!(weights, [want; 6], "{device}");
            }
        }
    }
}

/// Where the logits are exact, all devices choose the same experts with the same weights, bit for bit.
#[test]
fn routes_of_the_same_logits_are_the_same_everywhere() {
    let mut case = Case::new((50, 72, 16), (70, 8), None);
    // Multiples of 1/8 below 2⁹: sums of 72 such products are exact in any order.
    case.x.iter_mut().for_each(|v| *v = (*v * 4.0).round().clamp(-8.0, 8.0));
    case.router.iter_mut().for_each(|v| *v = (*v * 8.0).round().clamp(-8.0, 8.0) / 8.0);
    for normalise in [false, true] {
        case.normalise = normalise;
        let run = |device: &Device| case.run::<bf16>(device);
        let outputs = on_every_device::<bf16>(case.workspace(53), run);
        let (first, want) = &outputs[0];
        for (device, outputs) in &outputs[1..] {
            assert_eq!(outputs[1], want[1], "experts: {first} and {device}");
            assert_eq!(first_difference(&outputs[2], &want[2]), None, "{first} and {device}");
        }
    }
}

/// A mixture of one expert is the MLP, bit for bit.
#[test]
fn one_expert_is_the_mlp() {
    for rows in [1, 20, 90] {
        let case = Case::new((rows, 136, 72), (1, 1), None);
        on_every_device::<bf16>(case.workspace(rows + 3), |device| {
            let mixture = case.run::<bf16>(device).swap_remove(0);
            let [gate_up, down] = [
                case.gate_up::<bf16>(device, &case.weights[0]),
                case.down::<bf16>(device, &case.weights[0]),
            ];
            let x = activations::<bf16>(device, case.dim, &case.x);
            let mut gated = nan_activations::<bf16>(device, rows, case.padded());
            gated_matmul(device, rows, &x, &gate_up, case.activation, &mut gated).unwrap();
            let mut out = nans(device, (rows + 1) * case.dim);
            matmul(device, rows, &gated, &down, &mut out).unwrap();
            assert_eq!(first_difference(&mixture, &read(&out)), None, "{rows} rows");
            vec![mixture]
        });
    }
}
