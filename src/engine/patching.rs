//! Activation patching: injections whose vectors are rows that another request shows. The others run
//! first, with what is injected into them; then their rows are put where they are wanted.

use std::{collections::HashMap, sync::Arc};

use super::{
    Capture, Engine, Injection, Job, Reading, hooks::window_positions, resolve::Limits,
    sites::injected_width,
};
use crate::{
    error::{Context, Error, Result},
    model::{ModelConfig, Prompt, TokenWindow},
    request::{CaptureSite, Sampling, Site, Source, Window},
};

/// What an injection takes from another request.
#[derive(Clone, Debug)]
pub struct Patch {
    /// Which of the request's injections it is, as written and as resolved.
    pub field: usize,
    injection: usize,
    /// The other request's id.
    pub request: String,
    site: Site,
    layer: usize,
    head: Option<usize>,
    window: Option<Window>,
}

impl Patch {
    /// Of an injection as written and as resolved, whose place it takes what `wanted` leaves open from.
    pub(super) fn new(
        (field, index): (usize, usize),
        wanted: &Source,
        injection: &Injection,
        limits: Limits,
    ) -> Result<Self> {
        let (site, layer) =
            (wanted.site.unwrap_or(injection.site), wanted.layer.unwrap_or(injection.layer));
        let head = wanted.head.or(injection.head.filter(|_| site == Site::HeadOut));
        super::resolve::check_layers(&[layer], limits, "layer")?;
        if (site == Site::HeadOut) != (injection.site == Site::HeadOut) {
            return Err(Error::new("what heads give has another width than the stream")
                .at("site")
                .expected("head_out for head_out, and nowhere else"));
        }
        if head.is_some() != (site == Site::HeadOut) || head.is_some_and(|h| h >= limits.heads) {
            return Err(Error::new("no such head")
                .at("head")
                .expected(format!("of head_out one of 0..={}, else none", limits.heads - 1)));
        }
        let (request, window) = (wanted.request.clone(), wanted.window.clone());
        Ok(Self { field, injection: index, request, site, layer, head, window })
    }

    /// The positions of the other request's prompt.
    fn positions(&self, other: &Prompt, injection: &Injection) -> Result<Vec<usize>> {
        let len = other.tokens.len();
        let mut positions: Vec<usize> = match &self.window {
            None => {
                let to = injection.to.ok_or_else(|| {
                    Error::new("the injection's window has no end")
                        .expected("a `window` with one, such as \"prompt\", or one of the source")
                })?;
                check_end((injection.from, to, injection.every), len)?;
                (injection.from..to).step_by(injection.every).collect()
            }
            Some(window) => {
                let windows = other.window(window).at(|| "window".into())?;
                for TokenWindow { from, to, every } in &windows {
                    to.map_or(Ok(()), |to| check_end((*from, to, *every), len))?;
                }
                let each =
                    |w: TokenWindow| (w.from..w.to.unwrap_or(len).max(w.from)).step_by(w.every);
                windows.into_iter().flat_map(each).collect()
            }
        };
        positions.sort_unstable();
        match positions.is_empty() {
            true => Err(Error::new("no position of the other request's prompt").at("window")),
            false => Ok(positions),
        }
    }

    /// Makes the injection one of as many vectors as there are positions, which are still zeros.
    fn shape(
        &self,
        positions: usize,
        injection: &mut Injection,
        config: &ModelConfig,
    ) -> Result<()> {
        let window = window_positions(injection);
        if positions != 1 && window != Some(positions) {
            return Err(Error::new("another number of positions than the window has")
                .expected(match window {
                    Some(window) => format!("{window}, or a single one"),
                    None => "a single one: the window has no end".into(),
                })
                .got(positions)
                .hint("give the injection a window of as many tokens, or the source one token"));
        }
        injection.by_position = positions > 1;
        injection.vector = vec![0.0; positions * injected_width(self.site, config)].into();
        Ok(())
    }
}

/// A request with the patches that are to be put into it.
pub struct Patched {
    /// Its id, by which others name it.
    pub id: String,
    /// Its prompt.
    pub prompt: Prompt,
    /// What is run.
    pub job: Job,
    /// What is read off its captures.
    pub readings: Vec<Reading>,
    /// What its injections take from others.
    pub patches: Vec<Patch>,
}

/// What is to be put where: job and injection, the other job, its capture, the head.
struct Link {
    to: (usize, usize),
    from: usize,
    capture: Capture,
    head: Option<usize>,
}

/// Requests whose patches are checked and not filled in yet.
pub struct Plan {
    links: Vec<Link>,
}

impl Plan {
    /// Finds the other request of every patch, and checks that the rows fit; vectors are zeros
    /// until [`Plan::fill`].
    ///
    /// # Errors
    /// There is no such request, or it is patched itself; positions do not fit.
    pub fn new(requests: &mut [Patched], config: &ModelConfig) -> Result<Self> {
        let mut links = Vec::new();
        for at in 0..requests.len() {
            for patch in requests[at].patches.clone() {
                let link = Self::link(requests, (at, &patch), config);
                let id = requests[at].id.clone();
                links.push(link.at(|| format!("request {id:?}: inject[{}].source", patch.field))?);
            }
        }
        Ok(Self { links })
    }

    fn link(
        requests: &mut [Patched],
        (at, patch): (usize, &Patch),
        config: &ModelConfig,
    ) -> Result<Link> {
        let from = requests.iter().position(|other| other.id == patch.request);
        let from = from.ok_or_else(|| {
            Error::new("no request of this id").at("request").got(format!("{:?}", patch.request))
        })?;
        if !requests[from].patches.is_empty() {
            return Err(Error::new("the other request takes rows from others itself")
                .at("request")
                .expected("a request without a source")
                .got(format!("{:?}", patch.request)));
        }
        let other = requests[from].prompt.clone();
        let injection = &mut requests[at].job.inject[patch.injection];
        let positions = patch.positions(&other, injection)?;
        patch.shape(positions.len(), injection, config)?;
        let capture = Capture::rows(CaptureSite::from(patch.site), Some(patch.layer), positions);
        Ok(Link { to: (at, patch.injection), from, capture, head: patch.head })
    }

    /// Runs the requests that others take rows from, as far as their prompts go, and puts the rows in.
    ///
    /// # Errors
    /// One of them fails.
    pub fn fill(&self, engine: &Engine, requests: &mut [Patched]) -> Result<()> {
        let mut sources: Vec<usize> = self.links.iter().map(|link| link.from).collect();
        sources.sort_unstable();
        sources.dedup();
        // What each shows, each point once.
        let mut shown: HashMap<usize, Vec<Capture>> = HashMap::new();
        for Link { from, capture, .. } in &self.links {
            let captures = shown.entry(*from).or_default();
            if !captures.contains(capture) {
                captures.push(capture.clone());
            }
        }
        let jobs = sources.iter().map(|from| Job {
            capture: shown[from].clone(),
            sampling: Sampling { max_tokens: 0, ..Sampling::default() },
            n: 1,
            tokens: requests[*from].job.tokens.clone(),
            inject: of_prompt(&requests[*from].job),
            ..Job::default()
        });
        let jobs: Vec<Job> = jobs.collect();
        let mut rows: HashMap<usize, Vec<Vec<f32>>> = HashMap::new();
        engine.run_all(jobs, |index, finished| {
            let source = sources[index];
            let finished = finished.at(|| format!("request {:?}", requests[source].id))?;
            rows.insert(source, finished.captures);
            Ok(())
        })?;
        // Injections that take the same rows have the same memory: the bank then holds them once.
        let mut made: HashMap<(usize, usize, Option<usize>), Arc<[f32]>> = HashMap::new();
        for Link { to: (job, injection), from, capture, head } in &self.links {
            let at = shown[from].iter().position(|other| other == capture);
            let at = at.expect("every link's capture is among its request's");
            let vector = made.entry((*from, at, *head)).or_insert_with(|| {
                let rows = &rows[from][at];
                match head {
                    None => rows.as_slice().into(),
                    Some(head) => head_of(rows, engine.config(), *head),
                }
            });
            requests[*job].job.inject[*injection].vector = Arc::clone(vector);
        }
        Ok(())
    }
}

/// The injections that touch a prompt: nothing is generated here.
fn of_prompt(job: &Job) -> Vec<Injection> {
    let prompt = job.tokens.len();
    job.inject.iter().filter(|injection| injection.from < prompt).cloned().collect()
}

/// Refuses a window whose last position, of those it steps on, is behind a prompt.
fn check_end((from, to, every): (usize, usize, usize), len: usize) -> Result<()> {
    let last = from + to.saturating_sub(from + 1) / every * every;
    if last < len {
        return Ok(());
    }
    Err(Error::new("a position behind the other prompt")
        .at("window")
        .expected(format!("prompt positions: below {len}"))
        .got(last))
}

/// One head of rows of (heads, `head_dim`).
fn head_of(rows: &[f32], config: &ModelConfig, head: usize) -> Arc<[f32]> {
    let width = config.head_dim;
    let rows = rows.chunks_exact(config.heads * width);
    rows.flat_map(|row| &row[head * width..][..width]).copied().collect()
}
