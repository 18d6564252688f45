//! What a request wants captured, as the engine does it.

use super::{Limits, check_layers, vectors::Source};
use crate::{
    engine::{
        Along, Capture, Reading, Reduce, norm,
        points::{self, Point},
    },
    error::{Context, Error, Result},
    model::ModelConfig,
    request::{
        self, CaptureSite, Layers, NamedPositions, Positions, Probes, Reduction, Site, VectorRef,
    },
};

/// What a prompt of so many tokens gives of the wanted captures, in a model of so many blocks.
///
/// # Errors
/// A layer or a position that there is not.
pub fn captures_of(
    wanted: &[request::Capture],
    prompt: usize,
    config: &ModelConfig,
) -> Result<Vec<Capture>> {
    let mut all = Vec::new();
    for (i, wanted) in wanted.iter().enumerate() {
        all.extend(captures(wanted, prompt, config.into(), &format!("capture[{i}]"))?);
    }
    Ok(all)
}

/// One capture for each of its layers.
pub(super) fn captures(
    wanted: &request::Capture,
    prompt: usize,
    limits: Limits,
    field: &str,
) -> Result<Vec<Capture>> {
    let layers_field = format!("{field}.layers");
    let positions = positions(&wanted.positions, prompt, &format!("{field}.positions"))?;
    let site = match (&wanted.hook, wanted.site) {
        (None, Some(site)) => site,
        (Some(hook), None) if wanted.layers.is_none() => {
            let point = points::parse(hook, limits).at(|| field.to_owned())?;
            if point.head.is_some() {
                return Err(Error::new("heads are captured together")
                    .at(format!("{field}.hook"))
                    .expected(Point { head: None, ..point })
                    .got(point));
            }
            let Point { site, layer, .. } = point;
            return Ok(vec![Capture::rows(site, layer, positions)]);
        }
        _ => {
            return Err(Error::new("a capture needs one point")
                .at(field)
                .expected("either `hook`, or `site` and its `layers`"));
        }
    };
    let layers: Vec<Option<usize>> = match &wanted.layers {
        None if !site.has_layer() => vec![None],
        None => {
            return Err(Error::new("no layers")
                .at(layers_field)
                .expected(format!("a list or \"all\": {} is in every block", site.name())));
        }
        Some(_) if !site.has_layer() => {
            return Err(Error::new("layers of a site that has none")
                .at(layers_field)
                .hint(format!("there is one {}: leave \"layers\" out", site.name())));
        }
        Some(Layers::All(_)) => (0..limits.layers).map(Some).collect(),
        Some(Layers::List(layers)) => {
            check_layers(layers, limits, &layers_field)?;
            layers.iter().copied().map(Some).collect()
        }
    };
    let one = |layer| Capture::rows(site, layer, positions.clone());
    Ok(layers.into_iter().map(one).collect())
}

fn positions(wanted: &Positions, prompt: usize, field: &str) -> Result<Vec<usize>> {
    let list = match wanted {
        Positions::Named(NamedPositions::All) => return Ok((0..prompt).collect()),
        Positions::Named(NamedPositions::Last) => return Ok(vec![prompt - 1]),
        Positions::List(list) => list,
    };
    let index = |position: &i64| {
        let index = if *position < 0 { prompt as i64 + position } else { *position };
        usize::try_from(index).ok().filter(|index| *index < prompt).ok_or_else(|| {
            Error::new("position outside the prompt")
                .at(field)
                .expected(format!("-{prompt}..={}", prompt - 1))
                .got(position)
        })
    };
    let indices: Vec<usize> = list.iter().map(index).collect::<Result<_>>()?;
    if indices.is_empty() {
        return Err(Error::new("no positions").at(field).expected("at least one"));
    }
    if indices.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(Error::new("positions are not ascending")
            .at(field)
            .expected("ascending positions, each once")
            .got(format!("{list:?}")));
    }
    Ok(indices)
}

/// What a capture becomes by a reduction, and what is read off it then.
pub(super) fn reduced(
    capture: Capture,
    wanted: Option<&Reduction>,
    source: &mut Source,
) -> Result<(Capture, Reading)> {
    let site = capture.site;
    let refuse = |what: &str| {
        Err(Error::new(format!("{what} of {}", site.name()))
            .expected("the stream, or what attention and the MLP add to it"))
    };
    let (reduce, reading) = match wanted {
        None => (Reduce::Rows, Reading::Rows),
        Some(Reduction::Mean) => (Reduce::Mean, Reading::Mean),
        Some(Reduction::Norm) => (Reduce::Probe([].into()), Reading::Norm),
        Some(Reduction::Lens(0)) => {
            return Err(Error::new("no tokens asked for").at("lens").expected("1 or more"));
        }
        Some(Reduction::Lens(top)) if *top > source.limits.vocab => {
            return Err(Error::new("more tokens than there are")
                .at("lens")
                .expected(format!("at most {}", source.limits.vocab))
                .got(top));
        }
        Some(Reduction::Lens(_)) if place_of(site).is_none() => return refuse("a logit lens"),
        Some(Reduction::Lens(top)) => (Reduce::Rows, Reading::Lens(*top)),
        Some(Reduction::Cosine(probes)) => {
            let (vectors, along) = along(&capture, probes, source).at(|| "cosine".into())?;
            (Reduce::Probe(vectors), Reading::Cosine(along))
        }
        Some(Reduction::Coordinate(probes)) => {
            let (vectors, along) = along(&capture, probes, source).at(|| "coordinate".into())?;
            (Reduce::Probe(vectors), Reading::Coordinate(along))
        }
    };
    let is_probed = matches!(reduce, Reduce::Probe(_));
    if is_probed && place_of(site).is_none() && site != CaptureSite::FinalNorm {
        return refuse("a probe");
    }
    Ok((Capture { reduce, ..capture }, reading))
}

/// The site of vectors that fit a capture.
fn place_of(site: CaptureSite) -> Option<Site> {
    Some(match site {
        CaptureSite::ResidPre => Site::ResidPre,
        CaptureSite::ResidMid => Site::ResidMid,
        CaptureSite::ResidPost => Site::ResidPost,
        CaptureSite::AttnOut => Site::AttnOut,
        CaptureSite::MlpOut => Site::MlpOut,
        _ => return None,
    })
}

/// The vectors that rows are compared with, (vectors, dim), and what is known of them.
fn along(
    capture: &Capture,
    wanted: &Probes,
    source: &mut Source,
) -> Result<(std::sync::Arc<[f32]>, Along)> {
    let wanted = match wanted {
        Probes::Many(list) => list.clone(),
        Probes::One(name) if name.contains('#') => vec![VectorRef::Named(name.clone())],
        Probes::One(file) => {
            let set = source.files.get(file)?;
            set.names().map(|name| VectorRef::Named(format!("{file}#{name}"))).collect()
        }
    };
    let (site, layer) = (place_of(capture.site), capture.layer);
    let (Some(site), Some(layer)) = (site, layer) else {
        return Err(Error::new(format!("no vectors are of {}", capture.site.name()))
            .expected("the stream, or what attention and the MLP add to it"));
    };
    let (mut all, mut along) = (Vec::new(), Along { names: Vec::new(), norms: Vec::new() });
    for (i, one) in wanted.iter().enumerate() {
        let vector = source.vector(one, (site, layer), None).at(|| format!("[{i}]"))?;
        along.norms.push(norm(&vector));
        all.extend_from_slice(&vector);
        along.names.push(match one {
            VectorRef::Named(name) => {
                name.rsplit_once('#').map_or(name.as_str(), |(_, n)| n).into()
            }
            VectorRef::Sum(_) | VectorRef::Values(_) => format!("vector {i}"),
        });
    }
    if all.is_empty() {
        return Err(Error::new("no vectors").expected("at least one"));
    }
    Ok((source.files.share(all), along))
}
