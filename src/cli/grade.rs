//! `inkling grade`: verdicts on a run's stored replies.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::ValueEnum;
use serde::Serialize;

use super::{
    args::{EngineArgs, ModelArgs},
    hub,
    output::{Output, note},
    progress::{Bar, stop_in_order},
};
use crate::{
    error::{Error, Result},
    experiment::{
        folder, grading,
        judging::{
            self, Http, Judge, Local, Templates,
            chat::{Endpoint, Key},
        },
        protocol::JudgePlan,
        results::{Criterion, Grade},
        stats::Count,
    },
    model::Model,
};

/// Grade the replies of a run; verdicts of several judges stand side by side
#[derive(clap::Args)]
pub struct Args {
    /// The run folder
    dir: PathBuf,
    /// Who judges: rules need no model; local is a model run here; http is one behind a chat endpoint
    /// [default: those that the run's protocol names]
    #[arg(long, value_name = "JUDGE")]
    judge: Option<Kind>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    endpoint: EndpointArgs,
    /// What judge models are asked: a file like experiments/judges/questions.toml
    #[arg(long, value_name = "FILE")]
    questions: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Rules,
    Local,
    Http,
}

/// A chat endpoint.
#[derive(clap::Args)]
struct EndpointArgs {
    /// Base URL of the endpoint, up to and with /v1 (OpenAI-compatible)
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The model's name there
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// The environment variable that holds the key; it is never written anywhere
    #[arg(long, value_name = "VAR", conflicts_with = "key_file")]
    key_env: Option<String>,
    /// The file that holds the key
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// Questions in flight
    #[arg(long, value_name = "N", default_value_t = 8)]
    concurrency: usize,
    /// Requests a minute at most
    #[arg(long, value_name = "N")]
    per_minute: Option<u32>,
    /// Requests at most, further tries included; what is not asked then is missing, and asked the next time
    #[arg(long, value_name = "N")]
    max_requests: Option<u64>,
    /// Further tries of a question
    #[arg(long, value_name = "N", default_value_t = 5)]
    retries: u32,
    /// Seconds that a try may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

impl EndpointArgs {
    fn open(&self, url: &str, name: &str, key_env: Option<&str>) -> Result<Endpoint> {
        let key = match (key_env, &self.key_file) {
            (_, Some(path)) => Some(Key::from_file(path)?),
            (Some(variable), None) => Some(Key::from_env(variable)?),
            (None, None) => None,
        };
        let mut endpoint = Endpoint::new(url, name);
        endpoint.key = key;
        endpoint.concurrency = self.concurrency;
        endpoint.per_minute = self.per_minute;
        endpoint.max_requests = self.max_requests;
        endpoint.retries = self.retries;
        endpoint.timeout = Duration::from_secs(self.timeout);
        endpoint.max_tokens = ANSWER_TOKENS;
        endpoint.check()?;
        Ok(endpoint)
    }
}

/// Room for one word, and for a model that says a few before it.
const ANSWER_TOKENS: u32 = 16;

/// How many replies got a yes.
#[derive(Serialize)]
pub struct Counts {
    judge: String,
    replies: usize,
    /// Of the replies that were judged on it.
    verdicts: BTreeMap<Criterion, Count>,
    /// Verdicts that could not be had.
    missing: usize,
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let plans = match args.judge {
        Some(kind) => vec![args.plan(kind)?],
        None => {
            args.check_no_judge()?;
            folder::parse_protocol(&folder::load(&args.dir)?.manifest.protocol)?.judges
        }
    };
    stop_in_order();
    let mut output = Output::new();
    let mut missing = 0;
    for plan in plans {
        let counts = judge(args, &plan)?;
        if args.json {
            output.json(&counts)?;
        } else {
            output.line(counts.line())?;
        }
        if plan == JudgePlan::Rules && !args.json {
            note(grading::agreement(&grading::labels()?)?.to_string());
        }
        missing += counts.missing;
    }
    if missing > 0 {
        note("the same command again asks what is missing");
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    /// What only a judge of the command line can mean.
    fn check_no_judge(&self) -> Result<()> {
        let given = [
            ("--model", self.model.model.is_some()),
            ("--url", self.endpoint.url.is_some()),
            ("--name", self.endpoint.name.is_some()),
            ("--questions", self.questions.is_some()),
        ];
        match given.iter().find(|(_, is_given)| *is_given) {
            None => Ok(()),
            Some((flag, _)) => Err(Error::new("this goes with a judge")
                .at(*flag)
                .expected("--judge local or --judge http beside it")),
        }
    }

    /// The judge of the command line.
    fn plan(&self, kind: Kind) -> Result<JudgePlan> {
        let questions = self.questions.clone();
        let missing =
            |flag: &str, what: &str| Error::new("the judge is not known").at(flag).expected(what);
        Ok(match kind {
            Kind::Rules => JudgePlan::Rules,
            Kind::Local => JudgePlan::Local {
                model: self
                    .model
                    .model
                    .clone()
                    .ok_or_else(|| missing("--model", "its path or name"))?,
                questions,
            },
            Kind::Http => JudgePlan::Http {
                url: self
                    .endpoint
                    .url
                    .clone()
                    .ok_or_else(|| missing("--url", "https://HOST/v1"))?,
                name: self
                    .endpoint
                    .name
                    .clone()
                    .ok_or_else(|| missing("--name", "its name there"))?,
                key_env: self.endpoint.key_env.clone(),
                questions,
            },
        })
    }
}

fn judge(args: &Args, plan: &JudgePlan) -> Result<Counts> {
    match plan {
        JudgePlan::Rules => grade(&args.dir),
        JudgePlan::Local { model, questions } => {
            let model = Model::open(&hub::model_path(model)?)?;
            let engine = args.engine.start(&model)?;
            judged(args, &Local { model: &model, engine: &engine }, questions.as_deref())
        }
        JudgePlan::Http { url, name, key_env, questions } => {
            // A run folder may come from anybody: it can't choose which variable is sent where.
            let own = &args.endpoint;
            if let (Some(variable), None, None) = (key_env, &own.key_env, &own.key_file) {
                return Err(Error::new("the protocol's judge wants a key")
                    .at(url.clone())
                    .expected(format!("--key-env {variable}, or --key-file"))
                    .hint("only the command line says which key is sent to this address"));
            }
            let endpoint = own.open(url, name, own.key_env.as_deref())?;
            judged(args, &Http(endpoint), questions.as_deref())
        }
    }
}

/// Grades all replies of a folder by rules and stores the verdicts.
pub fn grade(dir: &Path) -> Result<Counts> {
    let run = folder::load(dir)?;
    let protocol = folder::parse_protocol(&run.manifest.protocol)?;
    let grades = judging::rule_grades(&run, &protocol)?;
    folder::append_grades(dir, &grades)?;
    Ok(Counts::of(grading::JUDGE, &grades))
}

/// Likewise by a judge model.
fn judged(args: &Args, judge: &dyn Judge, questions: Option<&Path>) -> Result<Counts> {
    let templates = Templates::open(questions)?;
    let mut bar = Bar::default();
    let grades = judging::grade(&args.dir, judge, &templates, &mut bar)?;
    drop(bar);
    let name = grades.first().map_or_else(|| judge.name(), |grade| grade.judge.clone());
    Ok(Counts::of(&name, &grades))
}

impl Counts {
    fn of(judge: &str, grades: &[Grade]) -> Self {
        let mut counts = Self {
            judge: judge.to_owned(),
            replies: grades.len(),
            verdicts: BTreeMap::new(),
            missing: grades.iter().map(|grade| grade.missing.len()).sum(),
        };
        for (criterion, verdict) in grades.iter().flat_map(|grade| &grade.verdicts) {
            counts.verdicts.entry(*criterion).or_default().add(verdict.yes);
        }
        counts
    }

    /// For people, in one line.
    fn line(&self) -> String {
        let said = self.verdicts.iter();
        let said = said.map(|(criterion, count)| {
            format!("{} {} of {}", criterion.name().replace('_', " "), count.k, count.n)
        });
        let missing = match self.missing {
            0 => String::new(),
            some => format!("; {some} verdicts are missing"),
        };
        let said = said.collect::<Vec<_>>().join(", ");
        format!("{} replies graded by {}: {said}{missing}", self.replies, self.judge)
    }
}
