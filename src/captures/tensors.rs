//! The tensors that a request gives.

use std::str::FromStr;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::{
    engine::{Capture, Job, Reading, row_shape},
    error::Error,
    model::ModelConfig,
};

/// A request whose captures are wanted.
#[derive(Clone, Debug)]
pub struct Item {
    /// Names its tensors.
    pub id: String,
    /// What is run.
    pub job: Job,
    /// What is read off each of the job's captures.
    pub readings: Vec<Reading>,
}

/// A tensor before it is there.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// `resid_post.20`, `resid_post.20.cosine` and the like; the request's id is not in it.
    pub point: String,
    /// Rows first.
    pub shape: Vec<usize>,
    /// What its numbers are.
    pub kind: Kind,
    /// The prompt's positions that its rows are of; one row of several: their mean.
    pub positions: Vec<usize>,
    /// What its columns are, where they have names.
    pub columns: Vec<String>,
}

/// What a tensor's numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Written in the precision that is asked for.
    Float,
    /// Token ids, i32.
    Token,
}

/// A tensor's numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Of [`Kind::Float`].
    Float(Vec<f32>),
    /// Of [`Kind::Token`].
    Token(Vec<i32>),
}

/// How floats are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// Rounded to nearest, ties to even; beyond ±65,504 infinite.
    F16,
    /// Rounded to nearest, ties to even.
    Bf16,
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            other => Err(Error::new("no such precision").expected("f32, f16 or bf16").got(other)),
        }
    }
}

impl Precision {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }
}

impl Item {
    /// Its tensors: those of each capture, in their order.
    pub fn specs(&self, config: &ModelConfig) -> Vec<Spec> {
        let captures = self.job.capture.iter().zip(&self.readings);
        captures.flat_map(|(capture, reading)| specs(capture, reading, config)).collect()
    }
}

fn specs(capture: &Capture, reading: &Reading, config: &ModelConfig) -> Vec<Spec> {
    let layer = capture.layer.map_or_else(String::new, |layer| format!(".{layer}"));
    let name = format!("{}{layer}", capture.site.name());
    let rows = capture.positions.len();
    let spec = |suffix: &str, shape: Vec<usize>, kind, columns: &[String]| Spec {
        point: if suffix.is_empty() { name.clone() } else { format!("{name}.{suffix}") },
        shape,
        kind,
        positions: capture.positions.clone(),
        columns: columns.to_vec(),
    };
    let row = row_shape(capture.site, config);
    let floats = |suffix, shape, columns| vec![spec(suffix, shape, Kind::Float, columns)];
    match reading {
        Reading::Rows => floats("", [vec![rows], row].concat(), &[]),
        Reading::Mean => floats("mean", [vec![1], row].concat(), &[]),
        Reading::Norm => floats("norm", vec![rows], &[]),
        Reading::Cosine(along) => floats("cosine", vec![rows, along.names.len()], &along.names),
        Reading::Coordinate(along) => {
            floats("coordinate", vec![rows, along.names.len()], &along.names)
        }
        Reading::Lens(top) => vec![
            spec("lens_tokens", vec![rows, *top], Kind::Token, &[]),
            spec("lens_logprobs", vec![rows, *top], Kind::Float, &[]),
        ],
    }
}

/// What is read off a capture's numbers, but for the lens, which the engine must be asked for.
pub(super) fn read_off(reading: &Reading, data: Vec<f32>) -> Values {
    Values::Float(match reading {
        Reading::Rows | Reading::Mean | Reading::Norm | Reading::Lens(_) => data,
        Reading::Cosine(along) => products(&data, &along.norms, true),
        Reading::Coordinate(along) => products(&data, &along.norms, false),
    })
}

/// Each row's products with the vectors over their norms, and over the row's own, which stands behind them.
/// A row or a vector of zeros has 0.
fn products(data: &[f32], norms: &[f64], is_cosine: bool) -> Vec<f32> {
    let rows = data.chunks_exact(norms.len() + 1);
    let of = |row: &[f32]| -> Vec<f32> {
        let own = if is_cosine { f64::from(row[norms.len()]) } else { 1.0 };
        let value = |(product, norm): (&f32, &f64)| {
            let size = norm * own;
            if size > 0.0 { (f64::from(*product) / size) as f32 } else { 0.0 }
        };
        row.iter().zip(norms).map(value).collect()
    };
    rows.flat_map(of).collect()
}

impl Values {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Self::Float(values) => values.len(),
            Self::Token(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Little-endian bytes, in place of what `out` holds.
    pub fn encode(&self, precision: Precision, out: &mut Vec<u8>) {
        match (self, precision) {
            (Self::Token(ids), _) => le_bytes(ids, i32::to_le_bytes, out),
            (Self::Float(values), Precision::F32) => le_bytes(values, f32::to_le_bytes, out),
            (Self::Float(values), Precision::F16) => {
                le_bytes(values, |v| f16::from_f32(v).to_le_bytes(), out);
            }
            (Self::Float(values), Precision::Bf16) => {
                le_bytes(values, |v| bf16::from_f32(v).to_le_bytes(), out);
            }
        }
    }
}

/// In one pass that the compiler makes wide.
fn le_bytes<T: Copy, const N: usize>(values: &[T], of: impl Fn(T) -> [u8; N], out: &mut Vec<u8>) {
    out.resize(N * values.len(), 0);
    for (to, &value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *to = of(value);
    }
}

impl Kind {
    /// Bytes of a number.
    pub fn bytes(self, precision: Precision) -> usize {
        if self == Self::Token { 4 } else { precision.bytes() }
    }

    /// The name in a safetensors header.
    pub fn safetensors(self, precision: Precision) -> &'static str {
        match (self, precision) {
            (Self::Token, _) => "I32",
            (Self::Float, Precision::F32) => "F32",
            (Self::Float, Precision::F16) => "F16",
            (Self::Float, Precision::Bf16) => "BF16",
        }
    }

    /// The name in an `.npy` header; `NumPy` has no bf16.
    pub fn numpy(self, precision: Precision) -> Option<&'static str> {
        match (self, precision) {
            (Self::Token, _) => Some("<i4"),
            (Self::Float, Precision::F32) => Some("<f4"),
            (Self::Float, Precision::F16) => Some("<f2"),
            (Self::Float, Precision::Bf16) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Along;

    #[test]
    fn products_become_cosines_and_coordinates() {
        let along = || Along { names: vec!["a".into(), "b".into()], norms: vec![2.0, 0.0] };
        let data = vec![6.0, 0.0, 5.0, 0.0, 0.0, 0.0];
        let cosine = read_off(&Reading::Cosine(along()), data.clone());
        assert_eq!(cosine, Values::Float(vec![0.6, 0.0, 0.0, 0.0]));
        let coordinate = read_off(&Reading::Coordinate(along()), data);
        assert_eq!(coordinate, Values::Float(vec![3.0, 0.0, 0.0, 0.0]));
    }

    #[test]
    fn numbers_are_rounded_to_nearest_even() {
        let bytes = |values: &Values, precision| {
            let mut out = vec![9; 100];
            values.encode(precision, &mut out);
            out
        };
        let values = Values::Float(vec![1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
        let halves: Vec<u16> = bytes(&values, Precision::Bf16)
            .as_chunks()
            .0
            .iter()
            .map(|b| u16::from_le_bytes(*b))
            .collect();
        assert_eq!(halves, [0x3f80, 0x3f80, 0x3f82]);
        assert_eq!(bytes(&values, Precision::F16).len(), 6);
        assert_eq!(
            bytes(&Values::Token(vec![-1, 7]), Precision::F16),
            [255, 255, 255, 255, 7, 0, 0, 0]
        );
    }
}
