//! What a request wants captured, as the engine does it.

use super::{Limits, check_layers};
use crate::{
    engine::{
        Capture,
        points::{self, Point},
    },
    error::{Context, Error, Result},
    model::ModelConfig,
    request::{self, Layers, NamedPositions, Positions},
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
