//! `inkling patch`: what one prompt shows, put into another one place by place.

use std::{path::PathBuf, process::ExitCode};

use serde::Serialize;

use super::{
    args::{EngineArgs, ModelArgs, site},
    output::{Output, columns, note},
    progress::Bar,
};
use crate::{
    engine::{Engine, Job, resolve::resolve, vectors::VectorFiles},
    error::{Context, Error, Result},
    experiment::patch_sweep::{Patched, Sweep},
    files,
    model::{Model, Prompt},
    request::{Message, Request, Sampling, Site},
};

/// Put what one prompt shows into another one, layer by layer and token by token (activation patching)
#[derive(clap::Args)]
pub struct Args {
    /// The prompt whose rows are taken
    #[arg(long, value_name = "TEXT")]
    clean: String,
    /// The prompt that they are put into: as many tokens
    #[arg(long, value_name = "TEXT")]
    corrupted: String,
    /// What the clean prompt is to be continued with; of several tokens the first counts
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    answer: String,
    /// What the other one is: logit(answer) - logit(wrong) is measured [default: the answer's log-probability]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    wrong: Option<String>,
    /// The prompts are what a user says to a chat model, and the answer begins with this
    #[arg(long, value_name = "PREFILL", num_args = 0..=1, default_missing_value = "")]
    chat: Option<String>,
    /// Point of a block, as in requests: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, or
    /// `head_out`: head by head
    #[arg(long, value_name = "SITE", default_value = "resid_pre", value_parser = site)]
    site: Site,
    /// Only these blocks, e.g. 12,20 [default: all]
    #[arg(long, value_name = "LAYERS", value_delimiter = ',')]
    layers: Vec<usize>,
    /// Only these tokens, negative from the end [default: all]
    #[arg(long, value_name = "POSITIONS", value_delimiter = ',', allow_negative_numbers = true)]
    positions: Vec<i64>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Also write one row a place to this CSV file
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    model: &'a str,
    site: Site,
    /// `logit difference` or `log-probability`.
    metric: &'static str,
    /// The tokens that are measured.
    answer: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    wrong: Option<&'a str>,
    layers: &'a [usize],
    places: Vec<Place<'a>>,
    #[serde(flatten)]
    patched: Patched,
}

/// A position with its two tokens, or a head.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Place<'a> {
    Position { position: usize, clean: &'a str, corrupted: &'a str },
    Head(usize),
}

impl Place<'_> {
    fn cells(&self) -> [String; 3] {
        match self {
            Self::Position { position, clean, corrupted } if clean == corrupted => {
                [position.to_string(), format!("{clean:?}"), String::new()]
            }
            Self::Position { position, clean, corrupted } => {
                [position.to_string(), format!("{clean:?}"), format!("{corrupted:?}")]
            }
            Self::Head(head) => [head.to_string(), String::new(), String::new()],
        }
    }
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let model = args.model.open()?;
    let ((clean, clean_job), (corrupted, corrupted_job)) =
        (args.prompt(&args.clean, &model)?, args.prompt(&args.corrupted, &model)?);
    let len = clean.tokens.len();
    let (answer, answer_piece) = first_token(&model, &args.answer).at(|| "--answer".into())?;
    let wrong = args.wrong.as_ref().map(|text| first_token(&model, text)).transpose();
    let wrong = wrong.at(|| "--wrong".into())?;
    let sweep = Sweep {
        clean: clean_job,
        corrupted: corrupted_job,
        site: args.site,
        layers: super::vectors::layers(&args.layers, model.config.layers)?,
        positions: positions(&args.positions, len)?,
        answer,
        wrong: wrong.as_ref().map(|(token, _)| *token),
    };
    sweep.check()?;
    if let Some(path) = &args.out {
        files::check_writable(path)?;
    }
    let engine = args.engine.start(&model)?;
    let mut bar = Bar::default();
    let patched = sweep.run(&engine, |done, total| {
        bar.show("places", done as u64, total as u64, 0);
    })?;
    drop(bar);
    note(shared(&engine));
    let places: Vec<Place> = match args.site {
        Site::HeadOut => (0..model.config.heads).map(Place::Head).collect(),
        _ => {
            let place = |&position: &usize| Place::Position {
                position,
                clean: &clean.pieces[position],
                corrupted: &corrupted.pieces[position],
            };
            sweep.positions.iter().map(place).collect()
        }
    };
    let report = Report {
        model: &model.name,
        site: args.site,
        metric: if wrong.is_some() { "logit difference" } else { "log-probability" },
        answer: &answer_piece,
        wrong: wrong.as_ref().map(|(_, piece)| piece.as_str()),
        layers: &sweep.layers,
        places,
        patched,
    };
    if let Some(path) = &args.out {
        files::write_atomically(path, &csv(&report)?)?;
        note(format!("{} places in {}", sweep.layers.len() * report.places.len(), path.display()));
    }
    let mut output = Output::new();
    if args.json {
        output.json(&report)?;
    } else {
        lines(&report).iter().try_for_each(|line| output.line(line))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn prompt(&self, text: &str, model: &Model) -> Result<(Prompt, Job)> {
        let chat = || vec![Message { role: "user".into(), content: text.to_owned() }];
        let request = Request {
            id: "prompt".into(),
            messages: self.chat.as_ref().map(|_| chat()),
            text: self.chat.is_none().then(|| text.to_owned()),
            prefill: self.chat.clone().filter(|prefill| !prefill.is_empty()),
            sampling: Sampling { max_tokens: 0, ..Sampling::default() },
            n: 1,
            ..Request::default()
        };
        resolve(&request, model, &mut VectorFiles::new(""))?.alone()
    }
}

/// The first token of a continuation, and its text.
fn first_token(model: &Model, text: &str) -> Result<(u32, String)> {
    let tokenizer = model.tokenizer.as_ref();
    let tokenizer = tokenizer.ok_or_else(|| Error::new("the model has no tokenizer"))?;
    let tokens = tokenizer.encode(text, false)?.tokens;
    let first = tokens.first().copied().ok_or_else(|| Error::new("empty text"))?;
    if tokens.len() > 1 {
        note(format!("{text:?} is {} tokens: {:?} counts", tokens.len(), tokenizer.piece(first)));
    }
    Ok((first, tokenizer.piece(first)))
}

/// Ascending; all where none is named.
fn positions(wanted: &[i64], len: usize) -> Result<Vec<usize>> {
    if wanted.is_empty() {
        return Ok((0..len).collect());
    }
    let index = |position: &i64| {
        let index = if *position < 0 { len as i64 + position } else { *position };
        usize::try_from(index).ok().filter(|index| *index < len).ok_or_else(|| {
            Error::new("position outside the prompts")
                .at("--positions")
                .expected(format!("-{len}..={}", len - 1))
                .got(position)
        })
    };
    let mut positions = wanted.iter().map(index).collect::<Result<Vec<_>>>()?;
    positions.sort_unstable();
    positions.dedup();
    Ok(positions)
}

fn shared(engine: &Engine) -> String {
    let stats = engine.stats();
    let all = stats.unshared_prompt_layer_rows.max(1);
    let share = 100.0 * stats.layer_rows_saved() as f64 / all as f64;
    format!("{share:.0} % of the rows and blocks were shared")
}

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// One line a place: its effect at every layer as a bar, and the layer where it is largest.
fn lines(report: &Report) -> Vec<String> {
    let Report { patched, layers, .. } = report;
    let measured = match report.wrong {
        Some(wrong) => format!("logit({:?}) - logit({wrong:?})", report.answer),
        None => format!("log p({:?})", report.answer),
    };
    let (clean, corrupted) = (patched.clean, patched.corrupted);
    let mut lines = vec![
        format!("{measured}: clean {clean:.3}, corrupted {corrupted:.3}"),
        format!(
            "effect of patching {} at layers {}..{}, 0 = as corrupted, 1 = as clean",
            crate::request::CaptureSite::from(report.site).name(),
            layers[0],
            layers[layers.len() - 1]
        ),
    ];
    let rows = report.places.iter().enumerate().map(|(at, place)| {
        let effects: Vec<f64> = patched.effects.iter().map(|row| row[at]).collect();
        let best = (0..effects.len()).max_by(|&a, &b| effects[a].total_cmp(&effects[b]));
        let best = best.unwrap_or(0);
        let bar = effects.iter().map(|effect| {
            let level = (effect.clamp(0.0, 1.0) * (BARS.len() - 1) as f64).round();
            BARS[level as usize]
        });
        let [place, clean, corrupted] = place.cells();
        let most = format!("{:.2} at {}", effects[best], layers[best]);
        vec![place, clean, corrupted, bar.collect(), most]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    lines.extend(columns(&rows, &[true, false, false, false, true]));
    lines
}

/// A row a layer and place.
fn csv(report: &Report) -> Result<Vec<u8>> {
    let failed = |error: csv::Error| Error::new("can't write the table").got(error);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let name = if report.site == Site::HeadOut { "head" } else { "position" };
    let head = ["layer", name, "clean_token", "corrupted_token", "value", "effect"];
    writer.write_record(head).map_err(failed)?;
    for (at, layer) in report.layers.iter().enumerate() {
        for (place, cells) in report.places.iter().enumerate() {
            let (clean, corrupted) = match cells {
                Place::Position { clean, corrupted, .. } => (*clean, *corrupted),
                Place::Head(_) => ("", ""),
            };
            let numbers = [report.patched.values[at][place], report.patched.effects[at][place]];
            let [value, effect] = numbers.map(|number| number.to_string());
            let [place, ..] = cells.cells();
            let record = [layer.to_string(), place, clean.into(), corrupted.into(), value, effect];
            writer.write_record(record).map_err(failed)?;
        }
    }
    writer.into_inner().map_err(|error| Error::new("can't write the table").got(error.error()))
}
