use std::path::Path;

use super::*;
use crate::experiment::{
    fake::{self, FakeEngine},
    results::Condition,
};

const SMALL: &str = r#"
name = "small"
seed = 3
[prompts.ask]
turns = [{ role = "user", text = "Trial {trial}: anything?" }]
[[parts]]
name = "read"
kind = "readout"
prompts = ["ask"]
words = ["Bread", "Milk", "Snow"]
layers = [1, 3]
doses = [0.5, 1]
[[parts]]
name = "say"
kind = "sample"
prompts = ["ask"]
words = ["Bread", "Milk"]
layers = [1, 3]
doses = [0, 0.5, 1]
repeats = 2
max_tokens = 20
"#;

fn small() -> Protocol {
    Protocol::parse(SMALL, "small.toml", &[]).unwrap()
}

fn go_with(
    protocol: &Protocol,
    numerics: &Fingerprint,
    engine: &FakeEngine,
    dir: &Path,
    allow: bool,
) -> Result<Summary> {
    let prepared = fake::prepared(protocol, 4);
    let run = Run { protocol, prepared: &prepared, engine, numerics };
    let ways = Ways { allow_other_numerics: allow, ..Ways::default() };
    run.into_folder(dir, ways, &mut ())
}

fn go(protocol: &Protocol, engine: &FakeEngine, dir: &Path) -> Result<Summary> {
    go_with(protocol, &fake::numerics(), engine, dir, false)
}

fn text(dir: &Path, file: &str) -> String {
    std::fs::read_to_string(dir.join(file)).unwrap()
}

fn sorted_lines(dir: &Path) -> Vec<String> {
    let mut lines: Vec<String> = text(dir, "trials.jsonl").lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn clean_trials_run_once_and_partners_share_seeds() {
    let dir = tempfile::tempdir().unwrap();
    let engine = FakeEngine::default();
    let summary = go(&small(), &engine, dir.path()).unwrap();
    assert_eq!((summary.run, summary.resumed, summary.failed.len()), (25 + 36, 0, 0));
    assert_eq!(engine.replies.get(), 36, "2 words x 2 repeats x (2 layers x 2 doses x 2 + clean)");
    let run = folder::load(dir.path()).unwrap();
    assert_eq!(run.trials.len() as u64, run.manifest.trials);
    let clean = run.trials.iter().filter(|trial| trial.condition == Condition::Clean);
    assert_eq!(clean.count(), 1 + 4);
    for trial in run.trials.iter().filter(|trial| trial.part == "say") {
        let clean = trial.clean.as_ref().unwrap_or(&trial.id);
        let clean = run.trials.iter().find(|other| other.id == *clean).unwrap();
        let key = |t: &Trial| (t.seed, t.concept.clone(), t.repeat);
        assert_eq!(key(clean), key(trial));
        assert!(trial.reply.as_ref().unwrap().nll > 0.0 && trial.first.is_some());
    }
}

#[test]
fn an_interrupted_run_ends_with_the_same_content() {
    let whole = tempfile::tempdir().unwrap();
    go(&small(), &FakeEngine::default(), whole.path()).unwrap();
    for pull in [0, 5, 9, 10, 11, 30, 36, 60, 90] {
        let dir = tempfile::tempdir().unwrap();
        let plug = FakeEngine { fail_after: Some(pull), ..FakeEngine::default() };
        let error = go(&small(), &plug, dir.path()).unwrap_err().to_string();
        assert!(error.contains("plug"), "{error}");
        let summary = go(&small(), &FakeEngine::default(), dir.path()).unwrap();
        assert_eq!(summary.resumed + summary.run, 61);
        assert_eq!(sorted_lines(dir.path()), sorted_lines(whole.path()), "pulled after {pull}");
        assert_eq!(text(dir.path(), "manifest.json"), text(whole.path(), "manifest.json"));
    }
}

#[test]
fn killed_at_any_byte_of_a_line() {
    let dir = tempfile::tempdir().unwrap();
    go(&small(), &FakeEngine::default(), dir.path()).unwrap();
    let want = sorted_lines(dir.path());
    let whole = text(dir.path(), "trials.jsonl");
    let last = whole[..whole.len() - 1].rfind('\n').unwrap() + 1;
    for cut in last..whole.len() {
        std::fs::write(dir.path().join("trials.jsonl"), &whole[..cut]).unwrap();
        let summary = go(&small(), &FakeEngine::default(), dir.path()).unwrap();
        assert_eq!((summary.run, summary.resumed), (1, 60), "cut at {cut}");
        assert_eq!(sorted_lines(dir.path()), want);
    }
}

#[test]
fn a_finished_run_computes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    go(&small(), &FakeEngine::default(), dir.path()).unwrap();
    let engine = FakeEngine::default();
    let summary = go(&small(), &engine, dir.path()).unwrap();
    assert_eq!((summary.run, summary.resumed, engine.jobs.get()), (0, 61, 0));
}

#[test]
fn a_folder_holds_one_run() {
    let dir = tempfile::tempdir().unwrap();
    let plug = FakeEngine { fail_after: Some(40), ..FakeEngine::default() };
    go(&small(), &plug, dir.path()).unwrap_err();
    let before = sorted_lines(dir.path());

    let mut other = small();
    other.parts[1].repeats = 3;
    let error = go(&other, &FakeEngine::default(), dir.path()).unwrap_err().to_string();
    assert!(error.contains("another protocol") && error.contains("parts[1].repeats"), "{error}");

    let protocol = small();
    let mut prepared = fake::prepared(&protocol, 4);
    prepared.model.hash = "0ther".into();
    let engine = FakeEngine::default();
    let numerics = fake::numerics();
    let run =
        Run { protocol: &protocol, prepared: &prepared, engine: &engine, numerics: &numerics };
    let error = run.into_folder(dir.path(), Ways::default(), &mut ()).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");
    assert_eq!(sorted_lines(dir.path()), before, "nothing was touched");
}

#[test]
fn other_numerics_only_when_allowed_and_then_on_record() {
    let dir = tempfile::tempdir().unwrap();
    let plug = FakeEngine { fail_after: Some(40), ..FakeEngine::default() };
    go(&small(), &plug, dir.path()).unwrap_err();
    let other = Fingerprint { isa: "avx2".into(), ..fake::numerics() };
    let engine = FakeEngine::default();
    let error = go_with(&small(), &other, &engine, dir.path(), false).unwrap_err().to_string();
    assert!(error.contains("avx512") && error.contains("avx2"), "{error}");
    let summary = go_with(&small(), &other, &engine, dir.path(), true).unwrap();
    assert_eq!(summary.resumed + summary.run, 61);
    let numerics = folder::load(dir.path()).unwrap().manifest.numerics;
    assert_eq!((numerics.isa.as_str(), numerics.device.as_str()), ("avx512 + avx2", "cpu"));
}

#[test]
fn changed_vectors_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let plug = FakeEngine { fail_after: Some(40), ..FakeEngine::default() };
    go(&small(), &plug, dir.path()).unwrap_err();
    let path = dir.path().join("vectors.safetensors");
    let mut set = crate::engine::vectors::VectorSet::load(&path).unwrap();
    let mut changed = crate::engine::vectors::VectorSet::new(set.header.clone());
    for name in ["Bread", "Milk", "Snow"] {
        let row = |layer| set.get(name, Some(layer)).unwrap().iter().map(|v| v + 0.5).collect();
        changed.insert(name, vec![row(1), row(3)]).unwrap();
    }
    set = changed;
    set.save(&path).unwrap();
    let error = go(&small(), &FakeEngine::default(), dir.path()).unwrap_err().to_string();
    assert!(error.contains("vectors were changed"), "{error}");
}

#[test]
fn a_hook_that_matches_nothing_fails_the_check() {
    let dir = tempfile::tempdir().unwrap();
    let engine = FakeEngine { idle: true, ..FakeEngine::default() };
    let summary = go(&small(), &engine, dir.path()).unwrap();
    assert_eq!(summary.failed.len(), 24 + 32);
    assert!(summary.failed[0].1.contains("0 rows were touched, 9 were expected"));
    let again = go(&small(), &FakeEngine::default(), dir.path()).unwrap();
    assert_eq!(again.failed.len(), 24 + 32, "a resumed run still says so");
}

#[test]
fn cuts_are_kept_by_a_resumed_run() {
    let mut protocol = small();
    protocol.budget_seconds = Some(1e-9);
    let dir = tempfile::tempdir().unwrap();
    let first = go(&protocol, &FakeEngine::default(), dir.path()).unwrap();
    assert_eq!(first.manifest.cuts.len(), 2);
    assert!(first.manifest.cuts[1].contains("repeats 2 -> 1"), "{:?}", first.manifest.cuts);
    assert_eq!(first.manifest.trials, (3 * 2 + 1) + (2 * 2 + 2));
    let lines = sorted_lines(dir.path());
    let manifest = text(dir.path(), "manifest.json");
    // Half of it is lost, and the machine is as fast as one likes now.
    let keep: String = lines[..5].join("\n") + "\n";
    std::fs::write(dir.path().join("trials.jsonl"), keep).unwrap();
    let again = go(&protocol, &FakeEngine::default(), dir.path()).unwrap();
    assert_eq!((again.resumed, again.run), (5, 8));
    assert_eq!(sorted_lines(dir.path()), lines);
    assert_eq!(text(dir.path(), "manifest.json"), manifest);
}

#[test]
fn with_time_enough_nothing_is_cut_and_measured_trials_are_not_run_twice() {
    let mut protocol = small();
    protocol.budget_seconds = Some(1e9);
    let dir = tempfile::tempdir().unwrap();
    let summary = go(&protocol, &FakeEngine::default(), dir.path()).unwrap();
    assert!(summary.manifest.cuts.is_empty());
    let plain = tempfile::tempdir().unwrap();
    go(&small(), &FakeEngine::default(), plain.path()).unwrap();
    assert_eq!(sorted_lines(dir.path()), sorted_lines(plain.path()));
}

#[test]
fn the_lines_of_all_shards_are_the_lines_of_the_run() {
    let lines_of = |shard: Option<&str>| -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let protocol = small();
        let prepared = fake::prepared(&protocol, 4);
        let (engine, numerics) = (FakeEngine::default(), fake::numerics());
        let run =
            Run { protocol: &protocol, prepared: &prepared, engine: &engine, numerics: &numerics };
        let ways = Ways { shard: shard.map(|s| s.parse().unwrap()), ..Ways::default() };
        run.into_folder(dir.path(), ways, &mut ()).unwrap();
        let text = fs_err::read_to_string(dir.path().join("trials.jsonl")).unwrap();
        text.lines().map(str::to_owned).collect()
    };
    let mut whole = lines_of(None);
    let mut parts: Vec<String> =
        ["1/3", "2/3", "3/3"].into_iter().flat_map(|shard| lines_of(Some(shard))).collect();
    whole.sort();
    parts.sort();
    assert_eq!(whole, parts);
    for bad in ["0/3", "4/3", "1", "a/b", "1/0"] {
        assert!(bad.parse::<Shard>().is_err(), "{bad}");
    }
}

const SENTENCES: &str = r#"
name = "sentences"
[prompts.think]
outcome = "choice"
turns = [{ role = "user", text = "A word for: {sentence}" }]
[prompts.mouth]
outcome = "intent"
turns = [{ role = "user", text = "{sentence}" }, { role = "assistant", text = "{word}" }]
after = { from = 1 }
[prompts.write]
yes_no = false
turns = [{ role = "user", text = "Write {sentence}, think of {word}" }]
prefill = "{sentence}"
probe = { from = 1, to = 3 }
[[parts]]
name = "say"
kind = "sample"
prompts = ["think", "mouth"]
words = ["Bread", "Milk", "Snow"]
sentences = ["It rains.", "It snows."]
layers = [1]
doses = [1]
conditions = ["concept", "other"]
max_tokens = 5
[[parts]]
name = "probe"
kind = "probe"
prompts = ["write"]
words = ["Bread", "Milk"]
sentences = ["It rains."]
band = ["Tin", "Oak", "Fog"]
layers = [1, 3]
"#;

#[test]
fn sentences_other_words_and_probes() {
    let protocol = Protocol::parse(SENTENCES, "sentences.toml", &[]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let summary = go(&protocol, &FakeEngine::default(), dir.path()).unwrap();
    assert_eq!((summary.run, summary.failed.len()), (2 * (3 + 6) + 2, 0));
    let run = folder::load(dir.path()).unwrap();
    let of = |part: &str, prompt: &str, concept: &str, condition| {
        let is = |t: &&Trial| {
            (t.part.as_str(), t.prompt.as_str(), t.concept.as_str(), t.condition)
                == (part, prompt, concept, condition)
        };
        run.trials.iter().find(is).unwrap()
    };
    let snow = of("say", "think", "Snow", Condition::Other);
    assert_eq!(snow.sentence.as_deref(), Some("It rains."), "two sentences take turns");
    assert_eq!(snow.other.as_deref(), Some("Bread"), "one further, of three");
    assert_eq!(of("say", "think", "Snow", Condition::Concept).other, None);
    let clean = of("say", "mouth", "Milk", Condition::Clean);
    assert_eq!(clean.sentence.as_deref(), Some("It snows."));
    let other = of("say", "mouth", "Milk", Condition::Other);
    assert_eq!((other.clean.as_ref(), other.seed), (Some(&clean.id), clean.seed));

    let probed = of("probe", "write", "Milk", Condition::Clean).probe.clone().unwrap();
    assert_eq!((probed.layers, probed.pieces.len()), (vec![1, 3], 2));
    for rows in [&probed.cosine, &probed.projection, &probed.band] {
        assert_eq!((rows.len(), rows[0].len()), (2, 2));
    }
    assert!(probed.range.iter().all(|(low, high)| low < high));
    let again = go(&protocol, &FakeEngine::default(), dir.path()).unwrap();
    assert_eq!((again.run, again.resumed), (0, 20));
}

#[test]
fn parts_that_lack_what_their_conditions_need_are_refused() {
    let refused = |old: &str, new: &str, want: &str| {
        assert!(SENTENCES.contains(old), "{old}");
        let text = SENTENCES.replacen(old, new, 1);
        let error = Protocol::parse(&text, "s.toml", &[]).unwrap_err().to_string();
        assert!(error.contains(want), "{new}: {error}");
    };
    refused("\"other\"]", "\"after\"]", "prompts.think.after");
    refused("sentences = [\"It rains.\", \"It snows.\"]", "", "sentences");
    refused("probe = { from = 1, to = 3 }", "", "prompts.write.probe");
    refused("band = [", "doses = [1]\nband = [", "injects nothing");
    refused("doses = [1]", "doses = [1]\nband = [\"Tin\"]", "kind \"probe\"");
    refused("layers = [1, 3]", "layers = [1, 3]\ncontrasts = [[\"write\", \"x\"]]", "contrasts");
    refused("outcome = \"choice\"", "outcome = \"choice\"\nsuccess = [\"repeats\"]", "chooses");
    let one = SENTENCES.replacen("[\"Bread\", \"Milk\", \"Snow\"]", "[\"Bread\"]", 1);
    let protocol = Protocol::parse(&one, "s.toml", &[]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = go(&protocol, &FakeEngine::default(), dir.path()).unwrap_err().to_string();
    assert!(error.contains("two words"), "{error}");
}

#[test]
fn the_quick_version_of_every_protocol_is_small() {
    for name in Protocol::builtins() {
        let quick = Protocol::builtin(name).unwrap().quick();
        let prepared = fake::prepared(&quick, 30);
        let grid = grid::Grid::new(&quick, &prepared);
        assert!(!grid.is_empty() && grid.len() < 4000, "{name}: {}", grid.len());
        let places = prepared.parts.iter().zip(&quick.parts);
        let few = |(part, of): (&prepare::PreparedPart, &protocol::Part)| {
            part.places.len() <= 3 || of.kind == Kind::Probe
        };
        assert!(places.into_iter().all(few), "{name}");
        assert_eq!(quick.quick().parts, quick.parts, "{name}");
    }
}

#[test]
fn vectors_are_made_once_for_what_they_are_made_of() {
    let kept = tempfile::tempdir().unwrap();
    let run = |protocol: &Protocol, numerics: &Fingerprint| {
        let dir = tempfile::tempdir().unwrap();
        let prepared = fake::prepared(protocol, 4);
        let engine = FakeEngine::default();
        let run = Run { protocol, prepared: &prepared, engine: &engine, numerics };
        let ways = Ways { vectors: Some(kept.path().join("vectors")), ..Ways::default() };
        run.into_folder(dir.path(), ways, &mut ()).unwrap();
        (engine.jobs.get(), sorted_lines(dir.path()))
    };
    let first = run(&small(), &fake::numerics());
    let second = run(&small(), &fake::numerics());
    assert_eq!(first.1, second.1);
    assert_eq!(first.0 - second.0, 3 + 6, "three words and six of the baseline");
    let mut elsewhere = small();
    elsewhere.parts[0].places = protocol::Places::Layers(vec![0, 1, 3]);
    let other = Fingerprint { isa: "avx2".into(), ..fake::numerics() };
    run(&elsewhere, &fake::numerics());
    run(&small(), &other);
    let files = std::fs::read_dir(kept.path().join("vectors")).unwrap();
    let files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 3, "other layers, other numerics");
    files.iter().for_each(|file| std::fs::write(file, "broken").unwrap());
    assert_eq!(run(&small(), &fake::numerics()), first, "what can't be read is made anew");
}

#[test]
fn captures_are_stored_before_their_trials_lines() {
    let model = crate::model::Model::open(&crate::experiment::fake::golden_model()).unwrap();
    let mut protocol = small();
    let capture = r#"[{"site": "resid_post", "layers": [1], "positions": [0, 2]}, {"site": "logits", "positions": "last"}]"#;
    protocol.parts.iter_mut().for_each(|part| {
        part.capture = serde_json::from_str(capture).unwrap();
    });
    let mut prepared = fake::prepared(&protocol, 4);
    prepared.config = Some(model.config);
    let dir = tempfile::tempdir().unwrap();
    let plug = FakeEngine { fail_after: Some(40), ..FakeEngine::default() };
    let numerics = fake::numerics();
    for engine in [&plug, &FakeEngine::default()] {
        let run = Run { protocol: &protocol, prepared: &prepared, engine, numerics: &numerics };
        let _ = run.into_folder(dir.path(), Ways::default(), &mut ());
        for trial in &folder::load(dir.path()).unwrap().trials {
            let path = dir.path().join(format!("captures/{}.safetensors", trial.id));
            let bytes = std::fs::read(&path).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(tensors.tensor("resid_post.1").unwrap().shape(), [2, fake::DIM]);
            assert_eq!(tensors.tensor("logits").unwrap().shape(), [1, 8]);
        }
    }
    assert_eq!(folder::load(dir.path()).unwrap().trials.len(), 61);
    let read = SMALL.replacen(
        "doses = [0.5, 1]",
        "doses = [0.5, 1]\ncapture = [{ site = \"resid_post\", layer = [1] }]",
        1,
    );
    assert!(Protocol::parse(&read, "s.toml", &[]).unwrap_err().to_string().contains("layer"));
}
