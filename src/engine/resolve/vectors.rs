//! The vectors that requests name, read and checked against the model.

use std::sync::Arc;

use super::Limits;
use crate::{
    engine::vectors::{Header, VectorFiles, norm},
    error::{Context, Error, Result},
    request::{Site, VectorRef},
};

/// Where vectors come from.
pub(super) struct Source<'a> {
    pub limits: Limits,
    pub model_hash: &'a dyn Fn() -> Result<String>,
    pub files: &'a mut VectorFiles,
}

impl Source<'_> {
    /// The vector to use at a point, (width,), finite and not zero.
    pub fn vector(
        &mut self,
        wanted: &VectorRef,
        place: (Site, usize),
        vector_layer: Option<usize>,
    ) -> Result<Arc<[f32]>> {
        let vector = match wanted {
            VectorRef::Named(name) => self.named(name, place, vector_layer)?,
            VectorRef::Sum(terms) => {
                let mut sum = vec![0.0_f32; self.width(place.0)];
                for (name, weight) in terms {
                    let term = self.named(name, place, vector_layer)?;
                    self.check_width(&term, place.0).at(|| name.clone())?;
                    sum.iter_mut().zip(term.iter()).for_each(|(s, v)| *s += weight * v);
                }
                Arc::from(sum)
            }
            VectorRef::Values(_) if vector_layer.is_some() => {
                return Err(Error::new("vector_layer is for vectors from files")
                    .got("numbers and a vector_layer"));
            }
            VectorRef::Values(values) => Arc::from(values.as_slice()),
        };
        self.check_width(&vector, place.0)?;
        if let Some(i) = vector.iter().position(|v| !v.is_finite()) {
            return Err(Error::new("the vector has values that are not finite")
                .got(format!("{} at index {i}", vector[i])));
        }
        if norm(&vector) == 0.0 {
            return Err(Error::new("the vector is zero: it would inject nothing")
                .hint("for a control without injection leave the injection out"));
        }
        Ok(vector)
    }

    fn width(&self, site: Site) -> usize {
        if site == Site::HeadOut { self.limits.head_dim } else { self.limits.dim }
    }

    fn check_width(&self, vector: &[f32], site: Site) -> Result<()> {
        let width = self.width(site);
        if vector.len() == width {
            return Ok(());
        }
        let whose = match site {
            Site::HeadOut => "a head of attention",
            _ => "the model's residual stream",
        };
        Err(Error::new("vector of the wrong length")
            .expected(format!("{width} (the width of {whose})"))
            .got(vector.len()))
    }

    /// `FILE#NAME`, checked against its file's header.
    fn named(
        &mut self,
        reference: &str,
        (site, layer): (Site, usize),
        vector_layer: Option<usize>,
    ) -> Result<Arc<[f32]>> {
        let parts = reference.rsplit_once('#').filter(|(f, n)| !f.is_empty() && !n.is_empty());
        let (file, name) = parts.ok_or_else(|| {
            Error::new("malformed vector reference")
                .expected("FILE#NAME, e.g. set.safetensors#ocean")
                .got(format!("{reference:?}"))
        })?;
        let set = self.files.get(file)?;
        let place = || reference.to_owned();
        let found = match vector_layer {
            Some(layer) => layer,
            None => {
                self.check_model(&set.header).at(place)?;
                let rows = set.unnamed_layers(name).at(place)?;
                if rows.is_some_and(|rows| rows != self.limits.layers) {
                    return Err(Error::new("the file does not say of which layers the vector is")
                        .at(reference)
                        .expected(format!("one row for each of {} blocks", self.limits.layers))
                        .got(rows.unwrap_or_default())
                        .hint("name the row to use with vector_layer"));
                }
                file_layer(&set.header, site, layer).at(place)?
            }
        };
        set.get(name, Some(found)).at(|| file.to_owned()).map_err(|error| {
            error.hint("vector_layer names the layer of the file's vector to use elsewhere")
        })
    }

    fn check_model(&self, header: &Header) -> Result<()> {
        let Some(claimed) = &header.model_hash else { return Ok(()) };
        let hash = (self.model_hash)()?;
        if *claimed == hash {
            return Ok(());
        }
        Err(Error::new("the vectors are of another model")
            .expected(format!("model {hash}"))
            .got(format!("model {claimed}"))
            .hint("make them with this model, or insist by naming their vector_layer"))
    }
}

/// Which layer of the file's site is the point (site, layer); `resid_pre.L+1` is `resid_post.L`.
fn file_layer(header: &Header, site: Site, layer: usize) -> Result<usize> {
    match header.site {
        None => Ok(layer),
        Some(theirs) if theirs == site => Ok(layer),
        Some(Site::ResidPost) if site == Site::ResidPre && layer > 0 => Ok(layer - 1),
        Some(Site::ResidPre) if site == Site::ResidPost => Ok(layer + 1),
        Some(theirs) => Err(Error::new("the vectors are of another site")
            .expected(format!("{site:?} at layer {layer}"))
            .got(format!("{theirs:?}"))
            .hint("inject at their site, or insist by naming their vector_layer")),
    }
}
