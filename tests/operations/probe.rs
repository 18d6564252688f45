//! `probe`.

use half::bf16;
use inkling::{
    device::{Buffer, Device},
    ops::{
        probe::{Probe, ProbeItem, probe},
        rows::NONE,
    },
};

use crate::{
    reference::ops::{dot, norm},
    tools::{Numbers, U, all_nan, close, first_difference, nans, on_every_device, on_every_isa},
    tools::{read, sizes, upload, widen},
};

/// Rows of the stream, and which of them are probed: some twice, some never.
const STREAM: usize = 11;
const CHOSEN: [u32; 9] = [3, NONE, 10, 0, 3, 7, NONE, 1, 10];

/// One shape.
struct Case {
    dim: usize,
    probes: usize,
    resid: Vec<f32>,
    /// (2 · probes, dim)
    vectors: Vec<f32>,
}

impl Case {
    fn new(dim: usize, probes: usize) -> Self {
        let mut numbers = Numbers::new((dim * 100 + probes) as u64);
        let mut resid = numbers.with_outliers(STREAM * dim, 1000.0);
        // What is not chosen is not read.
        for row in (0..STREAM).filter(|&row| !CHOSEN.contains(&(row as u32))) {
            resid[row * dim..][..dim].fill(f32::NAN);
        }
        Self { dim, probes, resid, vectors: numbers.with_outliers(2 * probes * dim, 1000.0) }
    }

    /// The first vector of item number `at`, among the first ones.
    fn first(at: usize) -> usize {
        usize::from(at % 3 == 2)
    }

    /// The first `probes` dot products of these rows and their norms, with a row of NaNs behind.
    fn run(&self, device: &Device, chosen: &[u32], probes: usize) -> Vec<f32> {
        let mut out = nans(device, (chosen.len() + 1) * (probes + 1));
        // One more than is asked for; of every third item the vectors are others.
        let item = |(at, &row): (usize, &u32)| ProbeItem {
            row,
            first: Self::first(at) as u32,
            probes: probes as u32,
            out: (at * (probes + 1)) as u32,
        };
        let items: Vec<_> = [chosen, &[0]].concat().iter().enumerate().map(item).collect();
        let operands = Probe {
            count: chosen.len(),
            items: &Buffer::upload(device, &items).unwrap(),
            most: probes,
            rows: &upload::<f32>(device, &self.resid, 0),
            vectors: &upload::<f32>(device, &self.vectors, self.dim),
            dim: self.dim,
            out: &mut out,
        };
        probe(device, operands).unwrap();
        read(&out)
    }

    fn check(&self) {
        let (dim, width) = (self.dim, self.probes + 1);
        let run = |device: &Device| {
            let all = self.run(device, &CHOSEN, self.probes);
            // A number does not depend on the other rows, nor on the other probes.
            for count in [0, 1, 4] {
                let some = self.run(device, &CHOSEN[..count], self.probes);
                let (some, beyond) = some.split_at(count * width);
                assert_eq!(first_difference(some, &all[..count * width]), None, "{count} rows");
                assert!(all_nan(beyond), "a row beyond the count");
            }
            let fewer = self.probes / 2;
            let some = self.run(device, &CHOSEN, fewer);
            for (some, all) in some.chunks_exact(fewer + 1).zip(all.chunks_exact(width)) {
                assert_eq!(first_difference(&some[..fewer], &all[..fewer]), None, "probes");
                assert_eq!(first_difference(&some[fewer..], &all[width - 1..]), None, "norm");
            }
            vec![all]
        };
        let outputs = match dim % 4 {
            0 => on_every_device::<bf16>(0, run),
            _ => vec![("cpu".into(), on_every_isa(0, run))],
        };
        for (device, outputs) in outputs {
            self.check_outputs(&device, &outputs[0]);
        }
    }

    fn check_outputs(&self, device: &str, out: &[f32]) {
        let (dim, width) = (self.dim, self.probes + 1);
        // A chain of at most dim products, and the sum of lanes; a root.
        let relative = (dim + 8) as f64 * U;
        for ((c, &from), out) in CHOSEN.iter().enumerate().zip(out.chunks_exact(width)) {
            let what = format!("{device}: dim {dim}, {} probes, row {c}", self.probes);
            if from == NONE {
                assert!(all_nan(out), "{what}: nothing is to be written");
                continue;
            }
            let row = widen(&self.resid[from as usize * dim..][..dim]);
            let own = self.vectors.chunks_exact(dim).skip(Self::first(c)).take(self.probes);
            for (vector, &got) in own.zip(out) {
                let vector = widen(vector);
                let size = dot(&sizes(&row), &sizes(&vector));
                close(&what, got, dot(&row, &vector), relative * size);
            }
            close(&what, out[width - 1], norm(&row), relative * norm(&row));
        }
        assert!(all_nan(&out[CHOSEN.len() * width..]), "{device}: a row beyond the count");
    }
}

#[test]
fn probe_is_dot_products_and_the_norm() {
    // Around the 16 lanes of the processor, and a warp's 128 elements of a step.
    for dim in [1, 15, 17, 4, 16, 60, 128, 132, 576, 1028] {
        // Around the 8 warps of a block; 63 and 64 around a task of the processor.
        for probes in [0, 1, 7, 8, 9, 63] {
            Case::new(dim, probes).check();
        }
    }
}

#[test]
fn the_norm_of_a_probed_row_of_zeros_is_zero() {
    on_every_device::<bf16>(0, |device| {
        let case = Case { dim: 8, probes: 1, resid: vec![0.0; 8], vectors: vec![1.0; 16] };
        let out = case.run(device, &[0], 1);
        assert_eq!(out[..2], [0.0, 0.0]);
        vec![out]
    });
}
