//! What is refused before it runs: a job that the model cannot run, or that would not do what it says.

use super::{
    hooks::{norm, window_positions},
    sites::{injected_width, layer_name, site_index, site_name},
    types::{Capture, Condition, Injection, Job, Reduce},
};
use crate::{
    error::{Error, Result},
    model::ModelConfig,
    request::{CaptureSite, Op, Site, StrengthMode},
};

/// Samples of one prompt; more are more requests.
const MAX_SAMPLES: u32 = 65_536;

/// Refuses a job that the model cannot run, or whose injections would touch nothing.
pub fn check(job: &Job, config: &ModelConfig) -> Result<()> {
    let prompt = job.tokens.len();
    if prompt == 0 {
        return Err(Error::new("empty prompt").expected("at least one token"));
    }
    let longest = job.score.iter().map(Vec::len).max().unwrap_or(0);
    let total = prompt + (job.sampling.max_tokens as usize).max(longest);
    // The last token drawn is never fed back, so no row has its position.
    let rows = prompt + (total - prompt).saturating_sub(1);
    if total > config.context {
        return Err(Error::new("longer than the model's context")
            .expected(format!("at most {} tokens", config.context))
            .got(format!("{prompt} of the prompt and {} to come", total - prompt))
            .hint("--context raises the limit to what the model was made for"));
    }
    let ids = job.tokens.iter().chain(job.score.iter().flatten()).chain(&job.watch);
    if let Some(id) = ids.copied().find(|&id| id as usize >= config.vocab) {
        return Err(Error::new("token id outside the vocabulary")
            .expected(format!("0..{}", config.vocab))
            .got(id));
    }
    if !(1..=MAX_SAMPLES).contains(&job.n) {
        return Err(Error::new("too few or too many samples of one prompt")
            .at("n")
            .expected(format!("1..={MAX_SAMPLES}"))
            .got(job.n));
    }
    if job.score.iter().any(Vec::is_empty) {
        return Err(Error::new("empty continuation").at("score"));
    }
    let s = &job.sampling;
    let temperature_fits = s.temperature.is_finite() && s.temperature >= 0.0;
    let top_p_fits = s.top_p > 0.0 && s.top_p <= 1.0;
    if !(temperature_fits && top_p_fits && (0.0..1.0).contains(&s.min_p)) {
        return Err(Error::new("sampling values out of range")
            .expected("temperature 0 or more, 0 < top_p <= 1, 0 <= min_p < 1")
            .got(format!("{} / {} / {}", s.temperature, s.top_p, s.min_p)));
    }
    for (at, injection) in job.inject.iter().enumerate() {
        check_injection(injection, config, rows).map_err(|e| e.at(format!("inject[{at}]")))?;
    }
    for (at, capture) in job.capture.iter().enumerate() {
        check_capture(capture, config, prompt).map_err(|e| e.at(format!("capture[{at}]")))?;
    }
    Ok(())
}

fn check_injection(injection: &Injection, config: &ModelConfig, positions: usize) -> Result<()> {
    let Injection { vector, op, mode, .. } = injection;
    if injection.layer >= config.layers {
        return Err(out_of_range(injection.layer, config));
    }
    check_head(injection, config)?;
    check_positions(injection)?;
    let width = injected_width(injection.site, config);
    let rows = if injection.by_position { window_positions(injection).unwrap_or(0) } else { 1 };
    let wanted = if *op == Op::Scale { 0 } else { rows * width };
    if vector.len() != wanted {
        return Err(Error::new("vector of the wrong length")
            .expected(match (wanted, injection.site) {
                (0, _) => "none: the operation has no vector".into(),
                (_, Site::HeadOut) => format!("{rows} × {width} (the width of a head)"),
                _ => format!("{rows} × {width} (the model's width)"),
            })
            .got(vector.len()));
    }
    let (low, high) = injection.bounds;
    if !vector.iter().all(|v| v.is_finite()) || !injection.strength.is_finite() {
        return Err(
            Error::new("NaN or infinity in a vector or strength").expected("finite numbers")
        );
    }
    if low.is_nan() || high.is_nan() || low > high {
        return Err(Error::new("bounds of a clamp")
            .expected("min <= max")
            .got(format!("{low}..{high}")));
    }
    let is_direction =
        !matches!(op, Op::Add | Op::Replace | Op::Scale) || *mode != StrengthMode::Raw;
    if *op != Op::Scale && is_direction && norm(vector) == 0.0 {
        return Err(Error::new("a vector of length 0 has no direction")
            .hint("only add and replace with strength_mode raw take it"));
    }
    if *mode == StrengthMode::Reference && !injection.site.is_stream() {
        return Err(Error::new("strength_mode reference is of the stream's norm")
            .at(site_name(injection))
            .hint("use raw, unit or row here"));
    }
    if injection.from >= injection.to.unwrap_or(usize::MAX) || injection.from >= positions {
        return Err(Error::new("the window touches no token: nothing would be injected")
            .expected(format!("from < to, and from < {positions}"))
            .got(format!("from {}, to {:?}", injection.from, injection.to)));
    }
    if injection.every == 0 {
        return Err(Error::new("every 0th token").at("every").expected("1 or more"));
    }
    injection.when.as_ref().map_or(Ok(()), |when| check_condition(when, injection, config))
}

/// A head exactly where there are heads.
fn check_head(injection: &Injection, config: &ModelConfig) -> Result<()> {
    match (injection.site, injection.head) {
        (Site::HeadOut, Some(head)) if head < config.heads => Ok(()),
        (Site::HeadOut, None) => Err(Error::new("head_out needs a head").at("head")),
        (Site::HeadOut, Some(head)) => Err(Error::new("head out of range")
            .at("head")
            .expected(format!("0..={} (a block has {} heads)", config.heads - 1, config.heads))
            .got(head)),
        (_, None) => Ok(()),
        (site, Some(_)) => Err(Error::new("a head of a site that has none")
            .at("head")
            .expected("none, or site head_out")
            .got(layer_name(site, injection.layer))),
    }
}

/// Vectors for each position need a window of known length, and are used as they are.
fn check_positions(injection: &Injection) -> Result<()> {
    if !injection.by_position {
        return Ok(());
    }
    if window_positions(injection).is_none() {
        return Err(Error::new("a vector for each position needs a window with an end").at("to"));
    }
    let is_plain = matches!(injection.op, Op::Add | Op::Replace);
    if is_plain && injection.mode == StrengthMode::Raw {
        return Ok(());
    }
    Err(Error::new("a vector for each position is added or put in place as it is")
        .expected("op add or replace, strength_mode raw")
        .got(format!("op {}, strength_mode {:?}", injection.op.name(), injection.mode)))
}

fn check_condition(when: &Condition, injection: &Injection, config: &ModelConfig) -> Result<()> {
    let when_error = |error: Error| error.at("when");
    if when.layer >= config.layers {
        return Err(when_error(out_of_range(when.layer, config)));
    }
    if when.site == Site::HeadOut {
        return Err(when_error(
            Error::new("a condition looks at the stream, or at what is added to it")
                .at("site")
                .got("head_out"),
        ));
    }
    if when.vector.len() != config.dim || !when.vector.iter().all(|v| v.is_finite()) {
        return Err(when_error(
            Error::new("a vector that cannot be looked for")
                .expected(format!("{} finite numbers (the model's width)", config.dim))
                .got(when.vector.len()),
        ));
    }
    if norm(&when.vector) == 0.0 {
        return Err(when_error(Error::new("a vector of length 0 has no direction")));
    }
    if when.above.is_nan() || when.below.is_nan() || when.above >= when.below {
        return Err(when_error(
            Error::new("a condition that nothing meets")
                .expected("above < below")
                .got(format!("above {}, below {}", when.above, when.below)),
        ));
    }
    // In the order in which a row meets them.
    let order = |site: Site, layer| (site_index(site, layer), site.is_stream());
    let (seen, acts) = (order(when.site, when.layer), order(injection.site, injection.layer));
    // What heads gave is changed before it is added where these others are seen.
    let fits =
        if when.latch || injection.site == Site::HeadOut { seen.0 < acts.0 } else { seen <= acts };
    if fits {
        return Ok(());
    }
    let rule = if when.latch { "a site before it" } else { "its site, or one before it" };
    Err(when_error(
        Error::new("the condition is decided too late for the injection")
            .expected(format!("{rule}: {}", site_name(injection)))
            .got(layer_name(when.site, when.layer)),
    ))
}

fn check_capture(capture: &Capture, config: &ModelConfig, prompt: usize) -> Result<()> {
    if capture.site.has_layer() != capture.layer.is_some() {
        return Err(Error::new(format!("{} and its layer do not fit", capture.site.name())));
    }
    if let Some(layer) = capture.layer.filter(|&layer| layer >= config.layers) {
        return Err(out_of_range(layer, config));
    }
    let is_wide = matches!(
        capture.site,
        CaptureSite::Logits
            | CaptureSite::HeadOut
            | CaptureSite::Q
            | CaptureSite::K
            | CaptureSite::V
    );
    match &capture.reduce {
        Reduce::Rows | Reduce::Mean => {}
        Reduce::Probe(_) if is_wide => {
            return Err(Error::new(format!("{} cannot be probed", capture.site.name()))
                .expected("the stream, what is added to it, or the final norm"));
        }
        Reduce::Probe(vectors) => {
            if !vectors.len().is_multiple_of(config.dim) {
                return Err(Error::new("vectors of the wrong length")
                    .expected(format!("{} numbers each (the model's width)", config.dim))
                    .got(vectors.len()));
            }
            if !vectors.iter().all(|v| v.is_finite()) {
                return Err(Error::new("NaN or infinity in a vector").expected("finite numbers"));
            }
        }
    }
    let ascending = capture.positions.is_sorted_by(|a, b| a < b);
    if !ascending || capture.positions.last().is_none_or(|&last| last >= prompt) {
        return Err(Error::new("bad capture positions")
            .expected(format!("ascending, in 0..{prompt}, at least one")));
    }
    Ok(())
}

fn out_of_range(layer: usize, config: &ModelConfig) -> Error {
    Error::new("layer out of range")
        .expected(format!("0..={} (the model has {} blocks)", config.layers - 1, config.layers))
        .got(layer)
}
