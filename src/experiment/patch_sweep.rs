//! Activation patching, swept: what one prompt shows is put into another one, a place at a time, and the
//! next token's logits tell how much of the first prompt's answer that brings back (Meng et al. 2022, causal
//! tracing; Wang et al. 2022, path patching).

use std::sync::Arc;

use serde::Serialize;

use crate::{
    engine::{Capture, Engine, Finished, Injection, Job},
    error::{Error, Result},
    request::{CaptureSite, Op, Sampling, Site},
};

/// What is patched: the rows of `clean` go into `corrupted`.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// Where rows are taken from, with what is injected there.
    pub clean: Job,
    /// Where they are put, with what is injected there.
    pub corrupted: Job,
    /// At which point of a block; at `head_out` each head by itself, over all positions.
    pub site: Site,
    /// Blocks, in the order of the results.
    pub layers: Vec<usize>,
    /// Positions of both prompts; of heads: those that are patched together.
    pub positions: Vec<usize>,
    /// The token that `clean` should answer with.
    pub answer: u32,
    /// The one that `corrupted` should; without it the answer's log-probability is measured.
    pub wrong: Option<u32>,
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Patched {
    /// Of the prompt that rows are taken from: logit(answer) − logit(wrong), or the answer's
    /// log-probability.
    pub clean: f64,
    /// Of the other, unpatched.
    pub corrupted: f64,
    /// (layers, places): of the other, patched there. Places are positions, or heads.
    pub values: Vec<Vec<f64>>,
    /// (value − corrupted) / (clean − corrupted): 0 nothing came back, 1 all.
    pub effects: Vec<Vec<f64>>,
}

impl Sweep {
    /// Positions, or heads.
    pub fn places(&self, engine: &Engine) -> usize {
        if self.site == Site::HeadOut { engine.config().heads } else { self.positions.len() }
    }

    /// Runs both prompts once, and the patched one at every place; `progress` is told how many of how many
    /// are done.
    ///
    /// # Errors
    /// The prompts are of different lengths, or do not differ in what is measured; the device has failed.
    pub fn run(&self, engine: &Engine, mut progress: impl FnMut(usize, usize)) -> Result<Patched> {
        self.check()?;
        let shown = engine.run(Job {
            capture: self.layers.iter().map(|&layer| self.capture(layer)).collect(),
            ..self.measured(&self.clean)
        })?;
        let clean = self.value(&shown)?;
        let corrupted = self.value(&engine.run(self.measured(&self.corrupted))?)?;
        if (clean - corrupted).abs() < 1e-6 {
            return Err(Error::new(
                "the two prompts give the same answer: nothing could come back",
            )
            .expected("prompts whose next tokens differ")
            .got(format!("{clean} and {corrupted}")));
        }
        let places = self.places(engine);
        let mut values = vec![vec![f64::NAN; places]; self.layers.len()];
        let (mut done, total) = (0, places * self.layers.len());
        let rows = self.layers.iter().zip(&shown.captures);
        let jobs = rows.flat_map(|(&layer, rows)| {
            (0..places).map(move |place| self.job(engine, layer, rows, place))
        });
        engine.run_all(jobs, |at, finished| {
            values[at / places][at % places] = self.value(&finished?)?;
            done += 1;
            progress(done, total);
            Ok(())
        })?;
        let effect = |value: &f64| (value - corrupted) / (clean - corrupted);
        let effects = values.iter().map(|row| row.iter().map(effect).collect()).collect();
        Ok(Patched { clean, corrupted, values, effects })
    }

    /// Refuses prompts that cannot be compared place by place.
    ///
    /// # Errors
    /// They are of different lengths.
    pub fn check(&self) -> Result<()> {
        let (clean, corrupted) = (self.clean.tokens.len(), self.corrupted.tokens.len());
        if clean != corrupted {
            return Err(Error::new(
                "prompts of different lengths cannot be patched place by place",
            )
            .expected(format!("as many tokens as the clean prompt's {clean}"))
            .got(corrupted)
            .hint("choose words of as many tokens; `inkling tokens` shows them"));
        }
        Ok(())
    }

    fn capture(&self, layer: usize) -> Capture {
        Capture::rows(CaptureSite::from(self.site), Some(layer), self.positions.clone())
    }

    fn measured(&self, of: &Job) -> Job {
        Job {
            tokens: of.tokens.clone(),
            inject: of.inject.clone(),
            sampling: Sampling { max_tokens: 0, ..Sampling::default() },
            n: 1,
            watch: std::iter::once(self.answer).chain(self.wrong).collect(),
            ..Job::default()
        }
    }

    /// The corrupted prompt with the rows of one place.
    fn job(&self, engine: &Engine, layer: usize, rows: &[f32], place: usize) -> Job {
        let (config, mut job) = (engine.config(), self.measured(&self.corrupted));
        let patch = Injection {
            site: self.site,
            layer,
            op: Op::Replace,
            strength: 1.0,
            ..Injection::default()
        };
        if self.site != Site::HeadOut {
            let position = self.positions[place];
            let vector = Arc::from(&rows[place * config.dim..][..config.dim]);
            job.inject.push(Injection { vector, from: position, to: Some(position + 1), ..patch });
            return job;
        }
        // Positions that follow each other are one operation.
        let row = config.heads * config.head_dim;
        let runs = self.positions.chunk_by(|a, b| a + 1 == *b);
        let mut first = 0;
        for run in runs {
            let rows = rows[first * row..][..run.len() * row].chunks_exact(row);
            let head = rows.flat_map(|row| &row[place * config.head_dim..][..config.head_dim]);
            job.inject.push(Injection {
                vector: head.copied().collect(),
                by_position: true,
                head: Some(place),
                from: run[0],
                to: Some(run[0] + run.len()),
                ..patch.clone()
            });
            first += run.len();
        }
        job
    }

    fn value(&self, finished: &Finished) -> Result<f64> {
        let first = finished.outcome.first.as_ref();
        let first = first.ok_or_else(|| Error::new("the engine left the logits out"))?;
        let answer = f64::from(first.watch[0]);
        Ok(match self.wrong {
            Some(_) => answer - f64::from(first.watch[1]),
            None => answer - f64::from(first.logsumexp),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        engine::{Dtype, Options},
        model::ModelConfig,
    };

    fn sweep(site: Site) -> (Engine, Sweep) {
        let config = ModelConfig::of_shape("tiny", 64).unwrap();
        let options = Options { dtype: Dtype::F32, threads: Some(1), ..Options::default() };
        let engine = Engine::start_random(&config, &options).unwrap();
        let job = |first: u32| Job { tokens: vec![first, 9, 4, 7, 2], n: 1, ..Job::default() };
        let layers = (0..config.layers).collect();
        let sweep = Sweep {
            clean: job(5),
            corrupted: job(11),
            site,
            layers,
            positions: (0..5).collect(),
            answer: 3,
            wrong: Some(8),
        };
        (engine, sweep)
    }

    /// The first token is all that differs: in block 0 its place brings everything back and the others
    /// nothing; after the last block the last place brings everything back, and no other anything.
    #[test]
    fn what_differs_is_found() {
        let (engine, sweep) = sweep(Site::ResidPre);
        let mut told = (0, 0);
        let found = sweep.run(&engine, |done, total| told = (done, total)).unwrap();
        assert_eq!(told, (5 * sweep.layers.len(), 5 * sweep.layers.len()));
        let near = |effect: f64, want: f64| assert!((effect - want).abs() < 1e-4, "{effect}");
        near(found.effects[0][0], 1.0);
        found.effects[0][1..].iter().for_each(|&effect| near(effect, 0.0));
        let after = Sweep { site: Site::ResidPost, ..sweep };
        let found = after.run(&engine, |_, _| {}).unwrap();
        let last = found.effects.last().unwrap();
        near(last[4], 1.0);
        last[..4].iter().for_each(|&effect| near(effect, 0.0));
        assert!(engine.stats().layer_rows_saved() > 0, "places share what is clean");
    }

    /// All heads of a block together are what its attention adds.
    #[test]
    fn heads_are_patched_one_by_one() {
        let (engine, sweep) = sweep(Site::HeadOut);
        let found = sweep.run(&engine, |_, _| {}).unwrap();
        assert_eq!(found.values[0].len(), engine.config().heads);
        let gaps = Sweep { positions: vec![0, 1, 4], ..sweep.clone() };
        let rows = vec![1.0; 3 * engine.config().heads * engine.config().head_dim];
        let job = gaps.job(&engine, 0, &rows, 1);
        let windows: Vec<_> = job.inject.iter().map(|one| (one.from, one.to)).collect();
        assert_eq!(windows, [(0, Some(2)), (4, Some(5))]);
        gaps.run(&engine, |_, _| {}).unwrap();
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let (engine, sweep) = sweep(Site::ResidPre);
        let same = Sweep { corrupted: sweep.clean.clone(), ..sweep.clone() };
        assert!(same.run(&engine, |_, _| {}).unwrap_err().to_string().contains("same answer"));
        let corrupted = Job { tokens: vec![1], ..sweep.clean.clone() };
        let error = Sweep { corrupted, ..sweep }.run(&engine, |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("different lengths"), "{error}");
    }
}
