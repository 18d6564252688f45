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
    output::{Output, note},
    progress::Bar,
};
use crate::{
    error::{Error, Result},
    experiment::{
        folder, grading,
        judging::{
            self, Http, Judge, Local, Templates,
            chat::{Endpoint, Key},
        },
        results::{Criterion, Grade},
        stats::Count,
    },
};

/// Grade the replies of a run; verdicts of several judges stand side by side
#[derive(clap::Args)]
pub struct Args {
    /// The run folder
    dir: PathBuf,
    /// Who judges: rules need no model; local is a model run here; http is one behind a chat endpoint
    #[arg(long, value_name = "JUDGE", default_value = "rules")]
    judge: Kind,
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
    fn open(&self) -> Result<Endpoint> {
        let missing = |flag: &str, what: &str| {
            Error::new("the http judge needs to know where to ask").at(flag).expected(what)
        };
        let url = self.url.as_ref().ok_or_else(|| missing("--url", "https://HOST/v1"))?;
        let name = self.name.as_ref().ok_or_else(|| missing("--name", "the model's name"))?;
        let key = match (&self.key_env, &self.key_file) {
            (Some(variable), _) => Some(Key::from_env(variable)?),
            (None, Some(path)) => Some(Key::from_file(path)?),
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
    let counts = match args.judge {
        Kind::Rules => grade(&args.dir)?,
        Kind::Local => {
            let model = args.model.open()?;
            let engine = args.engine.start(&model)?;
            judged(args, &Local { model: &model, engine: &engine })?
        }
        Kind::Http => judged(args, &Http(args.endpoint.open()?))?,
    };
    let mut output = Output::new();
    if args.json {
        output.json(&counts)?;
    } else {
        output.line(counts.line())?;
        if args.judge == Kind::Rules {
            note(grading::agreement(&grading::labels()?)?.to_string());
        }
    }
    if counts.missing > 0 {
        note("the same command again asks what is missing");
    }
    Ok(ExitCode::SUCCESS)
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
fn judged(args: &Args, judge: &dyn Judge) -> Result<Counts> {
    let templates = Templates::open(args.questions.as_deref())?;
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
