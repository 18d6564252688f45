//! From a request as written to a job the engine can run: vectors read, layers and windows as
//! indices, every value checked against the model. Every error names the request's field.

use std::sync::Arc;

use super::{
    Capture, Condition, Injection, Job,
    points::{self, Point},
    vectors::{Header, VectorFiles, norm},
};
use crate::{
    error::{Context, Error, Result},
    model::{Model, ModelConfig, Norms, Prompt, TokenWindow, Tokenizer},
    request::{
        self, Continuation, LayerRange, Layers, NamedPositions, OneOrMany, Op, Positions, Request,
        Sampling, Site, StrengthMode, VectorRef,
    },
};

/// What a request is checked against.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub layers: usize,
    dim: usize,
    vocab: usize,
    context: usize,
    /// Whether what attention and the MLP give is changed before it is added.
    pub changes_branches: bool,
}

impl From<&ModelConfig> for Limits {
    fn from(config: &ModelConfig) -> Self {
        Self {
            layers: config.layers,
            dim: config.dim,
            vocab: config.vocab,
            context: config.context,
            changes_branches: config.norms != Norms::Before || config.residual_scale != 1.0,
        }
    }
}

/// Renders a request's prompt and checks and resolves all that is asked about it.
pub fn resolve(request: &Request, model: &Model, files: &mut VectorFiles) -> Result<(Prompt, Job)> {
    let limits = Limits::from(&model.config);
    check_sampling(&request.sampling)?;
    check_counts(request, limits)?;
    let prompt = model.render(request)?;
    check_tokens(&prompt.tokens, limits, "prompt")?;
    let tokenizer = model.tokenizer.as_deref();
    check_stop(&request.stop, tokenizer)?;
    let score = continuations(&request.score, tokenizer, limits)?;
    let continued = score.iter().map(Vec::len).max().unwrap_or(0);
    let continued = continued.max(request.sampling.max_tokens as usize);
    check_context(prompt.tokens.len(), continued, limits)?;
    // The last token drawn or scored is never a row itself.
    let rows = prompt.tokens.len() + continued.saturating_sub(1);

    let mut inject = Vec::new();
    for (i, injection) in request.inject.iter().enumerate() {
        let field = format!("inject[{i}]");
        let windows = prompt.windows(injection).at(|| field.clone())?;
        for window in &windows {
            check_window(injection.strength_mode, *window, prompt.tokens.len(), rows, &field)?;
        }
        let mut source = Source { limits, model_hash: &|| model.hash(), files };
        inject.extend(injections(injection, &windows, &mut source, &field)?);
    }
    let mut capture = Vec::new();
    for (i, wanted) in request.capture.iter().enumerate() {
        let field = format!("capture[{i}]");
        capture.extend(captures(wanted, prompt.tokens.len(), limits, &field)?);
    }
    let job = Job {
        tokens: prompt.tokens.clone(),
        inject,
        capture,
        sampling: request.sampling,
        n: request.n,
        stop: request.stop.clone(),
        logprobs: request.logprobs,
        score,
        watch: Vec::new(),
    };
    Ok((prompt, job))
}

/// Checks the values that say how tokens are drawn.
fn check_sampling(sampling: &Sampling) -> Result<()> {
    let bad = |name: &str, expected: &str, got: f32| {
        Err(Error::new("sampling value out of range")
            .at(format!("sampling.{name}"))
            .expected(expected)
            .got(got))
    };
    if !(sampling.temperature.is_finite() && sampling.temperature >= 0.0) {
        return bad("temperature", "0 (greedy) or more", sampling.temperature);
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return bad("top_p", "more than 0, at most 1 (1 keeps all tokens)", sampling.top_p);
    }
    if !(sampling.min_p >= 0.0 && sampling.min_p < 1.0) {
        return bad("min_p", "0 (keeps all tokens) or more, less than 1", sampling.min_p);
    }
    Ok(())
}

fn check_counts(request: &Request, limits: Limits) -> Result<()> {
    if request.n == 0 {
        return Err(Error::new("no samples asked for").at("n").expected("1 or more").got(0));
    }
    match request.logprobs {
        Some(top) if top as usize > limits.vocab => Err(Error::new("too many log-probabilities")
            .at("logprobs")
            .expected(format!("at most {} (the vocabulary)", limits.vocab))
            .got(top)),
        _ => Ok(()),
    }
}

fn check_tokens(tokens: &[u32], limits: Limits, field: &str) -> Result<()> {
    if tokens.is_empty() {
        return Err(Error::new("empty text").at(field).expected("at least one token"));
    }
    match tokens.iter().position(|token| *token as usize >= limits.vocab) {
        Some(i) => Err(Error::new("token id outside the vocabulary")
            .at(format!("{field}, token {i}"))
            .expected(format!("0..={}", limits.vocab - 1))
            .got(tokens[i])),
        None => Ok(()),
    }
}

fn check_stop(stop: &[String], tokenizer: Option<&Tokenizer>) -> Result<()> {
    if let Some(i) = stop.iter().position(String::is_empty) {
        return Err(Error::new("empty stop text").at(format!("stop[{i}]")));
    }
    if !stop.is_empty() && tokenizer.is_none() {
        return Err(no_tokenizer("stop"));
    }
    Ok(())
}

fn no_tokenizer(field: &str) -> Error {
    Error::new("text without a tokenizer")
        .at(field)
        .hint("the model has no tokenizer: give token ids")
}

fn continuations(
    wanted: &[Continuation],
    tokenizer: Option<&Tokenizer>,
    limits: Limits,
) -> Result<Vec<Vec<u32>>> {
    let one = |(i, continuation): (usize, &Continuation)| {
        let field = format!("score[{i}]");
        let tokens = match continuation {
            Continuation::Tokens(tokens) => tokens.clone(),
            Continuation::Text(text) => {
                let tokenizer = tokenizer.ok_or_else(|| no_tokenizer(&field))?;
                tokenizer.encode(text, false).at(|| field.clone())?.tokens
            }
        };
        check_tokens(&tokens, limits, &field)?;
        Ok(tokens)
    };
    wanted.iter().enumerate().map(one).collect()
}

fn check_context(prompt: usize, continued: usize, limits: Limits) -> Result<()> {
    if prompt + continued <= limits.context {
        return Ok(());
    }
    Err(Error::new("prompt and continuation do not fit the model's context")
        .expected(format!("at most {} tokens", limits.context))
        .got(format!("{prompt} of prompt + {continued} to come"))
        .hint(
            "shorten the prompt, lower sampling.max_tokens, or raise the limit with --context to \
             what the model was made for",
        ))
}

/// Refuses a window that can touch no row, and a `reference` strength without rows to refer to.
fn check_window(
    mode: StrengthMode,
    TokenWindow { from, to, .. }: TokenWindow,
    prompt: usize,
    rows: usize,
    field: &str,
) -> Result<()> {
    if from >= rows {
        return Err(Error::new("the injection's window touches no row")
            .at(format!("{field}.from"))
            .expected(format!("a position before {rows}"))
            .got(from)
            .hint(
                "the first generated token is drawn from the last prompt row: a window after the \
                 prompt acts from the second one on",
            ));
    }
    let end = to.unwrap_or(prompt).min(prompt);
    if mode == StrengthMode::Reference && end <= from.max(1) {
        return Err(Error::new(
            "the window has no prompt position to take the reference norm from",
        )
        .at(format!("{field}.strength_mode"))
        .expected("a prompt position other than the first in the window")
        .got(format!("{from}..{}", to.map_or_else(String::new, |to| to.to_string())))
        .hint("use strength_mode raw, unit or row"));
    }
    Ok(())
}

/// Where vectors come from.
struct Source<'a> {
    limits: Limits,
    model_hash: &'a dyn Fn() -> Result<String>,
    files: &'a mut VectorFiles,
}

/// One injection for each of its layers and windows.
fn injections(
    wanted: &request::Injection,
    windows: &[TokenWindow],
    source: &mut Source,
    field: &str,
) -> Result<Vec<Injection>> {
    let strength = check_operation(wanted).at(|| field.to_owned())?;
    let (site, layers) = place_of(wanted, source, field)?;
    let when = match &wanted.when {
        Some(when) => Some(Arc::new(condition(when, source).at(|| format!("{field}.when"))?)),
        None => None,
    };
    let mut all = Vec::new();
    for layer in layers {
        let vector = match &wanted.vector {
            Some(vector) => source
                .vector(vector, (site, layer), wanted.vector_layer)
                .at(|| format!("{field}.vector"))?,
            None => Arc::default(),
        };
        all.extend(windows.iter().map(|window| Injection {
            vector: Arc::clone(&vector),
            site,
            layer,
            op: wanted.op,
            strength,
            mode: wanted.strength_mode,
            bounds: (wanted.min.unwrap_or(f32::NEG_INFINITY), wanted.max.unwrap_or(f32::INFINITY)),
            keep_norm: wanted.keep_norm,
            from: window.from,
            to: window.to,
            every: window.every,
            when: when.clone(),
        }));
    }
    Ok(all)
}

/// Refuses fields that an operation does not have, and the want of those that it needs; gives the
/// strength, 0 where it has none.
fn check_operation(wanted: &request::Injection) -> Result<f32> {
    let op = wanted.op;
    let is_clamp = op == Op::Clamp;
    let presence = |name: &str, is_there: bool, is_wanted: bool| match (is_there, is_wanted) {
        (true, false) => {
            Err(Error::new(format!("{} has no {name}", op.name())).at(name).hint("leave it out"))
        }
        (false, true) => Err(Error::new(format!("{} needs a {name}", op.name())).at(name)),
        _ => Ok(()),
    };
    presence("vector", wanted.vector.is_some(), op != Op::Scale)?;
    let has_strength = !matches!(op, Op::ProjectOut | Op::Clamp);
    presence("strength", wanted.strength.is_some(), has_strength)?;
    if !is_clamp {
        presence("min", wanted.min.is_some(), false)?;
        presence("max", wanted.max.is_some(), false)?;
    } else if wanted.min.is_none() && wanted.max.is_none() {
        return Err(Error::new("clamp needs a min, a max or both"));
    }
    let has_mode = !matches!(op, Op::ProjectOut | Op::Scale);
    if !has_mode && wanted.strength_mode != StrengthMode::Raw {
        return Err(Error::new(format!("{} has no strength_mode", op.name()))
            .at("strength_mode")
            .hint("leave it out"));
    }
    if op == Op::Scale && wanted.keep_norm {
        return Err(Error::new("scale with keep_norm changes nothing").at("keep_norm"));
    }
    for (name, number) in [("strength", wanted.strength), ("min", wanted.min), ("max", wanted.max)]
    {
        if let Some(number) = number.filter(|number| !number.is_finite()) {
            return Err(Error::new("not a finite number").at(name).got(number));
        }
    }
    if let (Some(min), Some(max)) = (wanted.min, wanted.max)
        && min > max
    {
        return Err(Error::new("min is above max").at("min").got(format!("{min} and {max}")));
    }
    Ok(wanted.strength.unwrap_or(0.0))
}

fn condition(wanted: &request::Condition, source: &mut Source) -> Result<Condition> {
    check_layers(&[wanted.layer], source.limits, "layer")?;
    let place = (wanted.site, wanted.layer);
    let vector =
        source.vector(&wanted.vector, place, wanted.vector_layer).at(|| "vector".into())?;
    if wanted.above.is_none() && wanted.below.is_none() {
        return Err(Error::new("a condition needs above, below or both"));
    }
    Ok(Condition {
        vector,
        site: wanted.site,
        layer: wanted.layer,
        measure: wanted.measure,
        above: wanted.above.unwrap_or(f32::NEG_INFINITY),
        below: wanted.below.unwrap_or(f32::INFINITY),
        latch: wanted.latch,
    })
}

/// The site and the blocks of an injection.
fn place_of(
    wanted: &request::Injection,
    source: &Source,
    field: &str,
) -> Result<(Site, Vec<usize>)> {
    let two_ways = || {
        Error::new("a point in two ways").at(field).expected("either `hook`, or `layer` and `site`")
    };
    match (&wanted.hook, &wanted.layer) {
        (Some(_), Some(_)) => Err(two_ways()),
        (Some(_), None) if wanted.site.is_some() => Err(two_ways()),
        (Some(hook), None) => {
            let point = points::parse(hook, source.limits).and_then(Point::injected);
            point.map(|(site, layer)| (site, vec![layer])).at(|| field.to_owned())
        }
        (None, Some(layer)) => {
            let layers = layers_of(layer, source.limits, &format!("{field}.layer"))?;
            Ok((wanted.site.unwrap_or_default(), layers))
        }
        (None, None) => Err(Error::new("an injection needs a layer").at(format!("{field}.layer"))),
    }
}

fn layers_of(wanted: &OneOrMany, limits: Limits, field: &str) -> Result<Vec<usize>> {
    let layers = match wanted {
        OneOrMany::One(layer) => vec![*layer],
        OneOrMany::Many(layers) => layers.clone(),
        OneOrMany::Range(LayerRange { first, last }) if first > last => {
            return Err(Error::new("a reversed range of layers")
                .at(field)
                .expected("first <= last")
                .got(format!("{first} and {last}")));
        }
        OneOrMany::Range(LayerRange { first, last }) => {
            check_layers(&[*last], limits, field)?;
            (*first..=*last).collect()
        }
        OneOrMany::All(_) => (0..limits.layers).collect(),
    };
    check_layers(&layers, limits, field)?;
    Ok(layers)
}

pub(super) fn check_layers(layers: &[usize], limits: Limits, field: &str) -> Result<()> {
    if layers.is_empty() {
        return Err(Error::new("no layers").at(field).expected("at least one"));
    }
    for (i, layer) in layers.iter().enumerate() {
        if *layer >= limits.layers {
            return Err(Error::new("layer out of range")
                .at(field)
                .expected(format!(
                    "0..={} (the model has {} blocks)",
                    limits.layers - 1,
                    limits.layers
                ))
                .got(layer)
                .hint("layers are counted from 0"));
        }
        if layers[..i].contains(layer) {
            return Err(Error::new("a layer stands twice in the list").at(field).got(layer));
        }
    }
    Ok(())
}

impl Source<'_> {
    /// The vector to use at a point, (dim,), finite and not zero.
    fn vector(
        &mut self,
        wanted: &VectorRef,
        place: (Site, usize),
        vector_layer: Option<usize>,
    ) -> Result<Arc<[f32]>> {
        let vector = match wanted {
            VectorRef::Named(name) => self.named(name, place, vector_layer)?,
            VectorRef::Sum(terms) => {
                let mut sum = vec![0.0_f32; self.limits.dim];
                for (name, weight) in terms {
                    let term = self.named(name, place, vector_layer)?;
                    self.check_dim(&term).at(|| name.clone())?;
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
        self.check_dim(&vector)?;
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

    fn check_dim(&self, vector: &[f32]) -> Result<()> {
        if vector.len() == self.limits.dim {
            return Ok(());
        }
        Err(Error::new("vector of the wrong length")
            .expected(format!("{} (the width of the model's residual stream)", self.limits.dim))
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
fn captures(
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
            let Point { site, layer } = points::parse(hook, limits).at(|| field.to_owned())?;
            return Ok(vec![Capture { site, layer, positions }]);
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
    let one = |layer| Capture { site, layer, positions: positions.clone() };
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

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
