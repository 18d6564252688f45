//! Captures in one safetensors file, written where they belong as they arrive.

use std::{
    io::{Seek, SeekFrom, Write},
    path::Path,
};

use crate::{
    captures::{
        Item, Precision, Values,
        layout::{Files, single},
    },
    error::{Error, Result},
    files::AtomicFile,
    model::ModelConfig,
};

/// A safetensors file of f32 tensors, and of token ids, whose shapes are known before their values.
pub struct TensorFile {
    file: AtomicFile,
    files: Files,
    /// Requests that are still to come.
    missing: usize,
}

impl TensorFile {
    /// Writes the header: a tensor `{id}/{point}` for each of each request.
    pub fn create(path: &Path, items: &[Item], config: &ModelConfig) -> Result<Self> {
        let files = single(items, config, Precision::F32)?;
        let mut file = AtomicFile::create(path)?;
        file.write_all(&files.files[0].header)?;
        Ok(Self { file, files, missing: items.len() })
    }

    /// Writes the tensors of request number `request`, in the order of its specs.
    pub fn write(&mut self, request: usize, tensors: &[Values]) -> Result<()> {
        let mut bytes = Vec::new();
        for (extent, values) in self.files.extents[request].iter().zip(tensors) {
            values.encode(Precision::F32, &mut bytes);
            self.file.seek(SeekFrom::Start(extent.offset))?;
            self.file.write_all(&bytes)?;
        }
        self.missing -= 1;
        Ok(())
    }

    /// Puts the file in place. An error when a request was never written.
    pub fn commit(self) -> Result<()> {
        if self.missing > 0 {
            return Err(Error::new("the engine left captures out")
                .got(format!("{} requests without", self.missing)));
        }
        self.file.commit()
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;
    use crate::{
        engine::{Capture, Job, Reading},
        model::Shape,
        request::CaptureSite,
    };

    fn config() -> ModelConfig {
        let shape =
            Shape { layers: 3, dim: 2, heads: 1, kv_heads: 1, head_dim: 2, ffn_dim: 4, vocab: 3 };
        ModelConfig::llama(shape, 64, 1e4)
    }

    fn item(id: &str, captures: &[(CaptureSite, Option<usize>, &[usize])]) -> Item {
        let capture: Vec<Capture> = captures
            .iter()
            .map(|(site, layer, positions)| Capture::rows(*site, *layer, positions.to_vec()))
            .collect();
        let readings = vec![Reading::Rows; capture.len()];
        Item { id: id.into(), job: Job { capture, ..Job::default() }, readings }
    }

    #[test]
    fn values_arrive_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        let resid = (CaptureSite::ResidPost, Some(2), &[0, 1][..]);
        let first = item("a", &[resid, (CaptureSite::Logits, None, &[1])]);
        let second = item("b", &[(CaptureSite::FinalNorm, None, &[4])]);
        let mut file = TensorFile::create(&path, &[first, second], &config()).unwrap();
        let floats = |values: &[f32]| Values::Float(values.to_vec());
        file.write(1, &[floats(&[5.0, 6.0])]).unwrap();
        file.write(0, &[floats(&[1.0, 2.0, 3.0, 4.0]), floats(&[7.0, 8.0, 9.0])]).unwrap();
        assert!(!path.exists());
        file.commit().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let read = |name: &str| {
            let view = tensors.tensor(name).unwrap();
            let values = view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
            (view.shape().to_vec(), values.collect::<Vec<_>>())
        };
        assert_eq!(read("a/resid_post.2"), (vec![2, 2], vec![1.0, 2.0, 3.0, 4.0]));
        assert_eq!(read("a/logits"), (vec![1, 3], vec![7.0, 8.0, 9.0]));
        assert_eq!(read("b/final_norm"), (vec![1, 2], vec![5.0, 6.0]));
        assert_eq!(tensors.len(), 3);
    }

    #[test]
    fn what_is_missing_or_double_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        let one = (CaptureSite::Logits, None, &[0][..]);
        let error = TensorFile::create(&path, &[item("a", &[one, one])], &config()).err();
        assert!(error.unwrap().to_string().contains("a/logits"));
        let file = TensorFile::create(&path, &[item("a", &[one])], &config()).unwrap();
        assert!(file.commit().is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
