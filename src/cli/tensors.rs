//! Captured rows to one safetensors file, written where they belong as they arrive.

use std::{
    collections::BTreeSet,
    io::{BufWriter, Seek, SeekFrom, Write},
    path::Path,
};

use crate::{
    engine::{Capture, Job, row_shape},
    error::{Error, Result},
    files::AtomicFile,
    model::ModelConfig,
};

/// A safetensors file of f32 tensors whose shapes are known before their values.
pub struct TensorFile {
    file: AtomicFile,
    /// For each request the number of its first tensor.
    first: Vec<usize>,
    tensors: Vec<Place>,
    written: usize,
}

/// Where a tensor's values stand.
struct Place {
    name: String,
    offset: u64,
    len: usize,
}

impl TensorFile {
    /// Writes the header: a tensor for each capture of each job, named `{id}/{site}.{layer}`.
    pub fn create<'a>(
        path: &Path,
        jobs: impl Iterator<Item = (&'a str, &'a Job)>,
        config: &ModelConfig,
    ) -> Result<Self> {
        let mut entries = Vec::new();
        let mut first = Vec::new();
        for (id, job) in jobs {
            first.push(entries.len());
            let named = job.capture.iter().map(|capture| {
                let shape = [vec![capture.positions.len()], row_shape(capture.site, config)];
                (tensor_name(id, capture), shape.concat())
            });
            entries.extend(named);
        }
        let (header, tensors) = header(entries)?;
        let mut file = AtomicFile::create(path)?;
        file.write_all(&header)?;
        Ok(Self { file, first, tensors, written: 0 })
    }

    /// Writes the captures of request number `request`, in the order of its job.
    pub fn write(&mut self, request: usize, captures: &[Vec<f32>]) -> Result<()> {
        let places = &self.tensors[self.first[request]..][..captures.len()];
        for (place, values) in places.iter().zip(captures) {
            if values.len() != place.len {
                return Err(Error::new("the engine captured another number of values")
                    .at(place.name.clone())
                    .expected(place.len)
                    .got(values.len()));
            }
            self.file.seek(SeekFrom::Start(place.offset))?;
            let mut out = BufWriter::new(&mut self.file);
            for value in values {
                out.write_all(&value.to_le_bytes())?;
            }
            out.flush()?;
            self.written += 1;
        }
        Ok(())
    }

    /// Puts the file in place. An error when a tensor was never written.
    pub fn commit(self) -> Result<()> {
        if self.written != self.tensors.len() {
            return Err(Error::new("the engine left captures out")
                .expected(self.tensors.len())
                .got(self.written));
        }
        self.file.commit()
    }
}

fn tensor_name(id: &str, capture: &Capture) -> String {
    let site = capture.site.name();
    capture.layer.map_or_else(|| format!("{id}/{site}"), |layer| format!("{id}/{site}.{layer}"))
}

/// The file's first bytes, padded to a multiple of 8, and where each tensor goes.
fn header(entries: Vec<(String, Vec<usize>)>) -> Result<(Vec<u8>, Vec<Place>)> {
    let mut json = serde_json::Map::new();
    let mut places = Vec::with_capacity(entries.len());
    let mut names = BTreeSet::new();
    let mut end = 0;
    for (name, shape) in entries {
        if !names.insert(name.clone()) {
            return Err(Error::new("two captures of one name").got(name).hint(
                "a request captures a site of a layer once: put all positions into one list",
            ));
        }
        let (start, len) = (end, shape.iter().product());
        end += 4 * len as u64;
        let entry =
            serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] });
        json.insert(name.clone(), entry);
        places.push(Place { name, offset: start, len });
    }
    let mut text = serde_json::Value::Object(json).to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    for place in &mut places {
        place.offset += bytes.len() as u64;
    }
    Ok((bytes, places))
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use crate::{model::Shape, request::CaptureSite};

    use super::*;

    fn config() -> ModelConfig {
        let shape =
            Shape { layers: 3, dim: 2, heads: 1, kv_heads: 1, head_dim: 2, ffn_dim: 4, vocab: 3 };
        ModelConfig::llama(shape, 64, 1e4)
    }

    fn job(captures: &[(CaptureSite, Option<usize>, &[usize])]) -> Job {
        let capture = captures
            .iter()
            .map(|(site, layer, positions)| Capture::rows(*site, *layer, positions.to_vec()));
        Job { capture: capture.collect(), ..Job::default() }
    }

    #[test]
    fn values_arrive_in_any_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        let first =
            job(&[(CaptureSite::ResidPost, Some(2), &[0, 1]), (CaptureSite::Logits, None, &[1])]);
        let second = job(&[(CaptureSite::FinalNorm, None, &[4])]);
        let jobs = [("a", &first), ("b", &second)];
        let mut file = TensorFile::create(&path, jobs.into_iter(), &config()).unwrap();
        file.write(1, &[vec![5.0, 6.0]]).unwrap();
        file.write(0, &[vec![1.0, 2.0, 3.0, 4.0], vec![7.0, 8.0, 9.0]]).unwrap();
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
        let double = job(&[one, one]);
        let error = TensorFile::create(&path, [("a", &double)].into_iter(), &config()).err();
        assert!(error.unwrap().to_string().contains("a/logits"));
        let single = job(&[one]);
        let create = || TensorFile::create(&path, [("a", &single)].into_iter(), &config());
        assert!(create().unwrap().commit().is_err());
        assert!(create().unwrap().write(0, &[vec![1.0]]).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
