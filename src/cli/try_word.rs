//! `inkling try`: one prompt, one word, several doses side by side. Nothing is stored.

use std::process::ExitCode;

use serde::Serialize;

use super::{
    args::{EngineArgs, ModelArgs},
    output::{Output, note},
    progress::Bar,
    vectors::word_pieces,
};
use crate::{
    engine::{Engine, Finish, Finished, Job, Receipt, resolve::resolve, vectors::VectorFiles},
    error::{Context, Error, Result},
    experiment::{
        protocol::{Chat, Places, Protocol},
        vectors::{Inputs, SITE, extract},
    },
    model::Model,
    request::{
        Injection, Marker, Message, Position, Request, Sampling, Span, StrengthMode, Turn,
        VectorRef,
    },
};

/// Inject a word into one prompt at several doses and read the replies
#[derive(clap::Args)]
pub struct Args {
    /// What the user says
    prompt: String,
    /// The word to inject
    #[arg(long)]
    word: String,
    /// Where: a fraction of the depth (0.8) or a block (24)
    #[arg(long, value_name = "LAYER", default_value = "0.8")]
    layer: String,
    /// Doses in units of the stream's mean norm; 0 is without injection
    #[arg(
        long,
        value_name = "DOSES",
        value_delimiter = ',',
        default_value = "0,.25,.5",
        allow_negative_numbers = true
    )]
    dose: Vec<f32>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// The system message [default: the template's own]
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 is greedy
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    temperature: f32,
    /// The same for every dose
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The most tokens of a reply
    #[arg(long, value_name = "N", default_value_t = 60)]
    max_tokens: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown<'a> {
    word: &'a str,
    layer: usize,
    replies: Vec<Reply<'a>>,
}

#[derive(Serialize)]
struct Reply<'a> {
    dose: f32,
    text: &'a str,
    finish: Finish,
    receipts: &'a [Receipt],
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let model = args.model.open_or_demo()?;
    let layer = layer(&args.layer, model.config.layers)?;
    let pieces = word_pieces(&model, &args.word)?;
    if pieces.len() > 1 {
        note(format!("{:?} is several tokens: {pieces:?}", args.word));
    }
    // Everything is checked before the vector is made.
    let placeholder = vec![1.0; model.config.dim];
    args.jobs(&model, layer, &placeholder)?;
    let engine = args.engine.start(&model)?;
    let mut bar = Bar::default();
    let vector = concept_vector(&engine, &model, args, layer, &mut bar)?;
    let finished = run(&engine, args.jobs(&model, layer, &vector)?, &mut bar)?;
    drop(bar);
    let shown = Shown {
        word: &args.word,
        layer,
        replies: args.dose.iter().zip(&finished).map(|(dose, done)| reply(*dose, done)).collect(),
    };
    let mut output = Output::new();
    if args.json {
        output.json(&shown)?;
    } else {
        let blocks = model.config.layers;
        output.line(format!("{} at resid_post.{layer} of {blocks} blocks", shown.word))?;
        shown.replies.iter().flat_map(lines).try_for_each(|line| output.line(line))?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    /// One job a dose.
    fn jobs(&self, model: &Model, layer: usize, vector: &[f32]) -> Result<Vec<Job>> {
        let mut files = VectorFiles::new("");
        let one = |dose: &f32| {
            let request = self.request(layer, vector, *dose);
            resolve(&request, model, &mut files)?.alone().map(|(_, job)| job)
        };
        self.dose.iter().map(one).collect()
    }

    /// The window opens where the user's text does.
    fn request(&self, layer: usize, vector: &[f32], dose: f32) -> Request {
        let prompt = self.prompt.trim();
        let span = Span { text: prompt.to_owned(), turn: Some(Turn::Index(-1)), nth: None };
        let injection = Injection {
            site: Some(SITE),
            strength_mode: StrengthMode::Reference,
            from: Some(Position::Marker(Marker::StartOf(span))),
            ..Injection::add(VectorRef::Values(vector.to_vec()), layer, dose)
        };
        Request {
            id: format!("dose {dose}"),
            messages: Some(vec![Message { role: "user".into(), content: prompt.to_owned() }]),
            system: self.system.clone(),
            inject: if dose == 0.0 { Vec::new() } else { vec![injection] },
            sampling: Sampling {
                temperature: self.temperature,
                seed: self.seed,
                max_tokens: self.max_tokens,
                ..Sampling::default()
            },
            n: 1,
            ..Request::default()
        }
    }
}

/// A fraction of the depth where it has a point, else a block.
fn layer(text: &str, blocks: usize) -> Result<usize> {
    let bad = || {
        Error::new("not a layer")
            .at("--layer")
            .expected(format!("a fraction of the depth like 0.8, or a block 0..={}", blocks - 1))
            .got(text)
    };
    let place = if text.contains('.') {
        let depth: f64 = text.parse().map_err(|_| bad())?;
        if !(0.0..=1.0).contains(&depth) {
            return Err(bad());
        }
        Places::Depths(vec![depth])
    } else {
        Places::Layers(vec![text.parse().map_err(|_| bad())?])
    };
    let places = place.resolve(blocks).at(|| "--layer".into())?;
    places.first().map(|place| place.layer).ok_or_else(bad)
}

fn concept_vector(
    engine: &Engine,
    model: &Model,
    args: &Args,
    layer: usize,
    bar: &mut Bar,
) -> Result<Vec<f32>> {
    let recipe = Protocol::builtin("injected-thoughts")?.vectors;
    let chat = Chat { system: args.system.clone(), ..Chat::default() };
    let inputs = Inputs::new(model, &chat, &recipe, std::slice::from_ref(&args.word))?;
    let extraction = extract(engine, recipe.recipe, &inputs, &[layer], model.config.dim, bar)?;
    let vector = extraction.vectors.get(&args.word, layer).map(<[f32]>::to_vec);
    vector.ok_or_else(|| Error::new("no vector was made").at(args.word.clone()))
}

fn run(engine: &Engine, jobs: Vec<Job>, bar: &mut Bar) -> Result<Vec<Finished>> {
    let total = jobs.len();
    let mut finished: Vec<Option<Finished>> = Vec::new();
    finished.resize_with(total, || None);
    let mut done = 0;
    engine.run_all(jobs, |index, result| {
        finished[index] = Some(result?);
        done += 1;
        bar.show("replies", done, total as u64, 0);
        Ok(())
    })?;
    let all: Option<Vec<Finished>> = finished.into_iter().collect();
    all.ok_or_else(|| Error::new("the engine lost a job"))
}

fn reply(dose: f32, finished: &Finished) -> Reply<'_> {
    let sample = finished.outcome.samples.first();
    Reply {
        dose,
        text: sample.map_or("", |sample| &sample.text),
        finish: sample.map_or(Finish::Length, |sample| sample.finish),
        receipts: &finished.outcome.receipts,
    }
}

/// For people: the reply under a heading, and its receipt.
fn lines(reply: &Reply) -> Vec<String> {
    let mut lines = vec![String::new(), format!("── dose {} ──", reply.dose)];
    lines.extend(reply.text.trim().lines().map(str::to_owned));
    if reply.receipts.is_empty() {
        lines.push("   (nothing injected)".into());
    }
    for receipt in reply.receipts {
        let number = |value: Option<f32>| value.map_or("n/a".into(), |value| format!("{value:.1}"));
        lines.push(format!(
            "   (‖h‖ before {}, change planned {}, measured {}, {} of {} rows)",
            number(receipt.norm_before),
            number(receipt.planned),
            number(receipt.measured),
            receipt.rows_touched,
            receipt.rows_expected
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_by_depth_and_by_number() {
        assert_eq!(layer("0.8", 30).unwrap(), 24);
        assert_eq!(layer(".67", 30).unwrap(), 20);
        assert_eq!(layer("1.0", 30).unwrap(), 29);
        assert_eq!(layer("24", 30).unwrap(), 24);
        for bad in ["30", "-1", "1.5", "-0.1", "deep", "0.8.1", ""] {
            let error = layer(bad, 30).unwrap_err().to_string();
            assert!(error.contains("--layer"), "{bad}: {error}");
        }
    }

    #[test]
    fn receipts_stand_below_the_reply() {
        let receipt = Receipt {
            site: "resid_post.24".into(),
            op: crate::request::Op::Add,
            every: 1,
            strength: 0.25,
            mode: StrengthMode::Reference,
            from: 3,
            to: None,
            vector_norm: 40.0,
            reference_norm: Some(138.0),
            norm_before: Some(140.04),
            planned: Some(34.5),
            measured: None,
            rows_expected: 20,
            rows_touched: 20,
        };
        let injected =
            Reply { dose: 0.25, text: "One.\nTwo.\n", finish: Finish::Stop, receipts: &[receipt] };
        let want = "   (‖h‖ before 140.0, change planned 34.5, measured n/a, 20 of 20 rows)";
        assert_eq!(lines(&injected), ["", "── dose 0.25 ──", "One.", "Two.", want]);
        let clean = Reply { dose: 0.0, text: "", finish: Finish::Length, receipts: &[] };
        assert_eq!(lines(&clean).last().unwrap(), "   (nothing injected)");
    }
}
