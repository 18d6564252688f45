//! From a request as written to a job the engine can run: vectors read, layers and windows as
//! indices, every value checked against the model. Every error names the request's field.

mod captures;
mod vectors;

use std::sync::Arc;

use super::{Condition, Injection, Job, Reading, patching::Patch, points, vectors::VectorFiles};
use crate::{
    error::{Context, Error, Result},
    model::{Model, ModelConfig, Norms, Prompt, TokenWindow, Tokenizer},
    request::{
        self, Continuation, LayerRange, OneOrMany, Op, Request, Sampling, Site, StrengthMode,
    },
};
use vectors::Source;

pub use captures::captures_of;

/// What a request is checked against.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub layers: usize,
    pub heads: usize,
    head_dim: usize,
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
            heads: config.heads,
            head_dim: config.head_dim,
            dim: config.dim,
            vocab: config.vocab,
            context: config.context,
            changes_branches: config.norms != Norms::Before || config.residual_scale != 1.0,
        }
    }
}

/// A request that was checked.
pub struct Resolved {
    /// Its prompt.
    pub prompt: Prompt,
    /// What the engine runs, once the patches are in it.
    pub job: Job,
    /// What is read off each of the job's captures.
    pub readings: Vec<Reading>,
    /// Rows of other requests that its injections take: see [`super::patching`].
    pub patches: Vec<Patch>,
}

impl Resolved {
    /// The job of a request that takes nothing from others.
    ///
    /// # Errors
    /// It does.
    pub fn alone(self) -> Result<(Prompt, Job)> {
        match self.patches.first() {
            None => Ok((self.prompt, self.job)),
            Some(patch) => Err(Error::new("rows of another request, of which there is none here")
                .at(format!("inject[{}].source", patch.field))
                .got(&patch.request)),
        }
    }
}

/// Renders a request's prompt and checks and resolves all that is asked about it.
///
/// ```no_run
/// use inkling::{Engine, Injection, Model, Request};
/// use inkling::engine::{Options, resolve::resolve, vectors::VectorFiles};
/// use inkling::request::{Message, VectorRef};
///
/// let model = Model::open("model.gguf".as_ref())?;
/// let request = Request {
///     id: "ocean".into(),
///     messages: Some(vec![Message { role: "user".into(), content: "How are you?".into() }]),
///     inject: vec![Injection::add(VectorRef::Named("words.safetensors#ocean".into()), 20, 4.0)],
///     n: 1,
///     ..Request::default()
/// };
/// let (_, job) = resolve(&request, &model, &mut VectorFiles::new("."))?.alone()?;
/// let finished = Engine::start(&model, &Options::default())?.run(job)?;
/// println!("{}", finished.outcome.samples[0].text);
/// # Ok::<(), inkling::Error>(())
/// ```
///
/// # Errors
/// Something does not fit the model, the prompt or the vectors.
pub fn resolve(request: &Request, model: &Model, files: &mut VectorFiles) -> Result<Resolved> {
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

    let (mut inject, mut patches) = (Vec::new(), Vec::new());
    for (i, injection) in request.inject.iter().enumerate() {
        let field = format!("inject[{i}]");
        let windows = prompt.windows(injection).at(|| field.clone())?;
        for window in &windows {
            check_window(injection.strength_mode, *window, prompt.tokens.len(), rows, &field)?;
        }
        let mut source = Source { limits, model_hash: &|| model.hash(), files };
        let own = injections(injection, &windows, &mut source, &field)?;
        if let Some(wanted) = &injection.source {
            let first = inject.len();
            for (at, injection) in own.iter().enumerate() {
                let patch = Patch::new((i, first + at), wanted, injection, limits);
                patches.push(patch.at(|| format!("{field}.source"))?);
            }
        }
        inject.extend(own);
    }
    let (mut capture, mut readings) = (Vec::new(), Vec::new());
    for (i, wanted) in request.capture.iter().enumerate() {
        let field = format!("capture[{i}]");
        for one in captures::captures(wanted, prompt.tokens.len(), limits, &field)? {
            let mut source = Source { limits, model_hash: &|| model.hash(), files };
            let reduced = captures::reduced(one, wanted.reduce.as_ref(), &mut source);
            let (one, reading) = reduced.at(|| format!("{field}.reduce"))?;
            capture.push(one);
            readings.push(reading);
        }
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
    Ok(Resolved { prompt, job, readings, patches })
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

/// One injection for each of its layers, heads and windows.
fn injections(
    wanted: &request::Injection,
    windows: &[TokenWindow],
    source: &mut Source,
    field: &str,
) -> Result<Vec<Injection>> {
    let strength = check_operation(wanted).at(|| field.to_owned())?;
    let (site, layers, heads) = place_of(wanted, source, field)?;
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
        let places = heads.iter().flat_map(|head| windows.iter().map(move |window| (head, window)));
        all.extend(places.map(|(head, window)| Injection {
            vector: Arc::clone(&vector),
            by_position: false,
            site,
            layer,
            head: *head,
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
    if wanted.vector.is_some() && wanted.source.is_some() {
        return Err(Error::new("a vector in two ways").expected("either `vector` or `source`"));
    }
    let has_vector = wanted.vector.is_some() || wanted.source.is_some();
    presence("vector", has_vector, op != Op::Scale)?;
    let has_strength = !matches!(op, Op::ProjectOut | Op::Clamp);
    // Rows of another request are mostly taken as they are.
    let default = wanted.source.as_ref().filter(|_| has_strength).map(|_| 1.0);
    presence("strength", wanted.strength.or(default).is_some(), has_strength)?;
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
    Ok(wanted.strength.or(default).unwrap_or(0.0))
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

/// The site, the blocks and the heads of an injection; no head where the site has none.
fn place_of(
    wanted: &request::Injection,
    source: &Source,
    field: &str,
) -> Result<(Site, Vec<usize>, Vec<Option<usize>>)> {
    let limits = source.limits;
    let two_ways = || {
        Error::new("a point in two ways").at(field).expected("either `hook`, or `layer` and `site`")
    };
    let (site, layers, named) = match (&wanted.hook, &wanted.layer) {
        (Some(_), Some(_)) => return Err(two_ways()),
        (Some(_), None) if wanted.site.is_some() => return Err(two_ways()),
        (Some(hook), None) => {
            let point = points::parse(hook, limits).at(|| field.to_owned())?;
            let (site, layer) = point.injected().at(|| field.to_owned())?;
            (site, vec![layer], point.head)
        }
        (None, Some(layer)) => {
            let layers = indices_of(layer, limits.blocks(), &format!("{field}.layer"))?;
            (wanted.site.unwrap_or_default(), layers, None)
        }
        (None, None) => {
            return Err(Error::new("an injection needs a layer").at(format!("{field}.layer")));
        }
    };
    let at = || format!("{field}.head");
    let heads = match (&wanted.head, named) {
        (Some(_), Some(_)) => return Err(Error::new("a head in two ways").at(at())),
        (None, Some(head)) => vec![Some(head)],
        (Some(_), None) if site != Site::HeadOut => {
            return Err(Error::new("a head of a site that has none")
                .at(at())
                .hint("head_out is what the heads of attention give"));
        }
        (Some(heads), None) => {
            let heads = indices_of(heads, limits.of_heads(), &at())?;
            heads.into_iter().map(Some).collect()
        }
        (None, None) if site == Site::HeadOut => {
            return Err(Error::new("head_out needs a head")
                .at(at())
                .expected("a head, a list of heads, or \"all\""));
        }
        (None, None) => vec![None],
    };
    Ok((site, layers, heads))
}

/// What indices count.
#[derive(Clone, Copy)]
struct Axis {
    name: &'static str,
    count: usize,
    whose: &'static str,
}

impl Limits {
    fn blocks(self) -> Axis {
        Axis { name: "layer", count: self.layers, whose: "the model has {} blocks" }
    }

    fn of_heads(self) -> Axis {
        Axis { name: "head", count: self.heads, whose: "a block has {} heads" }
    }
}

fn indices_of(wanted: &OneOrMany, of: Axis, field: &str) -> Result<Vec<usize>> {
    let indices = match wanted {
        OneOrMany::One(layer) => vec![*layer],
        OneOrMany::Many(layers) => layers.clone(),
        OneOrMany::Range(LayerRange { first, last }) if first > last => {
            return Err(Error::new(format!("a reversed range of {}s", of.name))
                .at(field)
                .expected("first <= last")
                .got(format!("{first} and {last}")));
        }
        OneOrMany::Range(LayerRange { first, last }) => {
            check_indices(&[*last], of, field)?;
            (*first..=*last).collect()
        }
        OneOrMany::All(_) => (0..of.count).collect(),
    };
    check_indices(&indices, of, field)?;
    Ok(indices)
}

pub(super) fn check_layers(layers: &[usize], limits: Limits, field: &str) -> Result<()> {
    check_indices(layers, limits.blocks(), field)
}

fn check_indices(indices: &[usize], of: Axis, field: &str) -> Result<()> {
    let Axis { name, count, whose } = of;
    if indices.is_empty() {
        return Err(Error::new(format!("no {name}s")).at(field).expected("at least one"));
    }
    for (i, index) in indices.iter().enumerate() {
        if *index >= count {
            let whose = whose.replace("{}", &count.to_string());
            return Err(Error::new(format!("{name} out of range"))
                .at(field)
                .expected(format!("0..={} ({whose})", count - 1))
                .got(index)
                .hint(format!("{name}s are counted from 0")));
        }
        if indices[..i].contains(index) {
            let twice = format!("a {name} stands twice in the list");
            return Err(Error::new(twice).at(field).got(index));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
