//! A judge in the engine: its answer is read from the logits of the first token, without sampling.

use std::cell::RefCell;

use super::{Answer, Judge, Question, templates::Options};
use crate::{
    engine::{FirstToken, Job},
    error::{Error, Result},
    experiment::Jobs,
    model::Model,
    request::{Message, Request, Sampling},
};

/// Less probability for all options together is no answer.
const LEAST_MASS: f64 = 0.05;

/// A model that is loaded and answers by its logits.
pub struct Local<'a> {
    /// The model.
    pub model: &'a Model,
    /// What runs it.
    pub engine: &'a dyn Jobs,
}

/// What was asked: the options and how many tokens stand for each.
struct Asked {
    options: Options,
    tokens: Vec<usize>,
}

impl Judge for Local<'_> {
    fn name(&self) -> String {
        format!("local:{}", self.model.name)
    }

    fn identity(&self) -> Result<String> {
        self.model.hash()
    }

    fn ask(
        &self,
        questions: &mut dyn Iterator<Item = Question>,
        done: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<()> {
        let asked = RefCell::new(Vec::new());
        let failed = RefCell::new(None);
        let mut jobs = questions.map_while(|question| match self.job(&question) {
            Ok((job, of)) => {
                asked.borrow_mut().push(of);
                Some(job)
            }
            Err(error) => {
                *failed.borrow_mut() = Some(error);
                None
            }
        });
        self.engine.run_all(&mut jobs, &mut |index, finished| {
            let answer = match finished {
                Ok(finished) => match &finished.outcome.first {
                    Some(first) => answer(&asked.borrow()[index], first),
                    None => Err("the engine gave no logits".into()),
                },
                Err(error) => Err(error.to_string()),
            };
            done(index, answer)
        })?;
        failed.into_inner().map_or(Ok(()), Err)
    }
}

impl Local<'_> {
    fn job(&self, question: &Question) -> Result<(Job, Asked)> {
        let tokenizer =
            self.model.tokenizer.as_deref().ok_or_else(|| {
                Error::new("the model has no tokenizer").at(self.model.name.clone())
            })?;
        let request = Request {
            messages: Some(vec![Message { role: "user".into(), content: question.user.clone() }]),
            system: Some(question.system.clone()),
            ..Request::default()
        };
        let mut asked = Asked { options: question.options, tokens: Vec::new() };
        let mut watch: Vec<u32> = Vec::new();
        for option in 0..question.options.count() {
            let before = watch.len();
            let name = question.options.name(option);
            let mut upper = name.clone();
            if let Some(first) = upper.get_mut(..1) {
                first.make_ascii_uppercase();
            }
            for form in [&name, &upper] {
                for text in [form.clone(), format!(" {form}")] {
                    if let [token] = tokenizer.encode(&text, false)?.tokens[..]
                        && !watch.contains(&token)
                    {
                        watch.push(token);
                    }
                }
            }
            if watch.len() == before {
                return Err(Error::new("an answer is not one token of the judge's")
                    .at(self.model.name.clone())
                    .got(name));
            }
            asked.tokens.push(watch.len() - before);
        }
        let job = Job {
            tokens: self.model.render(&request)?.tokens,
            watch,
            sampling: Sampling { max_tokens: 0, ..Sampling::default() },
            n: 1,
            ..Job::default()
        };
        Ok((job, asked))
    }
}

/// The likeliest option with its probability among the options, and theirs together.
fn answer(asked: &Asked, first: &FirstToken) -> Answer {
    let mut logits = first.watch.iter().map(|logit| f64::from(*logit));
    let probabilities: Vec<f64> = asked
        .tokens
        .iter()
        .map(|tokens| {
            let of = logits.by_ref().take(*tokens);
            of.map(|logit| (logit - f64::from(first.logsumexp)).exp()).sum()
        })
        .collect();
    let mass: f64 = probabilities.iter().sum();
    if mass.is_nan() || mass < LEAST_MASS {
        return Err(format!("the answers have {:.1} % of the probability together", 100.0 * mass));
    }
    let best = (0..probabilities.len())
        .max_by(|a, b| probabilities[*a].total_cmp(&probabilities[*b]).then(b.cmp(a)))
        .unwrap_or(0);
    let name = asked.options.name(best);
    let share = probabilities[best] / mass;
    Ok(format!("{name} (probability {share:.3} of the answers', which have {mass:.3})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_answer_counts_where_answers_are_likely_at_all() {
        let asked = |tokens: &[usize], options| Asked { options, tokens: tokens.to_vec() };
        let first = |watch: &[f32]| FirstToken {
            watch: watch.iter().map(|p| p.ln()).collect(),
            logsumexp: 0.0,
            entropy: 1.0,
        };
        let yes_no = asked(&[2, 1], Options::YesNo);
        let said = answer(&yes_no, &first(&[0.3, 0.2, 0.4])).unwrap();
        assert!(said.starts_with("yes (probability 0.556"), "{said}: forms add up");
        let unsure = answer(&yes_no, &first(&[0.01, 0.01, 0.02])).unwrap_err();
        assert!(unsure.contains("4.0 %"), "{unsure}");
        let letters = asked(&[1, 1, 1], Options::Letters(3));
        assert!(answer(&letters, &first(&[0.1, 0.2, 0.6])).unwrap().starts_with("C "));
        assert!(answer(&letters, &first(&[0.1, f32::NAN, 0.6])).is_err());
    }
}
