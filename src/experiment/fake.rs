//! A stand-in for the engine and a prepared protocol, so that tests need no model.

use std::cell::Cell;

use crate::{
    engine::{Finish, Finished, FirstToken, Job, Outcome, Receipt, Sample, Score, vectors::norm},
    error::{Error, Result},
    experiment::{
        Jobs,
        prepare::{Prepared, PreparedPart, WordTokens},
        protocol::{Protocol, Recipe},
        results::{Fingerprint, ModelRecord, PromptRecord},
        seeds,
        vectors::{ConceptVectors, Inputs, extract},
    },
    request::StrengthMode,
};

/// Where the fake prompts' windows open.
pub const WINDOW: usize = 2;
/// Width of the fake model.
pub const DIM: usize = 4;

/// Answers each job from a hash of it, in bursts and out of order.
#[derive(Default)]
pub struct FakeEngine {
    /// Jobs done so far.
    pub jobs: Cell<usize>,
    /// Replies drawn so far.
    pub replies: Cell<usize>,
    /// Fails when this many jobs are done.
    pub fail_after: Option<usize>,
    /// Injections touch no row, as if a hook did not match.
    pub idle: bool,
}

impl FakeEngine {
    /// The residual row after these tokens.
    pub fn residual(tokens: &[u32], layer: usize, dim: usize) -> Vec<f32> {
        let value = |i: usize| {
            (seeds::seed(layer as u64, &format!("{tokens:?}"), "", i as u32) % 1000) as f32
        };
        (0..dim).map(|i| value(i) / 100.0 - 5.0).collect()
    }

    fn answer(&self, job: &Job) -> Finished {
        let inject: Vec<_> =
            job.inject.iter().map(|i| (&i.vector, i.layer, i.strength, i.from, i.to)).collect();
        let text = format!("{:?} {inject:?}", job.tokens);
        let number = |salt: &str, i: usize| seeds::seed(job.sampling.seed, &text, salt, i as u32);
        let watch = |i: usize| (seeds::seed(0, &text, "watch", i as u32) % 100) as f32 / 10.0;
        let count = 1 + number("length", 0) as usize % 5;
        let tokens: Vec<u32> = (0..count).map(|i| (number("token", i) % 1000) as u32).collect();
        let sample = Sample {
            text: format!("{tokens:?}"),
            tokens,
            finish: Finish::Stop,
            logprobs: Vec::new(),
        };
        let draws = job.sampling.max_tokens > 0;
        self.replies.set(self.replies.get() + usize::from(draws));
        let receipt = |injection: &crate::engine::Injection| Receipt {
            site: format!("resid_post.{}", injection.layer),
            op: crate::request::Op::Add,
            every: 1,
            strength: injection.strength,
            mode: StrengthMode::Reference,
            from: injection.from,
            to: injection.to,
            vector_norm: norm(&injection.vector),
            reference_norm: Some(100.0),
            norm_before: Some(100.0),
            planned: Some(100.0 * injection.strength),
            measured: Some(100.0 * injection.strength.abs()),
            rows_expected: 9,
            rows_touched: if self.idle { 0 } else { 9 },
        };
        let score = |tokens: &Vec<u32>| Score {
            logprobs: tokens.iter().map(|token| -(*token as f32) / 1000.0).collect(),
        };
        let capture = |capture: &crate::engine::Capture| {
            let Some(layer) = capture.layer else {
                return (0..8).map(|i| watch(i) / 4.0).collect(); // the logits of eight tokens
            };
            let row = |position: &usize| Self::residual(&job.tokens[..=*position], layer, DIM);
            capture.positions.iter().flat_map(row).collect()
        };
        Finished {
            outcome: Outcome {
                prompt_tokens: job.tokens.len(),
                samples: if draws { vec![sample] } else { Vec::new() },
                scores: job.score.iter().map(score).collect(),
                first: Some(FirstToken {
                    watch: (0..job.watch.len()).map(watch).collect(),
                    logsumexp: 15.0,
                    entropy: 1.5,
                }),
                receipts: job.inject.iter().map(receipt).collect(),
            },
            captures: job.capture.iter().map(capture).collect(),
        }
    }
}

impl Jobs for FakeEngine {
    fn run_all(
        &self,
        jobs: &mut dyn Iterator<Item = Job>,
        done: &mut dyn FnMut(usize, Result<Finished>) -> Result<()>,
    ) -> Result<()> {
        let mut index = 0;
        loop {
            let burst: Vec<Job> = (&mut *jobs).take(5).collect();
            if burst.is_empty() {
                return Ok(());
            }
            for (offset, job) in burst.iter().enumerate().rev() {
                if self.fail_after.is_some_and(|limit| self.jobs.get() >= limit) {
                    return Err(Error::new("the plug was pulled"));
                }
                self.jobs.set(self.jobs.get() + 1);
                done(index + offset, Ok(self.answer(job)))?;
            }
            index += burst.len();
        }
    }
}

/// The protocol for a made-up model of `layers` blocks: every word is one token.
pub fn prepared(protocol: &Protocol, layers: usize) -> Prepared {
    let part = |part: &crate::experiment::protocol::Part| {
        let words: Vec<String> =
            part.words.iter().take(part.count.unwrap_or(usize::MAX)).cloned().collect();
        PreparedPart {
            sentences: part.sentences.iter().cycle().take(words.len()).cloned().collect(),
            words,
            places: part.places.resolve(layers).unwrap(),
        }
    };
    let parts: Vec<PreparedPart> = protocol.parts.iter().map(part).collect();
    let all = parts.iter().flat_map(|part| part.words.iter().cloned());
    let token = |word: &str| (seeds::seed(0, "token", word, 0) % 100_000) as u32;
    let words: std::collections::BTreeMap<String, WordTokens> = all
        .map(|word| {
            let tokens = vec![token(&word)];
            let first_piece = format!(" {}", word.to_lowercase());
            (word, WordTokens { tokens, first_piece })
        })
        .collect();
    let mut prompts = std::collections::BTreeMap::new();
    let pairs = parts.iter().flat_map(|part: &PreparedPart| {
        let sentence = |at| part.sentences.get(at).cloned().unwrap_or_default();
        part.words.iter().enumerate().map(move |(at, word)| (word.clone(), sentence(at)))
    });
    let pairs: Vec<(String, String)> = pairs.collect();
    for (name, plan) in &protocol.prompts {
        for (word, sentence) in &pairs {
            let used = |text: &String, used| if used { text.clone() } else { String::new() };
            let word = used(word, plan.uses_word());
            let sentence = used(sentence, plan.uses_sentence());
            let tokens = vec![1, token(name), token(&word), token(&sentence)];
            let record = PromptRecord {
                name: name.clone(),
                text: name.clone(),
                pieces: tokens.iter().map(u32::to_string).collect(),
                tokens,
                from: WINDOW,
                to: None,
                after: plan.after.as_ref().map(|_| (0, Some(WINDOW))),
                probe: plan.probe.as_ref().map(|_| (1, 3)),
            };
            prompts.insert((name.clone(), word, sentence), record);
        }
    }
    Prepared {
        model: ModelRecord {
            name: "fake".into(),
            commit: None,
            hash: "fa4e".into(),
            architecture: "llama".into(),
            layers,
            dim: DIM,
            parameters: 1,
        },
        tokenizer: None,
        prompts,
        config: None,
        yes: vec![11, 12],
        no: vec![13],
        parts,
        band: protocol.parts.iter().flat_map(|part| part.band.clone()).collect(),
        inputs: {
            let band = protocol.parts.iter().flat_map(|part| &part.band);
            let names: Vec<String> = words.keys().chain(band).cloned().collect();
            Inputs {
                prompts: names.iter().map(|word| vec![vec![7, token(word)]]).collect(),
                words: names,
                baseline: (0..6).map(|i| vec![7, i]).collect(),
                ..Inputs::default()
            }
        },
        words,
    }
}

/// The fake engine's vectors for all of a prepared protocol's words and layers.
pub fn vectors(prepared: &Prepared) -> ConceptVectors {
    let engine = FakeEngine::default();
    let (recipe, layers) = (Recipe::MeanDifference, prepared.layers());
    extract(&engine, recipe, &prepared.inputs, &layers, DIM, &mut ()).unwrap().vectors
}

/// A fingerprint.
pub fn numerics() -> Fingerprint {
    Fingerprint {
        device: "cpu".into(),
        dtype: "bf16".into(),
        isa: "avx512".into(),
        kernels: "1".into(),
    }
}

/// The folder of a tiny model.
pub fn golden_model() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/plain")
}
