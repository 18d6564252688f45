//! What goes into the engine and what comes out: plain data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::request::{CaptureSite, Measure, Op, Sampling, Site, StrengthMode};

/// A request checked against the model: token ids, vectors in memory, windows as indices.
#[derive(Clone, Debug, Default)]
pub struct Job {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// What is planted.
    pub inject: Vec<Injection>,
    /// What is copied out.
    pub capture: Vec<Capture>,
    /// How it is continued; `max_tokens` 0 draws nothing.
    pub sampling: Sampling,
    /// Samples drawn from one prefill (at least 1).
    pub n: u32,
    /// Generation ends before the first of these texts (needs a tokenizer).
    pub stop: Vec<String>,
    /// Log-probabilities of each generated token and of this many top tokens.
    pub logprobs: Option<u32>,
    /// Continuations, teacher-forced after the prompt; each gives its tokens' log-probabilities.
    pub score: Vec<Vec<u32>>,
    /// Token ids whose logits at the first generated position are wanted.
    pub watch: Vec<u32>,
}

/// Vector, site, operation, strength and window.
#[derive(Clone, Debug)]
pub struct Injection {
    /// (width,) finite; empty for an operation without one. The width is the stream's, at `head_out`
    /// a head's.
    pub vector: Arc<[f32]>,
    /// Each position of the window has a vector of its own: `vector` is (positions, width). For `add`
    /// and `replace` with [`StrengthMode::Raw`].
    pub by_position: bool,
    /// Which point of the block.
    pub site: Site,
    /// Block, from 0.
    pub layer: usize,
    /// Head of attention, from 0: exactly at `head_out`.
    pub head: Option<usize>,
    /// What is done.
    pub op: Op,
    /// s, in units of `mode`; 0 where the operation has none.
    pub strength: f32,
    /// The unit of the strength and the bounds.
    pub mode: StrengthMode,
    /// Of [`Op::Clamp`]: the least and the greatest coordinate; infinite: none.
    pub bounds: (f32, f32),
    /// Whether the row is scaled back to its norm.
    pub keep_norm: bool,
    /// First position of the window.
    pub from: usize,
    /// End of the window (not in it); `None`: through every generated token.
    pub to: Option<usize>,
    /// Of the window's positions every so many, from the first on; at least 1.
    pub every: usize,
    /// Acts only where it is met.
    pub when: Option<Arc<Condition>>,
}

impl Default for Injection {
    /// Adds nothing to `resid_post.0`, everywhere.
    fn default() -> Self {
        Self {
            vector: Arc::default(),
            by_position: false,
            site: Site::default(),
            layer: 0,
            head: None,
            op: Op::default(),
            strength: 0.0,
            mode: StrengthMode::default(),
            bounds: (f32::NEG_INFINITY, f32::INFINITY),
            keep_norm: false,
            from: 0,
            to: None,
            every: 1,
            when: None,
        }
    }
}

/// What a row must show at a site for an injection to act.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// (dim,) finite, not zero.
    pub vector: Arc<[f32]>,
    /// Which point of the block.
    pub site: Site,
    /// Block, from 0.
    pub layer: usize,
    /// What is compared.
    pub measure: Measure,
    /// It must be greater.
    pub above: f32,
    /// It must be less.
    pub below: f32,
    /// Once met, it holds for the rest of the sequence.
    pub latch: bool,
}

/// Rows of one site to be copied out, or what becomes of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Capture {
    /// What is copied.
    pub site: CaptureSite,
    /// Of which block; `None` exactly where the site has none.
    pub layer: Option<usize>,
    /// Of which prompt positions, ascending.
    pub positions: Vec<usize>,
    /// What is handed out of the rows.
    pub reduce: Reduce,
}

impl Capture {
    /// The rows themselves.
    pub fn rows(site: CaptureSite, layer: Option<usize>, positions: Vec<usize>) -> Self {
        Self { site, layer, positions, reduce: Reduce::Rows }
    }
}

/// What is handed out of captured rows.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Reduce {
    /// Each row as it is.
    #[default]
    Rows,
    /// Their mean, one row, summed in f64 in the order of positions.
    Mean,
    /// Of each row its dot products with these vectors, (vectors, dim), then its norm: taken where the
    /// rows are, which stay there. The stream, what is added to it, and the final norm can be probed.
    Probe(Arc<[f32]>),
}

/// What is read off a job's capture.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Reading {
    /// The rows.
    Rows,
    /// Their mean.
    Mean,
    /// ‖h‖ of each row.
    Norm,
    /// Its cosine with each vector.
    Cosine(Along),
    /// h·v̂ with each vector.
    Coordinate(Along),
    /// So many likeliest tokens of each row by the logit lens.
    Lens(usize),
}

/// The vectors that rows are compared with.
#[derive(Clone, Debug, PartialEq)]
pub struct Along {
    /// As they were asked for.
    pub names: Vec<String>,
    /// ‖v‖ of each.
    pub norms: Vec<f64>,
}

impl PartialEq for Reduce {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Rows, Self::Rows) | (Self::Mean, Self::Mean) => true,
            // Mostly they are the same memory, which need not be read.
            (Self::Probe(a), Self::Probe(b)) => Arc::ptr_eq(a, b) || a == b,
            _ => false,
        }
    }
}

impl Reduce {
    /// What is handed out of so many rows of `width` numbers, which are as wide as the probes: how many
    /// rows, and how wide.
    pub fn shape(&self, rows: usize, width: usize) -> (usize, usize) {
        match self {
            Self::Rows => (rows, width),
            Self::Mean => (1, width),
            Self::Probe(_) => (rows, self.row_of(width)),
        }
    }

    /// Numbers that are kept of a row of `width`.
    pub fn row_of(&self, width: usize) -> usize {
        match self {
            Self::Rows | Self::Mean => width,
            Self::Probe(vectors) => vectors.len() / width + 1,
        }
    }
}

/// What a job reports, in this order: captures (once the prompt is done) and tokens, then
/// `Done` or `Failed`, exactly one of the two.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A token was drawn for sample `sample`.
    Token {
        /// 0..n.
        sample: u32,
        /// Its id.
        token: u32,
    },
    /// The rows of the job's capture number `capture`.
    Capture {
        /// Index into `Job::capture`.
        capture: usize,
        /// (positions, width) f32, or as [`Reduce::shape`] says.
        data: Vec<f32>,
    },
    /// All is done.
    Done(Outcome),
    /// The job was refused or cancelled.
    Failed(crate::error::Error),
}

/// What a finished job has to show.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The prompt's length.
    pub prompt_tokens: usize,
    /// One for each of the `n` samples; empty with `max_tokens` 0.
    pub samples: Vec<Sample>,
    /// One for each continuation of `Job::score`.
    pub scores: Vec<Score>,
    /// The distribution of the first generated token, before temperature.
    pub first: Option<FirstToken>,
    /// One for each of the job's injections, in order.
    pub receipts: Vec<Receipt>,
}

/// One generated continuation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The tokens drawn, the stop token included.
    pub tokens: Vec<u32>,
    /// Their text without special tokens; empty without a tokenizer.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// One a token where asked for.
    pub logprobs: Vec<TokenLogprob>,
}

/// Why a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// A stop token or a stop text.
    Stop,
    /// `max_tokens` were drawn, or the context was full.
    Length,
}

/// Natural-log probabilities under softmax(logits), before temperature.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Of the drawn token.
    pub logprob: f32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Log-probabilities of a given continuation's tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// One a token, natural log.
    pub logprobs: Vec<f32>,
}

/// The next-token distribution after the prompt.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstToken {
    /// Logits of `Job::watch`'s tokens, in its order.
    pub watch: Vec<f32>,
    /// Natural log of the sum of the exponentials of all logits.
    pub logsumexp: f32,
    /// Entropy of the distribution, in nats.
    pub entropy: f32,
}

/// Proof that an injection happened, and how large it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// `resid_post.20`, `head_out.20.3` and the like.
    pub site: String,
    /// What was done.
    #[serde(default, skip_serializing_if = "is_default")]
    pub op: Op,
    /// s as asked for; 0 where the operation has none.
    pub strength: f32,
    /// The unit of s.
    pub mode: StrengthMode,
    /// First position of the window.
    pub from: usize,
    /// Its end; `None`: through every generated token.
    pub to: Option<usize>,
    /// Of the window's positions every so many.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub every: usize,
    /// ‖v‖; their mean where each position of the window has its own.
    pub vector_norm: f32,
    /// N of mode `reference`: the mean clean ‖h‖ over the window's prompt positions but the first
    /// of the prompt; for the other modes too where it is known.
    pub reference_norm: Option<f32>,
    /// Mean ‖h‖ of the touched rows before the change.
    pub norm_before: Option<f32>,
    /// ‖change‖ of an `add` as planned: s·‖v‖, s, s·N or s·mean ‖h‖. What other operations change
    /// depends on the row.
    pub planned: Option<f32>,
    /// Mean measured ‖h after − h before‖ of the touched rows.
    pub measured: Option<f32>,
    /// Rows computed in the window, over all samples; of an injection with a condition, those that met
    /// it.
    pub rows_expected: u64,
    /// Rows changed.
    pub rows_touched: u64,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_one(every: &usize) -> bool {
    *every == 1
}
