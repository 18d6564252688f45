//! `inkling run`: a protocol into a run folder.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use serde::Serialize;

use super::{
    FAILED_CHECK, INTERRUPTED,
    args::{EngineArgs, ModelArgs},
    fetch,
    output::{Output, note},
    progress::{Bar, stop_in_order},
};
use crate::{
    error::{Context, Error, Result},
    experiment::{
        self, Shard, Summary, Ways,
        grid::{Grid, PartOutline},
        prepare::prepare,
        protocol::{Protocol, Setting},
        results::PromptRecord,
    },
    files,
    model::Model,
};

/// Failed checks shown one by one.
const SHOWN_FAILURES: usize = 5;

/// Run a protocol into a folder; the same command again finishes what was interrupted
#[derive(clap::Args)]
pub struct Args {
    /// A built-in protocol's name, or a TOML file
    #[arg(required_unless_present = "list")]
    protocol: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// The run folder
    #[arg(long, value_name = "DIR", required_unless_present_any = ["list", "dry_run"])]
    out: Option<PathBuf>,
    /// Instead of the protocol's seed
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Set a field of the protocol, as in parts.sampled.count=5 or parts.0.doses=[0.5]; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<Setting>,
    /// A smaller version that takes a minute or so on a processor: at most 8 words, 3 layers and 2 doses a part
    #[arg(long)]
    quick: bool,
    /// Show the prompts, their windows, the number of trials and the time they would take; run nothing
    #[arg(long)]
    dry_run: bool,
    /// List the built-in protocols
    #[arg(long, exclusive = true)]
    list: bool,
    /// Finish a folder that was begun with another device, type or instruction set
    #[arg(long)]
    allow_other_numerics: bool,
    /// Run only the i-th of n equal parts; the trials.jsonl of all parts together are the run's
    #[arg(long, value_name = "I/N")]
    shard: Option<Shard>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was run.
#[derive(Serialize)]
struct Shown<'a> {
    folder: String,
    trials: u64,
    run_now: usize,
    failed: &'a [(String, String)],
    cuts: &'a [String],
}

pub fn execute(args: &Args) -> anyhow::Result<ExitCode> {
    let Some(name) = &args.protocol else { return list() };
    let mut protocol = Protocol::open(name, &args.settings)?;
    protocol.seed = args.seed.unwrap_or(protocol.seed);
    if args.quick {
        protocol = protocol.quick();
    }
    if args.dry_run {
        return dry_run(&protocol, args);
    }
    let out = args.out.as_deref().ok_or_else(|| Error::new("no run folder").at("--out"))?;
    let model = args.model.open()?;
    let ways = Ways {
        allow_other_numerics: args.allow_other_numerics,
        shard: args.shard,
        vectors: kept_vectors(),
    };
    stop_in_order();
    let clock = Instant::now();
    let summary = run(&protocol, &model, &args.engine, out, ways)?;
    let mut output = Output::new();
    if args.json {
        output.json(&Shown {
            folder: out.display().to_string(),
            trials: summary.manifest.trials,
            run_now: summary.run,
            failed: &summary.failed,
            cuts: &summary.manifest.cuts,
        })?;
    } else {
        let (trials, seconds) = (summary.manifest.trials, clock.elapsed().as_secs_f64());
        let took = match summary.run {
            0 => String::new(),
            run => format!(", in {}: {:.1} a second", duration(seconds), run as f64 / seconds),
        };
        let now = summary.run;
        output.line(format!("{trials} trials in {} ({now} run now{took})", out.display()))?;
    }
    if summary.stopped {
        note("stopped: the same command goes on where it ended");
    } else {
        note(format!("next: inkling grade {0} && inkling report {0}", out.display()));
    }
    Ok(exit_code(&summary))
}

/// Runs a protocol into a folder and tells what was cut and what failed.
pub fn run(
    protocol: &Protocol,
    model: &Model,
    engine: &EngineArgs,
    out: &Path,
    ways: Ways,
) -> Result<Summary> {
    check_folder(out).at(|| "--out".into())?;
    let engine = engine.start(model)?;
    let mut bar = Bar::default();
    let summary = experiment::run(protocol, model, &engine, out, ways, &mut bar)?;
    drop(bar);
    if summary.resumed > 0 {
        note(format!("{} trials were finished before", summary.resumed));
    }
    summary.manifest.cuts.iter().for_each(|cut| note(format!("left out: {cut}")));
    for (trial, what) in summary.failed.iter().take(SHOWN_FAILURES) {
        note(format!("trial {trial} failed its check: {what}"));
    }
    if summary.failed.len() > SHOWN_FAILURES {
        note(format!("{} trials failed their check in all", summary.failed.len()));
    }
    Ok(summary)
}

/// 1 where a trial's injection was not as planned, 130 after an interrupt.
pub fn exit_code(summary: &Summary) -> ExitCode {
    match summary {
        Summary { stopped: true, .. } => ExitCode::from(INTERRUPTED),
        Summary { failed, .. } if failed.is_empty() => ExitCode::SUCCESS,
        _ => ExitCode::from(FAILED_CHECK),
    }
}

/// Fails now, and leaves nothing, if the folder could not be made or written to later.
fn check_folder(out: &Path) -> Result<()> {
    let existing = out.ancestors().find(|path| path.exists()).filter(|path| *path != Path::new(""));
    files::check_writable(&existing.unwrap_or(Path::new(".")).join("manifest.json"))
}

fn list() -> anyhow::Result<ExitCode> {
    let mut output = Output::new();
    for name in Protocol::builtins() {
        output.line(format!("{name}: {}", Protocol::builtin(name)?.about))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn dry_run(protocol: &Protocol, args: &Args) -> anyhow::Result<ExitCode> {
    let model = args.model.open()?;
    let prepared = prepare(&model, protocol)?;
    let parts = Grid::new(protocol, &prepared).outline();
    let engine = args.engine.start(&model)?;
    let mut bar = Bar::default();
    let kept = kept_vectors();
    let estimate = experiment::estimate(protocol, &prepared, &engine, kept.as_deref(), &mut bar)?;
    drop(bar);
    let (trials, seconds): (usize, f64) =
        (estimate.trials.iter().sum(), estimate.seconds.iter().sum());
    let mut output = Output::new();
    if args.json {
        let part = |(part, seconds): (&PartOutline, &f64)| part_json(part, *seconds);
        let plan = serde_json::json!({
            "protocol": protocol,
            "prompts": prepared.prompt_records(),
            "parts": parts.iter().zip(&estimate.seconds).map(part).collect::<Vec<_>>(),
            "trials": trials,
            "prompt_tokens": estimate.prompt_tokens,
            "drawn_tokens": estimate.drawn_tokens,
            "seconds": seconds,
        });
        output.json(&plan)?;
        return Ok(ExitCode::SUCCESS);
    }
    let all: Vec<_> = prepared.prompts.iter().collect();
    for of_name in all.chunk_by(|((a, ..), _), ((b, ..), _)| a == b) {
        let (_, first) = of_name[0];
        prompt_lines(first).iter().try_for_each(|line| output.line(line))?;
        if of_name.len() > 1 {
            let more = of_name.len() - 1;
            output.line(format!("  and {more} more with other words (all of them with --json)"))?;
        }
    }
    for (part, seconds) in parts.iter().zip(&estimate.seconds) {
        output.line(format!("{}, about {}", part_line(part), duration(*seconds)))?;
    }
    output.line(format!(
        "in all {trials} trials, {} prompt tokens, at most {} drawn, about {} on this machine",
        estimate.prompt_tokens,
        estimate.drawn_tokens,
        duration(seconds)
    ))?;
    if let Some(budget) = protocol.budget_seconds {
        output.line(format!("trials that would take more than {budget} s in all are left out"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Where vectors are kept for other runs.
pub fn kept_vectors() -> Option<PathBuf> {
    fetch::cache_folder().ok().map(|folder| folder.join("vectors"))
}

/// In the unit that a reader would choose.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn part_json(part: &PartOutline, seconds: f64) -> serde_json::Value {
    serde_json::json!({
        "name": part.name,
        "words": part.words,
        "places": part.places,
        "doses": part.doses,
        "repeats": part.repeats,
        "injected": part.injected,
        "clean": part.clean,
        "seconds": seconds,
    })
}

fn part_line(part: &PartOutline) -> String {
    let layers: Vec<String> = part.places.iter().map(|place| place.layer.to_string()).collect();
    let doses: Vec<String> = part.doses.iter().map(ToString::to_string).collect();
    format!(
        "part {}: {} injected trials and {} clean ones ({} words, layers {}, doses {}, repeats {})",
        part.name,
        part.injected,
        part.clean,
        part.words.len(),
        layers.join(" "),
        doses.join(" "),
        part.repeats
    )
}

/// The prompt with its window marked by ⟦ and ⟧, that of condition `after` by ⟪ and ⟫, probed tokens by ⟨
/// and ⟩.
pub fn prompt_lines(prompt: &PromptRecord) -> Vec<String> {
    let end = prompt.to.map_or_else(|| "generated tokens".into(), |to| to.to_string());
    let mut head = vec![format!("prompt {}: {} tokens", prompt.name, prompt.tokens.len())];
    let mut marks = Vec::new();
    if let Some((from, to)) = prompt.probe {
        head.push(format!("probed {from}..{to}"));
        marks.push((from, Some(to), '⟨', '⟩'));
    } else {
        head.push(format!("window {}..{end}", prompt.from));
        marks.push((prompt.from, prompt.to, '⟦', '⟧'));
    }
    if let Some((from, to)) = prompt.after {
        let end = to.map_or_else(|| "generated tokens".into(), |to| to.to_string());
        head.push(format!("after {from}..{end}"));
        marks.push((from, to, '⟪', '⟫'));
    }
    let mut text = String::new();
    let closing = |index: usize| marks.iter().filter(move |mark| mark.1 == Some(index));
    for (index, piece) in prompt.pieces.iter().enumerate() {
        text.extend(closing(index).map(|mark| mark.3));
        text.extend(marks.iter().filter(|mark| mark.0 == index).map(|mark| mark.2));
        text.push_str(piece);
    }
    text.extend(closing(prompt.pieces.len()).map(|mark| mark.3));
    let mut lines = vec![head.join(", ")];
    lines.extend(text.lines().map(|line| format!("  | {line}")));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_marked_in_the_prompt() {
        let prompt = PromptRecord {
            name: "cued".into(),
            text: String::new(),
            tokens: vec![1, 2, 3],
            pieces: ["a", "\n", "b"].map(str::to_owned).to_vec(),
            from: 1,
            to: Some(2),
            after: None,
            probe: None,
        };
        assert_eq!(
            prompt_lines(&prompt),
            ["prompt cued: 3 tokens, window 1..2", "  | a⟦", "  | ⟧b"]
        );
        let open = PromptRecord { to: None, ..prompt };
        assert_eq!(
            prompt_lines(&open),
            ["prompt cued: 3 tokens, window 1..generated tokens", "  | a⟦", "  | b"]
        );
    }

    #[test]
    fn folders_are_checked_without_being_made() {
        let folder = tempfile::tempdir().unwrap();
        check_folder(&folder.path().join("a/b")).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        std::fs::write(folder.path().join("file"), "").unwrap();
        assert!(check_folder(&folder.path().join("file/run")).is_err());
        assert!(check_folder(&folder.path().join("file")).is_err());
    }
}
