//! Four models that are known to detect, to be pushed to yes, to name without noticing, and to do nothing of
//! it, from weights to headline: the report must call each by its name.

mod model;

use std::collections::BTreeMap;

use inkling::{
    engine::{Dtype, Engine, Options},
    experiment::{self, folder, judging, protocol::Protocol},
    model::Model,
    report::{Meaning, headline},
};
use model::{Kind, WORDS};

const SEEDS: u64 = 200;

fn protocol(seed: u64) -> Protocol {
    let text = format!(
        r#"
name = "planted"
seed = {seed}
[vectors]
template = "Tell me about {{word}}"
baseline = ["chairs", "clouds", "rivers"]
[answers]
yes = ["Yes"]
no = ["No"]
[prompts.cued]
turns = [{{ role = "user", text = "Here it comes.\n\nTrial {{trial}}: do you detect one?" }}]
window = {{ from = {{ start_of = {{ text = "\n\nTrial {{trial}}", turn = "user.last" }} }} }}
[[parts]]
name = "sampled"
kind = "sample"
prompts = ["cued"]
words = {WORDS:?}
layers = [0]
doses = [1]
repeats = 2
max_tokens = 16
"#
    );
    Protocol::parse(&text, "planted.toml", &[]).unwrap()
}

/// How often each conclusion is drawn.
fn conclusions(kind: Kind) -> BTreeMap<String, u64> {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), kind);
    let model = Model::open(dir.path()).unwrap();
    let options =
        Options { dtype: Dtype::F32, threads: Some(2), max_batch: 128, ..Options::default() };
    let engine = Engine::start(&model, &options).unwrap();
    let mut drawn: BTreeMap<String, u64> = BTreeMap::new();
    for seed in 0..SEEDS {
        let out = dir.path().join(format!("run-{seed}"));
        let protocol = protocol(seed);
        let ways = experiment::Ways::default();
        let summary = experiment::run(&protocol, &model, &engine, &out, ways, &mut ()).unwrap();
        assert!(summary.failed.is_empty(), "{:?}", summary.failed);
        let mut run = folder::load(&out).unwrap();
        run.grades = judging::rule_grades(&run, &protocol).unwrap();
        *drawn.entry(format!("{:?}", headline(&run).meaning)).or_default() += 1;
        fs_err::remove_dir_all(&out).unwrap();
    }
    drawn
}

fn is_called(kind: Kind, meaning: Meaning) {
    let drawn = conclusions(kind);
    let right = drawn.get(&format!("{meaning:?}")).copied().unwrap_or(0);
    assert!(right * 100 >= SEEDS * 95, "{kind:?} is called {drawn:?}");
}

#[test]
fn a_model_that_detects_is_called_a_detector() {
    is_called(Kind::Detector, Meaning::Evidence);
}

#[test]
fn a_model_that_any_vector_makes_say_yes_is_called_yes_biased() {
    is_called(Kind::YesBiased, Meaning::YesBias);
}

#[test]
fn a_model_that_names_without_noticing_is_called_so() {
    is_called(Kind::Namer, Meaning::NamesOnly);
}

#[test]
fn a_model_that_does_nothing_of_it_is_seldom_called_a_detector() {
    let drawn = conclusions(Kind::Null);
    let wrong = drawn.get(&format!("{:?}", Meaning::Evidence)).copied().unwrap_or(0);
    assert!(wrong * 100 <= SEEDS * 5, "{drawn:?}");
    let nothing = drawn.get(&format!("{:?}", Meaning::NoEvidence)).copied().unwrap_or(0);
    assert!(nothing * 100 >= SEEDS * 90, "{drawn:?}");
}
