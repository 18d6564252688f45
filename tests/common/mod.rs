//! What the integration tests share: fixtures, tensors, and where the demo model is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// File name of the demo model.
const DEMO_MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// An f32 tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl Tensor {
    /// Its rows: the last axis.
    pub fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.data.chunks_exact(*self.shape.last().expect("a scalar has no rows"))
    }
}

/// A fixture made by `scripts/make_golden.py`.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The demo model's GGUF file: `INKLING_DEMO_MODEL`, or in the cache folder.
///
/// # Panics
/// Where there is none: the tests that need it fail rather than pass by not running.
pub fn demo_model() -> PathBuf {
    let named = std::env::var_os("INKLING_DEMO_MODEL").map(PathBuf::from);
    let path = named.unwrap_or_else(|| cache_folder().join(DEMO_MODEL));
    assert!(
        path.is_file(),
        "the demo model is not at {}: run `inkling demo` once, or name the file in \
         INKLING_DEMO_MODEL",
        path.display()
    );
    path
}

fn cache_folder() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is not set")).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("inkling")
}

/// One JSON value a line.
pub fn read_lines(path: &Path) -> Vec<Value> {
    let text = fs_err::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every tensor of a safetensors file, as f32.
pub fn read_tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = fs_err::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let widen = |view: &safetensors::tensor::TensorView<'_>| -> Vec<f32> {
        let (fours, twos) = (view.data().as_chunks::<4>().0, view.data().as_chunks::<2>().0);
        match view.dtype() {
            Dtype::F32 => fours.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::BF16 => twos
                .iter()
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
                .collect(),
            Dtype::I32 => fours.iter().map(|b| i32::from_le_bytes(*b) as f32).collect(),
            Dtype::I64 => {
                let eights = view.data().as_chunks::<8>().0.iter();
                eights.map(|b| i64::from_le_bytes(*b) as f32).collect()
            }
            other => panic!("{}: dtype {other:?}", path.display()),
        }
    };
    let entry = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        (name, Tensor { shape: view.shape().to_vec(), data: widen(&view) })
    };
    file.tensors().into_iter().map(entry).collect()
}

/// ‖got − want‖ / ‖want‖ of the worst row; infinite where something is not finite.
pub fn worst_row<'a>(
    got: impl Iterator<Item = &'a [f32]>,
    want: impl Iterator<Item = &'a [f32]>,
) -> f64 {
    let row_error = |(got, want): (&[f32], &[f32])| {
        assert_eq!(got.len(), want.len());
        let squares = |f: &dyn Fn(usize) -> f64| (0..want.len()).map(|i| f(i).powi(2)).sum::<f64>();
        let off = squares(&|i| f64::from(got[i]) - f64::from(want[i])).sqrt();
        let error = off / squares(&|i| f64::from(want[i])).sqrt().max(1e-30);
        if error.is_finite() { error } else { f64::INFINITY }
    };
    got.zip(want).map(row_error).fold(0.0, f64::max)
}
