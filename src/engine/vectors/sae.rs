//! Sparse autoencoders as `SAELens` keeps them: a folder with `cfg.json` and `sae_weights.safetensors`. A feature's
//! row of the decoder is the direction that it stands for.

use std::path::Path;

use fs_err as fs;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::{Header, VectorSet};
use crate::{
    device::MappedFile,
    error::{Context, Error, Result},
};

/// See [`VectorSet::load_sae`].
pub(super) fn load(dir: &Path, features: &[usize]) -> Result<(VectorSet, String)> {
    let config = dir.join("cfg.json");
    let place = || config.display().to_string();
    let json: Value = serde_json::from_str(&fs::read_to_string(&config)?)
        .map_err(|error| Error::new("not a SAELens configuration").at(place()).got(error))?;
    // Where versions of the library put it.
    let places = [&json["hook_name"], &json["metadata"]["hook_name"], &json["meta"]["hook_name"]];
    let hook = places.into_iter().find_map(Value::as_str).ok_or_else(|| {
        Error::new("the configuration does not say which point it is of")
            .at(place())
            .expected("hook_name, by itself or in metadata")
    })?;
    let path = dir.join("sae_weights.safetensors");
    let file = MappedFile::open(&path)?;
    let set = rows(file.bytes(), features, hook).at(|| path.display().to_string())?;
    Ok((set, hook.to_owned()))
}

fn rows(bytes: &[u8], features: &[usize], hook: &str) -> Result<VectorSet> {
    let tensors = SafeTensors::deserialize(bytes)
        .map_err(|error| Error::new("not a safetensors file").got(error))?;
    let decoder = tensors
        .tensor("W_dec")
        .map_err(|_| Error::new("no decoder").expected("a tensor W_dec (features, dim)"))?;
    let &[count, dim] = decoder.shape() else {
        return Err(Error::new("a decoder of another shape")
            .at("W_dec")
            .expected("(features, dim)")
            .got(format!("{:?}", decoder.shape())));
    };
    let size = match decoder.dtype() {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
        other => {
            return Err(Error::new("a decoder of another type")
                .at("W_dec")
                .expected("F32, F16 or BF16")
                .got(format!("{other:?}")));
        }
    };
    if features.is_empty() {
        return Err(Error::new("no features named").expected(format!("some of 0..={}", count - 1)));
    }
    let mut set = VectorSet::new(Header {
        recipe: format!("decoder rows of a sparse autoencoder of {hook}"),
        ..Header::default()
    });
    for &feature in features {
        if feature >= count {
            return Err(Error::new("no such feature")
                .expected(format!("0..={}", count - 1))
                .got(feature));
        }
        let row = &decoder.data()[feature * dim * size..][..dim * size];
        let values: Vec<f32> = match decoder.dtype() {
            Dtype::F32 => row.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => {
                row.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
            }
            _ => row.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        };
        set.insert(&format!("feature_{feature}"), vec![values])?;
    }
    Ok(set)
}
