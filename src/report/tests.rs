//! A synthetic run whose numbers are known, and what the report makes of it.

use std::collections::BTreeMap;

use serde_json::json;

use super::*;
use crate::{
    engine::{Finish, Receipt},
    experiment::{
        results::{
            Condition, Criterion, Fingerprint, FirstAnswer, Grade, Manifest, ModelRecord,
            PromptRecord, Readout, Reply, Trial, Verdict, WordRecord,
        },
        stats::{Count, Method},
    },
    request::StrengthMode,
};

const DEPTHS: [(f64, usize); 2] = [(0.4, 12), (0.8, 24)];
const DOSES: [f64; 2] = [0.25, 0.5];
const WORDS: usize = 50;
const REPEATS: u32 = 3;
/// What [`sampled`] gives verdicts on.
const DETECTION: [Criterion; 4] =
    [Criterion::Coherent, Criterion::Claims, Criterion::Mentions, Criterion::ClaimsThenNames];

fn word(at: usize) -> String {
    format!("word{at:02}")
}

fn prompt(name: &str) -> PromptRecord {
    let pieces = ["<|im_start|>", "user", "\n", "<b>", "\n\n", "Trial", " 1", "<|im_end|>"];
    PromptRecord {
        name: name.into(),
        text: pieces.concat(),
        tokens: (100..108).collect(),
        pieces: pieces.map(str::to_owned).to_vec(),
        from: 4,
        to: None,
        after: None,
        probe: None,
    }
}

fn manifest(trials: u64) -> Manifest {
    let record = |at| WordRecord {
        word: word(at),
        tokens: 1 + at % 2,
        first_piece: " word".into(),
        norms: vec![(12, 50.0), (24, 120.0)],
    };
    Manifest {
        schema: 1,
        run: "0123456789abcdef".into(),
        protocol: json!({"name": "injected-thoughts", "note": "<em>"}),
        model: ModelRecord {
            name: "tiny & <small>".into(),
            commit: None,
            hash: "feedbeef".into(),
            architecture: "llama".into(),
            layers: 30,
            dim: 576,
            parameters: 134_515_008,
        },
        numerics: Fingerprint {
            device: "cpu".into(),
            dtype: "bf16".into(),
            isa: "avx512".into(),
            kernels: "1".into(),
        },
        version: "0.1.0".into(),
        prompts: vec![prompt("cued")],
        words: (0..WORDS).map(record).collect(),
        cuts: vec!["two of four depths".into()],
        trials,
    }
}

/// A trial without results; `cell` is (depth, layer, dose).
fn trial(
    part: &str,
    condition: Condition,
    concept: &str,
    cell: Option<(f64, usize, f64)>,
    repeat: u32,
) -> Trial {
    let receipt = cell.map(|(_, layer, dose)| Receipt {
        site: format!("resid_post.{layer}"),
        op: crate::request::Op::Add,
        every: 1,
        strength: dose as f32,
        mode: StrengthMode::Reference,
        from: 4,
        to: None,
        vector_norm: 1.0,
        reference_norm: Some(100.0),
        norm_before: Some(100.0),
        planned: Some(100.0 * dose as f32),
        measured: Some(100.0 * dose as f32),
        rows_expected: 10,
        rows_touched: 10,
    });
    Trial {
        id: format!("{part}-{condition:?}-{concept}-{cell:?}-{repeat}"),
        part: part.into(),
        prompt: "cued".into(),
        concept: concept.into(),
        sentence: None,
        condition,
        other: None,
        layer: cell.map(|c| c.1),
        depth: cell.map(|c| c.0),
        dose: cell.map(|c| c.2),
        mode: cell.map(|_| StrengthMode::Reference),
        repeat,
        seed: u64::from(repeat),
        clean: None,
        receipts: receipt.into_iter().collect(),
        first: None,
        next: None,
        read: None,
        reply: None,
        probe: None,
    }
}

fn cells() -> impl Iterator<Item = (f64, usize, f64)> {
    DEPTHS.into_iter().flat_map(|(depth, layer)| DOSES.map(|dose| (depth, layer, dose)))
}

/// At layer 24 all words but word01 are read; elsewhere none. Random vectors read word00 only.
fn readout() -> Vec<Trial> {
    let mut trials = Vec::new();
    let answer = |margin| FirstAnswer { margin, p_yes: 0.4, mass: 0.3, entropy: 2.0 };
    let mut clean = trial("readout", Condition::Clean, "", None, 0);
    clean.first = Some(answer(0.0));
    trials.push(clean);
    for cell in cells() {
        for at in 0..WORDS {
            for condition in [Condition::Concept, Condition::Random] {
                let mut one = trial("readout", condition, &word(at), Some(cell), 0);
                let hit = match condition {
                    Condition::Concept => cell.1 == 24 && at != 1,
                    _ => at == 0,
                };
                one.read = Some(Readout {
                    word: if hit { word(at) } else { "word49".into() },
                    rank: if hit { 1 } else { 7 },
                    words: WORDS,
                });
                // At layer 12 concepts exceed random vectors always, at layer 24 they are equal.
                let up = condition == Condition::Concept && cell.1 == 12;
                one.first = Some(answer(if up { 2.0 } else { 1.0 }));
                trials.push(one);
            }
        }
    }
    trials
}

fn verdict(yes: bool) -> Verdict {
    Verdict { yes, evidence: "the \"evidence\" <i>".into() }
}

fn reply(text: &str) -> Reply {
    Reply {
        text: text.into(),
        tokens: vec![1, 2],
        ends: Vec::new(),
        finish: Finish::Stop,
        nll: 2.5,
    }
}

/// A reply with its grade: (coherent, claims, mentions, claims then names).
fn sampled(mut one: Trial, said: [bool; 4], mentioned: &[&str]) -> (Trial, Grade) {
    one.reply = Some(reply("I feel <script>alert(1)</script> & https://evil.example/x.png"));
    let grade = Grade {
        trial: one.id.clone(),
        judge: "rules-1".into(),
        verdicts: DETECTION.into_iter().zip(said.map(verdict)).collect(),
        missing: BTreeMap::new(),
        mentioned: mentioned.iter().map(|&word| word.into()).collect(),
    };
    (one, grade)
}

/// `words` words; concept trials claim (and name) where `hit` says so, controls in the first
/// repeat of every fourth word.
fn replies(words: usize, hit: impl Fn(usize, u32) -> bool) -> (Vec<Trial>, Vec<Grade>) {
    let mut all = Vec::new();
    for at in 0..words {
        for repeat in 0..REPEATS {
            let alarm = at % 4 == 0 && repeat == 0;
            let clean = trial("sampled", Condition::Clean, &word(at), None, repeat);
            let mentioned: &[&str] = if at == 0 { &["word01"] } else { &[] };
            all.push(sampled(clean, [true, alarm, false, false], mentioned));
            for cell in cells() {
                let hit = hit(at, repeat);
                let one = trial("sampled", Condition::Concept, &word(at), Some(cell), repeat);
                all.push(sampled(one, [true, hit, true, hit], &[&word(at)]));
                let one = trial("sampled", Condition::Random, &word(at), Some(cell), repeat);
                all.push(sampled(one, [cell.2 < 0.5, alarm, false, false], &[]));
            }
        }
    }
    all.into_iter().unzip()
}

fn ramp() -> (Vec<Trial>, Vec<Grade>) {
    let mut all = Vec::new();
    for prompt in ["cued", "open"] {
        for dose in [None, Some(0.25), Some(1.0)] {
            let condition = if dose.is_some() { Condition::Concept } else { Condition::Clean };
            let mut one = trial("ramp", condition, "word03", dose.map(|dose| (0.8, 24, dose)), 0);
            one.prompt = prompt.into();
            one.id = format!("{} {prompt}", one.id);
            all.push(sampled(one, [true, false, true, false], &[]));
        }
    }
    all.into_iter().unzip()
}

fn run_of(trials: Vec<Trial>, grades: Vec<Grade>) -> Run {
    Run { manifest: manifest(trials.len() as u64), trials, grades }
}

/// Everything; 8 words in the sampled part; hits where the controls claim too.
fn demo() -> Run {
    let (mut trials, mut grades) = replies(8, |at, repeat| at % 4 == 0 && repeat == 0);
    let (ramp_trials, ramp_grades) = ramp();
    trials.extend(readout().into_iter().chain(ramp_trials));
    grades.extend(ramp_grades);
    run_of(trials, grades)
}

#[test]
fn the_headline_counts_the_words_that_did_not_choose_the_cell() {
    let read = headline(&demo()).read.unwrap();
    assert_eq!((read.cell.layer, read.cell.dose), (24, 0.25), "of equals the smallest dose");
    assert_eq!(read.held_out, Count { k: 24, n: 25 }, "word01 is at an odd place");
    assert_eq!(read.all, Count { k: 49, n: 50 });
    assert_eq!(read.random, Count { k: 1, n: 50 });
    let text = headline(&demo()).to_string();
    assert!(text.contains("24 of 25 held-out words (49 of all 50;"), "{text}");
    assert!(text.contains("1 of 50 (1.0 expected by chance)"), "{text}");
    assert!(text.contains("AUROC of 0.50 [0.50, 0.50]"), "{text}");
}

#[test]
fn a_model_that_claims_no_more_than_its_controls_shows_no_evidence() {
    let headline = headline(&demo());
    assert_eq!(headline.meaning, Meaning::NamesOnly, "its word stands in every reply");
    let replies = headline.replies.as_ref().unwrap();
    // Two of eight words, one of three repeats: 2/24 in every cell.
    assert_eq!(replies.contrast.hits.count, Count { k: 8, n: 96 });
    assert_eq!(replies.contrast.random.unwrap().count, Count { k: 8, n: 96 });
    assert_eq!(replies.contrast.clean.unwrap().count, Count { k: 2, n: 24 });
    assert_eq!(replies.contrast.net_random.unwrap().value, 0.0);
    assert_eq!(replies.contrast.net_random.unwrap().method, Method::Newcombe, "8 words");
    assert_eq!(replies.mentions.count, Count { k: 96, n: 96 });
    // word00's three clean replies mention word01: 3 of 24 replies · 8 words.
    assert_eq!(replies.mentions_chance, Some(3.0 / 192.0));
    assert!(headline.to_string().contains("`inkling run injected-thoughts --model PATH`"));
    assert!(replies.smallest_effect.unwrap() > 0.1);
}

#[test]
fn hits_beyond_every_control_are_evidence() {
    let (trials, grades) = replies(24, |at, repeat| repeat < 2 || at % 3 == 0);
    let run = run_of(trials, grades);
    let found = headline(&run);
    assert_eq!(found.meaning, Meaning::Evidence);
    let contrast = found.replies.unwrap().contrast;
    assert_eq!(contrast.net_random.unwrap().method, Method::ClusterBootstrap);
    // 24·2 + 8 of 72 against 6 of 72, in four cells.
    assert!((contrast.net_random.unwrap().value - 50.0 / 72.0).abs() < 1e-12);
    assert!(contrast.p.unwrap() < 1e-9);
    assert!(contrast.detection.unwrap().d_prime > 1.5);
    assert!(found.read.is_none());
}

#[test]
fn rates_are_by_condition_and_scope() {
    let tables = tables(&demo());
    let [table] = &tables.replies[..] else { panic!("the ramp is no table") };
    let arm = |condition, scope| {
        table.arms.iter().find(|a| a.condition == condition && a.scope == scope).unwrap()
    };
    assert_eq!(arm(Condition::Clean, Scope::All).claims.count, Count { k: 2, n: 24 });
    let half = arm(Condition::Random, Scope::Dose(0.5));
    assert_eq!(half.coherent.count, Count { k: 0, n: 48 });
    assert_eq!(half.claims_if_coherent, None);
    let cell = Cell { layer: 12, depth: 0.4, dose: 0.25 };
    assert_eq!(arm(Condition::Concept, Scope::Cell(cell)).claims.count, Count { k: 2, n: 24 });
    let margins: Vec<_> = tables.reads[0].cells.iter().map(|c| c.margin.unwrap().auroc).collect();
    assert_eq!(margins, [1.0, 1.0, 0.5, 0.5]);
    assert_eq!(tables.receipts.iter().map(|row| row.flagged.len()).sum::<usize>(), 0);
    assert_eq!(tables.receipts[0].ratio, Some(0.25));
}

/// Concepts shift the answer of `cued` by 2 and that of the other questions by ½, random vectors both by
/// ½. The clean model says no to everything.
fn bias() -> Run {
    let mut trials = Vec::new();
    for (prompt, clean) in [("cued", -1.0), ("sun", -2.0), ("fish", -1.0)] {
        let mut push = |mut one: Trial, margin| {
            one.prompt = prompt.into();
            one.id = format!("{} {prompt}", one.id);
            one.first = Some(FirstAnswer { margin, p_yes: 0.4, mass: 0.3, entropy: 2.0 });
            one.clean = one
                .layer
                .map(|_| format!("{} {prompt}", trial("bias", Condition::Clean, "", None, 0).id));
            trials.push(one);
        };
        push(trial("bias", Condition::Clean, "", None, 0), clean);
        for cell in cells() {
            for at in 0..24 {
                let shift = if prompt == "cued" { 2.0 } else { 0.5 };
                push(trial("bias", Condition::Concept, &word(at), Some(cell), 0), clean + shift);
                push(trial("bias", Condition::Random, &word(at), Some(cell), 0), clean + 0.5);
            }
        }
    }
    let mut run = run_of(trials, Vec::new());
    run.manifest.protocol = json!({
        "name": "yes-bias",
        "prompts": {"cued": {"answer": null}, "sun": {"answer": "no"}, "fish": {"answer": "yes"}},
    });
    run
}

#[test]
fn a_push_that_unrelated_questions_share_is_taken_off() {
    let run = bias();
    let tables = tables(&run);
    let prompts: Vec<_> = tables.reads.iter().map(|table| table.prompt.as_str()).collect();
    assert_eq!(prompts, ["cued"], "questions with an answer are no readouts of their own");
    let [table] = &tables.biases[..] else { panic!("one part") };
    assert_eq!(
        (&table.asked[..], &table.unrelated[..]),
        (&["cued".into()][..], &["sun".into()][..])
    );
    assert_eq!(table.right, Count { k: 1, n: 2 }, "fish is answered no");
    assert_eq!(table.clean, (Count { k: 0, n: 1 }, Count { k: 0, n: 1 }));
    let row = |condition, scope| {
        *table.rows.iter().find(|r| r.condition == condition && r.scope == scope).unwrap()
    };
    let concept = row(Condition::Concept, Scope::All);
    assert_eq!(concept.asked.yes.count, Count { k: 96, n: 96 });
    assert_eq!(concept.unrelated.yes.count, Count { k: 0, n: 96 });
    assert_eq!((concept.asked.shift, concept.unrelated.shift), (2.0, 0.5));
    assert_eq!((concept.net_shift, concept.interval.unwrap().low), (1.5, 1.5));
    let random = row(Condition::Random, Scope::Dose(0.5));
    assert_eq!(random.net_shift, 0.0);
    assert!(html(&run).contains("<h2>Is “yes” just pushed up?</h2>"));
    let printed = text(&run);
    assert!(printed.contains("clean: 1/2 right, yes to 0/1 asked and 0/1 unrelated"), "{printed}");
    assert!(printed.contains("(net 1.50 [1.50, 1.50])"), "{printed}");
    // Unfinished: without clean partners there is no shift; with few words no interval.
    let mut some = run.clone();
    some.trials.retain(|t| t.condition != Condition::Clean);
    assert!(self::tables(&some).biases[0].rows.is_empty() && html(&some).ends_with("</html>\n"));
    some.trials = run
        .trials
        .iter()
        .filter(|t| t.concept.is_empty() || t.concept == word(0))
        .cloned()
        .collect();
    assert_eq!(self::tables(&some).biases[0].rows[0].interval, None);
    assert!(html(&some).contains("no interval") && !text(&some).contains("Over all cells"));
    let demo = demo();
    assert!(self::tables(&demo).biases.is_empty() && !html(&demo).contains("just pushed up"));
}

#[test]
fn receipts_that_do_not_balance_are_flagged() {
    let mut run = demo();
    let injected = |t: &&mut Trial| t.part == "readout" && !t.receipts.is_empty();
    let mut touched: Vec<_> = run.trials.iter_mut().filter(injected).take(4).collect();
    touched[0].receipts[0].measured = Some(25.5);
    touched[1].receipts[0].rows_touched = 9;
    touched[2].receipts[0].measured = None;
    touched[3].receipts.clear();
    let rows = tables(&run).receipts;
    assert_eq!(rows.iter().map(|row| row.flagged.len()).sum::<usize>(), 4);
    assert!(html(&run).contains("4 trials were not changed as planned"));
    assert!(text(&run).contains("4 trials were not changed as planned"));
}

#[test]
fn hostile_replies_and_names_stay_text() {
    let page = html(&demo());
    assert_eq!(page.matches("<script").count(), 2, "the data and the program, and no reply's");
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
    assert!(page.contains("tiny &amp; &lt;small&gt;") && !page.contains("tiny & <"));
    assert!(page.contains("the &quot;evidence&quot; &lt;i&gt;"));
    assert!(!page.contains("&lt;b&gt;</code>") && page.contains("&lt;"), "pieces are escaped");
    // Nothing is loaded: the only address is the one inside a reply's text.
    for attribute in ["src=", "href=\"http", "url(", "@import", "<link", "<img", "xmlns"] {
        assert!(!page.contains(attribute), "{attribute}");
    }
    // Names of XML namespaces in the program are no addresses that anything is loaded from.
    let namespaces = page.matches("'http://www.w3.org/").count();
    let replies = page.matches("://evil.example/x.png").count();
    assert_eq!((page.matches("://").count(), namespaces), (replies + 2, 2));
}

#[test]
fn the_order_of_the_lines_does_not_matter() {
    let run = demo();
    let mut turned = run.clone();
    turned.trials.reverse();
    turned.grades.rotate_left(17);
    assert_eq!(html(&run), html(&turned));
    assert_eq!(text(&run), text(&turned));
    assert_eq!(headline(&run), headline(&turned));
}

#[test]
fn nothing_at_all_has_a_report() {
    let mut run = run_of(Vec::new(), Vec::new());
    run.manifest.trials = 40;
    assert_eq!(headline(&run).meaning, Meaning::Open);
    assert!(headline(&run).to_string().contains("0 of 40 trials"));
    run.manifest.words.clear();
    run.manifest.prompts.clear();
    let page = html(&run);
    assert!(page.contains("0 of 40 (unfinished)"));
    assert!(!page.contains("id=\"readout\"") && !page.contains("id=\"ramp\""));
    assert!(text(&run).contains("0 of 40 trials"));
}

#[test]
fn every_part_of_a_run_has_a_report() {
    let run = demo();
    // Any one part, any one condition, few trials, no grades, no cell, nonsense numbers.
    for part in ["readout", "sampled", "ramp"] {
        let mut some = run.clone();
        some.trials.retain(|t| t.part == part);
        assert!(html(&some).contains("(unfinished)"));
        assert!(!text(&some).is_empty());
        for condition in [Condition::Clean, Condition::Concept, Condition::Random] {
            let mut one = some.clone();
            one.trials.retain(|t| t.condition == condition);
            one.grades.truncate(one.grades.len() / 2);
            assert!(html(&one).ends_with("</html>\n"));
            one.trials.truncate(1);
            one.trials.iter_mut().for_each(|t| t.layer = None);
            assert!(html(&one).ends_with("</html>\n") && !text(&one).is_empty());
        }
    }
    let mut ungraded = run;
    ungraded.grades.clear();
    ungraded.trials.iter_mut().for_each(|t| {
        t.dose = t.dose.map(|_| f64::NAN);
        t.first.iter_mut().for_each(|first| first.margin = f64::NAN);
    });
    assert!(headline(&ungraded).to_string().contains("no verdict yet"));
    assert!(html(&ungraded).contains("no verdict yet"));
}

#[test]
fn ungraded_replies_are_left_out_and_counted() {
    let mut run = demo();
    let lost = run.grades.iter().position(|g| g.trial.starts_with("sampled-Concept")).unwrap();
    run.grades.remove(lost);
    let headline = headline(&run);
    assert_eq!(headline.progress.ungraded, 1);
    assert_eq!(headline.replies.unwrap().contrast.hits.count.n, 95);
}

#[test]
fn the_headline_is_data_too() {
    let value = serde_json::to_value(headline(&demo())).unwrap();
    assert_eq!(value["meaning"], "names_only");
    assert_eq!(value["read"]["held_out"], json!({"k": 24, "n": 25}));
    assert!(serde_json::to_value(tables(&demo())).unwrap()["replies"].is_array());
}

#[test]
fn a_protocol_chooses_what_is_shown() {
    let mut run = demo();
    run.manifest.protocol["tables"] = json!(["replies"]);
    let (page, printed) = (html(&run), text(&run));
    for (id, is_shown) in
        [("replies", true), ("run", true), ("receipts", false), ("explore", false)]
    {
        assert_eq!(page.contains(&format!("<section id=\"{id}\">")), is_shown, "{id}");
    }
    assert!(printed.contains("Replies (dose") && !printed.contains("Concept read first"));
}

#[test]
fn what_the_verdicts_quote_is_marked() {
    let mut run = demo();
    let grade = run.grades.iter_mut().find(|grade| grade.trial.starts_with("ramp")).unwrap();
    let quote = "\"I feel <script>\" at byte 0 (first person)";
    grade.verdicts.get_mut(&Criterion::Claims).unwrap().evidence = quote.into();
    let page = html(&run);
    assert!(
        page.contains("<blockquote><mark>I feel &lt;script&gt;</mark>alert(1)"),
        "escaped, and marked"
    );
    let (at, quoted) = run.grades.iter().find_map(|g| g.quotation(Criterion::Claims)).unwrap();
    assert_eq!((at, quoted.as_str()), (0, "I feel <script>"));
    // A place that is none is left alone.
    for evidence in
        ["\"I feel\" at byte 90 (x)", "\"é\" at byte x", "no statement", "\"a at byte 3 (x)"]
    {
        let grade = run.grades.iter_mut().find(|grade| grade.trial.starts_with("ramp")).unwrap();
        grade.verdicts.get_mut(&Criterion::Claims).unwrap().evidence = evidence.into();
        assert!(!html(&run).contains("<blockquote><mark>"), "{evidence}");
    }
}

#[test]
fn a_run_against_itself_shows_no_difference() {
    let run = demo();
    let rows = versus(&run, &run);
    assert!(rows.len() > 50 && rows.iter().all(|row| row.value == 0.0 && row.first == row.second));
    let mut other = run.clone();
    other.grades.iter_mut().filter(|g| g.trial.starts_with("sampled-Concept")).for_each(|grade| {
        grade.verdicts.get_mut(&Criterion::Claims).unwrap().yes = true;
    });
    let claims = versus(&run, &other).into_iter().find(|row| {
        (row.what, row.condition, row.scope) == ("claims", Condition::Concept, Scope::All)
    });
    let claims = claims.unwrap();
    assert_eq!((claims.first.count.k, claims.second.count.k), (8, 96));
    assert!((claims.value - 88.0 / 96.0).abs() < 1e-12 && claims.interval.low > 0.5);
    assert!(versus_text(&run, &other).contains("replies sampled/cued"));
    let files = csv_files(&run);
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert!(
        names.contains(&"readout-readout-cued.csv") && names.contains(&"receipts.csv"),
        "{names:?}"
    );
    assert!(files.iter().all(|(_, text)| text.lines().count() > 1));
}

/// Two cells of thought against text: at layer 12 both are right for every word under its vector, elsewhere
/// nothing is. Words put in the mouth: owned with the word's own vector at layer 12 only.
#[test]
fn the_other_experiments_choose_on_one_half_and_report_the_other() {
    let mut trials = Vec::new();
    let mut grades = Vec::new();
    let outcomes = [
        ("think", Criterion::Chooses),
        ("repeat", Criterion::Repeats),
        ("asked", Criterion::Intends),
    ];
    for (prompt, criterion) in outcomes {
        let part = if prompt == "asked" { "mouth" } else { "pairs" };
        let mut add = |condition, at: usize, cell: Option<(f64, usize, f64)>, yes| {
            let mut one = trial(part, condition, &word(at), cell, 0);
            one.prompt = prompt.into();
            one.id = format!("{} {prompt}", one.id);
            one.reply = Some(reply("a reply"));
            let mut verdicts = BTreeMap::from([(criterion, verdict(yes))]);
            if criterion == Criterion::Intends {
                verdicts.insert(Criterion::Disowns, verdict(!yes));
            }
            grades.push(Grade {
                trial: one.id.clone(),
                judge: "rules-1".into(),
                verdicts,
                missing: BTreeMap::new(),
                mentioned: Vec::new(),
            });
            trials.push(one);
        };
        for at in 0..24 {
            add(Condition::Clean, at, None, prompt == "repeat");
            for cell in cells() {
                let is_best = cell.1 == 12;
                add(Condition::Concept, at, Some(cell), is_best);
                let control = if prompt == "asked" { Condition::Other } else { Condition::Random };
                add(control, at, Some(cell), false);
            }
        }
    }
    let mut run = run_of(trials, grades);
    run.manifest.protocol = json!({
        "name": "others",
        "prompts": {
            "think": {"outcome": "choice", "success": ["chooses"]},
            "repeat": {"outcome": "repeat", "success": ["repeats"]},
            "asked": {"outcome": "intent", "success": ["intends"]},
        },
    });
    let tables = tables(&run);
    let [texts] = &tables.texts[..] else { panic!("one part asks for both") };
    let chosen = texts.chosen.unwrap();
    assert_eq!((chosen.cell.layer, chosen.cell.dose), (12, 0.25), "of equals the smallest dose");
    assert_eq!((chosen.held_out, chosen.all), (Count { k: 12, n: 12 }, Count { k: 24, n: 24 }));
    let row = |condition| {
        texts.rows.iter().find(|r| (r.condition, r.scope) == (condition, Scope::All)).unwrap()
    };
    assert_eq!(row(Condition::Concept).both.count, Count { k: 48, n: 96 });
    assert_eq!(row(Condition::Clean).both.count, Count { k: 0, n: 24 });
    assert!((row(Condition::Concept).net.unwrap().value - 0.5).abs() < 1e-12);
    assert!(tables.outcomes.is_empty(), "both are asked for");
    let mut alone = run.clone();
    alone.trials.retain(|trial| trial.prompt == "think");
    let [table] = &self::tables(&alone).outcomes[..] else { panic!("one of them alone") };
    let row =
        table.rows.iter().find(|r| (r.condition, r.scope) == (Condition::Concept, Scope::All));
    let row = row.unwrap();
    assert_eq!(row.success.count, Count { k: 48, n: 96 });
    assert!((row.net.unwrap().value - 0.5).abs() < 1e-12);
    let printed = text(&alone).replace('\n', " ");
    assert!(printed.contains("Replies to think succeed in 50%"), "{printed}");
    assert!(html(&alone).contains("<h2>How often it succeeds</h2>"));
    let [intents] = &tables.intents[..] else { panic!("one prompt asks") };
    let score = intents.score.unwrap();
    assert_eq!((score.cell.layer, score.held_out.value, score.all.value), (12, 1.0, 1.0));
    assert_eq!((score.held_out.words, score.held_out.interval), (12, None), "too few words");
    assert_eq!(score.all.interval.unwrap().low, 1.0);
    let own =
        intents.rows.iter().find(|r| (r.condition, r.scope) == (Condition::Concept, Scope::All));
    assert_eq!(own.unwrap().apologises.count, Count { k: 48, n: 96 });
    assert_eq!(own.unwrap().guard, Some(Count { k: 48, n: 96 }), "of the other part's cells");
    let printed = text(&run).replace('\n', " ");
    assert!(
        printed.contains("12 of 12 held-out pairs") && printed.contains("score is +100.0 points")
    );
    assert!(!printed.contains("can't be said"), "other things were asked: {printed}");
    let page = html(&run);
    assert!(
        page.contains("<h2>Thought against text</h2>")
            && page.contains("apologises: concept, other")
    );
}

#[test]
fn cosines_are_averaged_by_word_and_compared_in_pairs() {
    let mut trials = Vec::new();
    for at in 0..24 {
        for (prompt, cosine) in [("think", 0.3), ("dont", 0.1)] {
            let mut one = trial("control", Condition::Clean, &word(at), None, 0);
            one.prompt = prompt.into();
            one.id = format!("{} {prompt}", one.id);
            let of = |layer: f32| vec![cosine * layer, cosine * layer + 0.02 * (at % 2) as f32];
            one.probe = Some(crate::experiment::results::Probed {
                pieces: vec!["a".into(), "b".into()],
                layers: vec![3, 9],
                cosine: vec![of(0.0), of(1.0)],
                projection: vec![of(0.0), of(1.0)],
                band: vec![vec![0.0, 0.0]; 2],
                range: vec![(-0.2, 0.2); 2],
            });
            trials.push(one);
        }
    }
    let mut run = run_of(trials, Vec::new());
    run.manifest.protocol = json!({
        "name": "control",
        "parts": [{"name": "control", "contrasts": [["think", "dont"]]}],
    });
    let tables = tables(&run);
    let [table] = &tables.probes[..] else { panic!("one part") };
    let think = table.curves.iter().find(|curve| curve.prompt == "think").unwrap();
    // 0.3, and for every other word 0.01 more as the mean of two tokens.
    assert!((think.points[1].mean - 0.305).abs() < 1e-6 && think.points[1].interval.is_some());
    assert_eq!((think.above[0], think.above[1], think.trials), (0, 24, 24));
    assert_eq!(think.map[0].len(), 8);
    let [contrast] = &table.contrasts[..] else { panic!("one contrast") };
    assert!((contrast.points[1].mean - 0.2).abs() < 1e-6);
    assert!((contrast.overall.mean - 0.1).abs() < 1e-6, "the mean of both layers");
    let page = html(&run);
    assert!(page.contains("think less dont") && page.contains("class=\"band\""));
    assert!(text(&run).contains("think − dont"));
}

/// A judge that fails on every other reply, where all that it judged are claims.
#[test]
fn pitfall_10_judge_outages_are_not_counted_as_zeros() {
    let (trials, mut grades) = replies(24, |_, _| true);
    for grade in grades.iter_mut().step_by(2) {
        let lost = std::mem::take(&mut grade.verdicts);
        grade.missing = lost.into_keys().map(|criterion| (criterion, "timeout".into())).collect();
    }
    let run = run_of(trials, grades);
    let tables = tables(&run);
    let arm = |condition| {
        let arms = &tables.replies[0].arms;
        arms.iter().find(|arm| (arm.condition, arm.scope) == (condition, Scope::All)).unwrap()
    };
    let of = |condition| run.trials.iter().filter(move |trial| trial.condition == condition);
    let judged = of(Condition::Concept)
        .filter(|trial| run.grades.iter().any(|g| g.trial == trial.id && g.missing.is_empty()))
        .count() as u64;
    let claims = arm(Condition::Concept).claims;
    assert_eq!(claims.count, Count { k: judged, n: judged }, "all of those that were judged");
    assert!((judged as usize) < of(Condition::Concept).count());
    assert_eq!(tables.progress.missing, 4 * (run.grades.len() as u64).div_ceil(2));
    let sentence = format!("{} verdicts are missing", tables.progress.missing);
    assert!(headline(&run).to_string().contains(&sentence));
    assert!(html(&run).contains("no verdict: timeout"));
}

/// Words are read by chance, one in twenty, in each of 64 cells: the best cell looks three times as good, and
/// the words that did not choose it say so.
#[test]
fn pitfall_12_the_best_cell_is_reported_on_other_words() {
    let (mut held_out, mut best) = (Count::default(), Count::default());
    for seed in 0..30 {
        let mut trials = Vec::new();
        for cell in
            (0..64).map(|at| (f64::from(at / 8) / 8.0, at as usize / 8, f64::from(at % 8 + 1)))
        {
            for at in 0..WORDS {
                let mut one = trial("readout", Condition::Concept, &word(at), Some(cell), 0);
                let drawn = crate::experiment::seeds::seed(seed, &one.id, "", 0);
                let is_read = drawn.is_multiple_of(20);
                let rank = if is_read { 1 } else { 9 };
                one.read = Some(Readout { word: "some".into(), rank, words: WORDS });
                trials.push(one);
            }
        }
        let read = headline(&run_of(trials, Vec::new())).read.unwrap();
        held_out = [held_out, read.held_out].into_iter().sum();
        best = [best, read.best.1].into_iter().sum();
    }
    let (held_out, best) = (held_out.share().unwrap(), best.share().unwrap());
    assert!(best > 0.11, "chosen and reported on the same words: {best}");
    assert!((0.03..0.07).contains(&held_out), "reported on the others: {held_out}");
}
