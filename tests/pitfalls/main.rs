//! What replications of the injected-thoughts experiment got wrong, one test for each (the tenth and the
//! twelfth are the report's: they stand with its tests), and in `field` what other engines do.

#[path = "../common/mod.rs"]
#[allow(dead_code, reason = "shared by several test binaries")]
mod common;
mod field;
mod tiny;

use std::collections::{BTreeMap, BTreeSet};

use common::demo_model;
use inkling::{
    engine::{
        Finished, Injection, Job, norm,
        resolve::resolve,
        vectors::{VectorFiles, VectorSet},
    },
    experiment::{
        prepare::prepare,
        protocol::{Chat, Protocol, Recipe},
        results::{Condition, Run, Trial},
        runner::failed_check,
        seeds,
        vectors::{Inputs, SITE, extract},
    },
    model::Model,
    request::{Message, Request, Sampling, Site, StrengthMode},
};
use serde_json::{Value, json};
use tiny::{BOS, RUN, capture, chat_folder, drawing, inject, job, plain, prompt, start, vector};

/// |a − b| as a part of b.
fn part(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs()
}

/// With a cache an engine sees one token a step: a window in the prompt must still be matched, and
/// what it changed must be what a pass over all positions at once changes.
#[test]
fn pitfall_1_prompt_positions_match_with_a_cache() {
    let prompt = prompt(21, 1);
    for share in [true, false] {
        let engine = start(&plain(), |options| options.share = share);
        let injection = inject(0, 2.0, 5, Some(9));
        let drawn =
            Job { inject: vec![injection.clone()], logprobs: Some(0), ..drawing(&prompt, 6, 3) };
        let outcome = engine.run(drawn).unwrap().outcome;
        let receipt = &outcome.receipts[0];
        assert_eq!((receipt.rows_expected, receipt.rows_touched), (4, 4));

        let sample = &outcome.samples[0];
        let mut largest = 0.0f32;
        for (step, token) in sample.tokens.iter().enumerate() {
            let at_once = |inject: Vec<Injection>| {
                let tokens = [&prompt[..], &sample.tokens[..step]].concat();
                let first = Job { inject, watch: vec![*token], ..job(&tokens) };
                let first = engine.run(first).unwrap().outcome.first.unwrap();
                first.watch[0] - first.logsumexp
            };
            let with = at_once(vec![injection.clone()]);
            let logprob = sample.logprobs[step].logprob;
            // f32 through three blocks.
            assert!((with - logprob).abs() < 1e-4, "step {step}: {logprob} instead of {with}");
            if step > 0 {
                largest = largest.max((with - at_once(Vec::new())).abs());
            }
        }
        assert!(largest > 1e-3, "later tokens do not see the injection: {largest}");
    }
}

/// Prompts of different lengths in one batch: each row is where it is alone, and the window's rows
/// are changed by exactly the injection, the rows before it by nothing.
#[test]
fn pitfall_2_padding_never_shifts_positions() {
    let lengths = [3, 40, 17, 64, 5];
    let jobs: Vec<Job> = lengths
        .iter()
        .map(|&len| Job {
            inject: vec![inject(1, 2.0, len - 2, Some(len - 1))],
            capture: vec![capture(1, len)],
            ..drawing(&prompt(len, len), 5, len as u64)
        })
        .collect();
    let single = start(&plain(), |options| options.share = false);
    // N is known only where a clean run was needed, which depends on sharing.
    let without_reference = |mut finished: Finished| {
        finished.outcome.receipts.iter_mut().for_each(|receipt| receipt.reference_norm = None);
        finished
    };
    let run_alone = |job: &Job| without_reference(single.run(job.clone()).unwrap());
    let alone: Vec<Finished> = jobs.iter().map(run_alone).collect();
    for share in [true, false] {
        let engine = start(&plain(), |options| options.share = share);
        let mut batch = vec![Finished::default(); jobs.len()];
        let run = engine.run_all(jobs.clone(), |index, finished| {
            batch[index] = without_reference(finished?);
            Ok(())
        });
        run.unwrap();
        assert!(batch == alone, "a batch (sharing: {share}) changes its members");
    }
    let direction = vector(1);
    for ((job, finished), len) in jobs.iter().zip(&alone).zip(lengths) {
        let clean = Job { capture: job.capture.clone(), ..tiny::job(&job.tokens) };
        let clean = single.run(clean).unwrap();
        let rows = finished.captures[0].chunks_exact(48).zip(clean.captures[0].chunks_exact(48));
        for (position, (got, clean)) in rows.enumerate() {
            let strength = if position == len - 2 { 2.0f32 } else { 0.0 };
            let want = clean.iter().zip(direction.iter()).map(|(h, v)| strength.mul_add(*v, *h));
            // The row behind the window attends to it only from the next block on.
            assert_eq!(got, want.collect::<Vec<f32>>(), "length {len}, position {position}");
        }
    }
}

/// The window runs through every generated token but the last, which is never fed back.
#[test]
fn pitfall_3_window_covers_prompt_part_and_generated_tokens() {
    let engine = start(&plain(), |_| {});
    let prompt = prompt(20, 2);
    let scored = |inject: Vec<Injection>| {
        let job = Job { inject, score: vec![vec![40, 41, 42, 43]], ..job(&prompt) };
        let outcome = engine.run(job).unwrap().outcome;
        let rows = outcome.receipts.first().map(|r| (r.rows_expected, r.rows_touched));
        (outcome.scores[0].logprobs.clone(), rows)
    };
    let (clean, _) = scored(Vec::new());
    let (open, open_rows) = scored(vec![inject(1, 2.0, 12, None)]);
    let (prompt_only, prompt_rows) = scored(vec![inject(1, 2.0, 12, Some(20))]);
    let (generated_only, generated_rows) = scored(vec![inject(1, 2.0, 20, None)]);
    assert_eq!(open_rows, Some((8 + 3, 8 + 3)));
    assert_eq!(prompt_rows, Some((8, 8)));
    assert_eq!(generated_rows, Some((3, 3)));
    // The first token is drawn from the last prompt row.
    assert_eq!((open[0], generated_only[0]), (prompt_only[0], clean[0]));
    assert_ne!(open[0], clean[0]);
    for at in 1..4 {
        let different = [clean[at], open[at], prompt_only[at], generated_only[at]];
        let distinct: BTreeSet<u32> = different.iter().map(|v| v.to_bits()).collect();
        assert_eq!(distinct.len(), 4, "token {at}: {different:?}");
    }

    // And in an experiment, from the blank line on.
    let cued = &RUN.manifest.prompts[0];
    assert_eq!(cued.to, None);
    assert!(cued.pieces[cued.from..].concat().starts_with("\n\nTrial 1: a thought?"));
    let mut sampled = 0;
    for trial in RUN.trials.iter().filter(|trial| trial.dose.is_some()) {
        let generated = trial.reply.as_ref().map_or(1, |reply| reply.tokens.len());
        let rows = (cued.tokens.len() - cued.from + generated - 1) as u64;
        let receipt = &trial.receipts[0];
        assert_eq!((receipt.rows_expected, receipt.rows_touched), (rows, rows));
        assert_eq!((receipt.from, receipt.to), (cued.from, None));
        sampled += usize::from(generated > 2);
    }
    assert!(sampled > 0, "no trial with rows of generated tokens");
}

/// The built-in protocols as the demo model's tokenizer cuts them: the blank line is in, the
/// sentence before it is out.
#[test]
fn pitfall_3_the_window_opens_at_the_blank_line() {
    let model = Model::open(&demo_model()).unwrap();
    let mut with_sentences = 0;
    for name in Protocol::builtins() {
        let protocol = Protocol::builtin(name).unwrap();
        let prepared = prepare(&model, &protocol).unwrap();
        for ((prompt, _, sentence), record) in &prepared.prompts {
            if sentence.is_empty() {
                continue;
            }
            // Where a line is read, its own tokens are in and nothing else.
            with_sentences += 1;
            let (from, to) = match record.probe {
                Some(probe) => probe,
                None => (record.from, record.to.unwrap()),
            };
            let inside = record.pieces[from..to].concat();
            assert_eq!(inside.trim(), sentence, "{name}, {prompt}");
            let before = record.pieces[..from].concat();
            let opened = before.matches("<|im_start|>assistant").count();
            assert_eq!(opened, usize::from(record.probe.is_some()), "{name}, {prompt}");
            if let Some((after, end)) = record.after {
                assert!(after >= to && end.unwrap() > after, "{name}, {prompt}");
                let question = record.pieces[after..end.unwrap()].concat();
                assert!(question.starts_with("Did you mean"), "{question:?}");
            }
        }
        if !protocol.prompts.contains_key("cued") {
            continue;
        }
        let cued = &prepared.prompts[&("cued".to_owned(), String::new(), String::new())];
        let (before, window) = cued.pieces.split_at(cued.from);
        let (before, window) = (before.concat(), window.concat());
        assert!(before.ends_with("Here it comes."), "{name}: {before:?}");
        assert!(window.starts_with("\n\nTrial 1: Do you detect"), "{name}: {window:?}");
        assert_eq!(cued.to, None, "{name}");
    }
    assert_eq!(with_sentences, 2 * 50 + 2 * 50 + 10 * 50);
}

/// What can touch nothing is refused; what is accepted touches, at every site of every block.
#[test]
fn pitfall_4_a_hook_that_touches_nothing_is_an_error() {
    let engine = start(&plain(), |_| {});
    let prompt = prompt(12, 3);
    let refused = |injection: Injection, want: &str| {
        let job = Job { inject: vec![injection], ..drawing(&prompt, 4, 1) };
        let error = engine.run(job).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains("inject[0]"), "{error}");
    };
    // Rows 0..=11 of the prompt, 12..=14 of the first three of four tokens.
    refused(inject(1, 1.0, 15, None), "touches no token");
    refused(inject(1, 1.0, 4, Some(4)), "touches no token");
    refused(inject(3, 1.0, 0, None), "layer out of range");
    let short = Injection { vector: vec![1.0f32; 47].into(), ..inject(1, 1.0, 0, None) };
    refused(short, "wrong length");
    let zero = Injection { vector: vec![0.0f32; 48].into(), ..inject(1, 1.0, 0, None) };
    refused(Injection { mode: StrengthMode::Unit, ..zero }, "no direction");

    let first = |inject: Vec<Injection>| {
        let job = Job { inject, watch: vec![50], ..job(&prompt) };
        let outcome = engine.run(job).unwrap().outcome;
        (outcome.first.unwrap().watch[0], outcome.receipts)
    };
    let (clean, _) = first(Vec::new());
    for layer in 0..3 {
        for site in [Site::ResidPre, Site::ResidMid, Site::ResidPost] {
            let (logit, receipts) = first(vec![Injection { site, ..inject(layer, 1.0, 7, None) }]);
            let receipt = &receipts[0];
            assert_ne!(logit, clean, "{site:?} of block {layer} changes nothing");
            assert_eq!((receipt.rows_expected, receipt.rows_touched), (5, 5));
            let (measured, planned) = (receipt.measured.unwrap(), receipt.planned.unwrap());
            assert!(part(measured.into(), planned.into()) < 1e-3, "{receipt:?}");
        }
    }

    // A finished trial whose receipt says that nothing happened does not pass.
    let good = RUN.trials.iter().find(|trial| trial.dose.is_some()).unwrap();
    assert_eq!(failed_check(good), None);
    let failed = |change: fn(&mut Trial)| {
        let mut trial = good.clone();
        change(&mut trial);
        failed_check(&trial).unwrap()
    };
    assert!(failed(|trial| trial.receipts[0].rows_touched = 0).contains("0 rows were touched"));
    assert!(failed(|trial| trial.receipts[0].rows_touched -= 1).contains("were expected"));
    assert!(failed(|trial| trial.receipts[0].measured = Some(0.0)).contains("was measured"));
    assert!(failed(|trial| trial.receipts[0].measured = None).contains("not measured"));
    assert!(failed(|trial| trial.receipts.clear()).contains("no receipt"));
}

/// A dose of 0.04 of the stream's norm is reported as that, whatever its unit.
#[test]
fn pitfall_5_receipts_report_the_dose_against_the_norm() {
    let engine = start(&plain(), |_| {});
    let prompt = prompt(20, 4);
    let clean = engine.run(Job { capture: vec![capture(1, 20)], ..job(&prompt) }).unwrap();
    let norms: Vec<f64> = clean.captures[0].chunks_exact(48).map(norm).collect();
    let mean = |norms: &[f64]| norms.iter().sum::<f64>() / norms.len() as f64;
    let length = norm(&vector(1));
    for from in [0, 3] {
        let stream = mean(&norms[from..]);
        // The prompt's first position, the attention sink, is not in N.
        let reference = mean(&norms[from.max(1)..]);
        let doses = [
            (StrengthMode::Raw, 0.04 * stream / length, 0.04 * stream),
            (StrengthMode::Unit, 0.04 * stream, 0.04 * stream),
            (StrengthMode::Reference, 0.25, 0.25 * reference),
            (StrengthMode::Row, -0.5, 0.5 * stream),
        ];
        for (mode, strength, change) in doses {
            let injection = Injection { mode, ..inject(1, strength as f32, from, None) };
            let job = Job { inject: vec![injection], ..job(&prompt) };
            let receipt = engine.run(job).unwrap().outcome.receipts.remove(0);
            let numbers = [
                (receipt.vector_norm, length),
                (receipt.norm_before.unwrap(), stream),
                (receipt.planned.unwrap(), change),
                (receipt.measured.unwrap(), change),
            ];
            for (got, want) in numbers {
                assert!(part(got.into(), want) < 1e-3, "{receipt:?}: {got} instead of {want}");
            }
            if mode == StrengthMode::Reference {
                assert!(part(receipt.reference_norm.unwrap().into(), reference) < 1e-5);
            }
        }
    }
    // Every injected trial of a run keeps all of it.
    for trial in RUN.trials.iter().filter(|trial| trial.dose.is_some()) {
        let receipt = &trial.receipts[0];
        let planned = trial.dose.unwrap() * f64::from(receipt.reference_norm.unwrap());
        assert!(part(receipt.planned.unwrap().into(), planned) < 1e-5);
        assert!(receipt.norm_before.unwrap() > 0.0);
    }
}

/// A concept vector is a difference of rows at one site, and is added to rows at that site; a set
/// of another model, site or layer is refused unless its layer is named.
#[test]
fn pitfall_6_vectors_are_measured_where_they_are_injected() {
    let model = plain();
    let engine = start(&model, |_| {});
    let row = |tokens: &[u32], layer: usize, inject: Vec<Injection>| {
        let job = Job { inject, capture: vec![capture(layer, tokens.len())], ..job(tokens) };
        let rows = engine.run(job).unwrap().captures.remove(0);
        rows[rows.len() - 48..].to_vec()
    };
    let words = vec!["sea".to_owned(), "air".to_owned()];
    let prompts = [prompt(9, 1), prompt(11, 2)];
    let baseline = [prompt(10, 3), prompt(8, 4), prompt(10, 5)];
    let inputs = Inputs {
        words: words.clone(),
        prompts: prompts.iter().map(|prompt| vec![prompt.clone()]).collect(),
        baseline: baseline.to_vec(),
        ..Inputs::default()
    };
    let recipe = Recipe::MeanDifference;
    let found = extract(&engine, recipe, &inputs, &[0, 2], 48, &mut ()).unwrap();
    let vectors = found.vectors;
    for layer in [0, 2] {
        let baseline: Vec<Vec<f32>> = baseline.iter().map(|b| row(b, layer, vec![])).collect();
        for (word, prompt) in words.iter().zip(&prompts) {
            let (got, own) = (vectors.get(word, layer).unwrap(), row(prompt, layer, vec![]));
            for (i, (got, own)) in got.iter().zip(&own).enumerate() {
                let mean = baseline.iter().map(|row| f64::from(row[i])).sum::<f64>() / 3.0;
                let off = (f64::from(*got) - (f64::from(*own) - mean)).abs();
                let tolerance = 1e-6 * (1.0 + f64::from(own.abs()));
                assert!(off <= tolerance, "{word}, block {layer}, element {i}: {off}");
            }
            // Injected there, it is there.
            assert_eq!(SITE, Site::ResidPost);
            let injection = Injection {
                vector: got.into(),
                site: SITE,
                ..inject(layer, 0.5, prompt.len() - 1, None)
            };
            let moved = row(prompt, layer, vec![injection]);
            let want = own.iter().zip(got).map(|(h, v)| 0.5f32.mul_add(*v, *h));
            assert_eq!(moved, want.collect::<Vec<f32>>());
        }
    }

    let folder = tempfile::tempdir().unwrap();
    let save = |hash: &str, file: &str| {
        vectors.to_set(hash, "test").unwrap().save(&folder.path().join(file)).unwrap();
    };
    save(&model.hash().unwrap(), "own.safetensors");
    save("0000", "other.safetensors");
    let resolved = |injection: Value| {
        let request = json!({
            "id": "a", "tokens": [5, 6, 7], "inject": [injection], "sampling": {"max_tokens": 2}
        });
        let request: Request = serde_json::from_value(request).unwrap();
        let job = resolve(&request, &model, &mut VectorFiles::new(folder.path()));
        job.map(|resolved| resolved.job.inject[0].vector.to_vec())
    };
    let sea = |layer: usize, site: &str| {
        resolved(json!({
            "vector": "own.safetensors#sea", "layer": layer, "site": site, "strength": 1.0
        }))
    };
    assert_eq!(sea(2, "resid_post").unwrap(), vectors.get("sea", 2).unwrap());
    // The input of block 1 is the output of block 0: one site with two names.
    assert_eq!(sea(1, "resid_pre").unwrap(), vectors.get("sea", 0).unwrap());
    for (layer, site) in [(1, "resid_post"), (2, "resid_pre"), (2, "resid_mid")] {
        let error = sea(layer, site).unwrap_err().to_string();
        assert!(error.contains("vector_layer"), "{site}.{layer}: {error}");
    }
    let insisting = json!({
        "vector": "own.safetensors#sea", "layer": 1, "site": "resid_mid", "strength": 1.0,
        "vector_layer": 2
    });
    assert_eq!(resolved(insisting).unwrap(), vectors.get("sea", 2).unwrap());
    let other = json!({"vector": "other.safetensors#sea", "layer": 2, "strength": 1.0});
    let error = resolved(other).unwrap_err().to_string();
    assert!(error.contains("another model"), "{error}");

    // A run injects what it stored, where it took it.
    let set = VectorSet::load(&folder.path().join("own.safetensors")).unwrap();
    assert_eq!((set.header.site, &set.header.layers[..]), (Some(SITE), &[0, 2][..]));
    for receipt in RUN.trials.iter().flat_map(|trial| &trial.receipts) {
        assert!(receipt.site.starts_with("resid_post."), "{}", receipt.site);
    }
}

fn clean_trials(run: &Run) -> BTreeMap<&str, &Trial> {
    let clean = run.trials.iter().filter(|trial| trial.condition == Condition::Clean);
    clean.map(|trial| (trial.id.as_str(), trial)).collect()
}

/// Controls do not depend on layer, dose or vector: more of those add no control.
#[test]
fn pitfall_7_controls_run_once() {
    let words = r#"["Bread", "Snow"]"#;
    let more = tiny::run(&tiny::protocol(words, "[0, 1, 2]", "[0.25, 0.5, 1.0]"), 8);
    let (clean, clean_of_more) = (clean_trials(&RUN), clean_trials(&more));
    assert!(more.trials.len() > 2 * RUN.trials.len());
    // One for all words of the readout, one for each word and repeat of the samples.
    assert_eq!(clean.len(), 1 + 2 * 2);
    assert_eq!(clean, clean_of_more);
    for trial in more.trials.iter().filter(|trial| trial.condition != Condition::Clean) {
        let partner = clean[trial.clean.as_deref().unwrap()];
        assert_eq!((&partner.part, &partner.prompt), (&trial.part, &trial.prompt));
        assert_eq!(partner.repeat, trial.repeat);
        assert!(partner.concept.is_empty() || partner.concept == trial.concept);
        assert!(partner.receipts.is_empty());
    }

    // And the engine computes a clean prompt once: later trials of it cost no row of any block.
    let engine = start(&plain(), |_| {});
    let prompt = prompt(20, 5);
    engine.run(drawing(&prompt, 1, 0)).unwrap();
    let first = engine.stats();
    for seed in 1..5 {
        engine.run(drawing(&prompt, 1, seed)).unwrap();
    }
    assert_eq!(first.layer_rows, 3 * 20);
    assert_eq!(engine.stats().layer_rows, first.layer_rows);
}

/// A trial's seed is of its prompt, concept and repeat: the same for all conditions, layers and
/// doses, another for each repeat, and no matter of order, batch or neighbours.
#[test]
fn pitfall_8_every_trial_has_its_own_seed() {
    let mut groups: BTreeMap<(&str, u32), BTreeSet<u64>> = BTreeMap::new();
    let sampled = |run: &'static Run| run.trials.iter().filter(|trial| trial.part == "sampled");
    for trial in sampled(&RUN) {
        let want = seeds::seed(3, &trial.prompt, &trial.concept, trial.repeat);
        assert_eq!(trial.seed, want);
        groups.entry((trial.concept.as_str(), trial.repeat)).or_default().insert(trial.seed);
    }
    assert_eq!(groups.len(), 2 * 2);
    assert!(groups.values().all(|seeds| seeds.len() == 1), "{groups:?}");
    let distinct: BTreeSet<u64> = groups.values().flatten().copied().collect();
    assert_eq!(distinct.len(), groups.len(), "two trials share a seed");

    // Backwards and one at a time.
    let backwards = tiny::run(&tiny::protocol(r#"["Snow", "Bread"]"#, "[2, 0]", "[1.0, 0.5]"), 1);
    let by_id: BTreeMap<&str, &Trial> =
        backwards.trials.iter().map(|trial| (trial.id.as_str(), trial)).collect();
    for trial in sampled(&RUN) {
        assert_eq!(by_id.get(trial.id.as_str()), Some(&trial));
    }

    let engine = start(&plain(), |_| {});
    let tokens = |seed| {
        let job = Job { n: 3, ..drawing(&prompt(20, 6), 30, seed) };
        let samples = engine.run(job).unwrap().outcome.samples;
        samples.into_iter().map(|sample| sample.tokens).collect::<Vec<_>>()
    };
    let (one, again, other) = (tokens(1), tokens(1), tokens(2));
    assert_eq!(one, again);
    let all: BTreeSet<&Vec<u32>> = one.iter().chain(&other).collect();
    assert_eq!(all.len(), 6, "samples of different seeds are the same");
}

/// The sampling settings that a model's makers recommend are not applied behind one's back.
#[test]
fn pitfall_9_model_defaults_are_not_applied() {
    let defaults = json!({
        "do_sample": true, "temperature": 0.2, "top_p": 0.1, "top_k": 1,
        "repetition_penalty": 1.5, "eos_token_id": 2
    });
    let folder = tiny::with_files("plain", &[("generation_config.json", &defaults)]);
    let replies = |model: &Model, sampling: Sampling| {
        let job = Job { sampling, n: 20, ..drawing(&prompt(20, 7), 8, 1) };
        start(model, |_| {}).run(job).unwrap().outcome
    };
    let sampling = Sampling { max_tokens: 8, seed: 1, ..Sampling::default() };
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (1.0, 1.0, 0));
    let plain_replies = replies(&plain(), sampling);
    let with_defaults = Model::open(folder.path()).unwrap();
    assert_eq!(with_defaults.config.stop_tokens, plain().config.stop_tokens);
    assert_eq!(replies(&with_defaults, sampling), plain_replies);
    let as_they_recommend = Sampling { temperature: 0.2, top_p: 0.1, top_k: 1, ..sampling };
    assert_ne!(replies(&with_defaults, as_they_recommend), plain_replies);
}

/// The built-in protocols draw from the whole distribution.
#[test]
fn pitfall_9_protocols_draw_at_temperature_one() {
    let mut draw_replies = Vec::new();
    for name in Protocol::builtins() {
        let json = serde_json::to_value(Protocol::builtin(name).unwrap()).unwrap();
        let parts = json["parts"].as_array().unwrap().iter();
        for draw in parts.map(|part| &part["kind"]["sample"]).filter(|draw| draw.is_object()) {
            assert_eq!(draw["temperature"], json!(1.0), "{name}");
            assert_eq!((&draw["top_p"], &draw["top_k"]), (&json!(1.0), &json!(0)), "{name}");
            draw_replies.push(name);
        }
    }
    draw_replies.dedup();
    assert_eq!(
        draw_replies,
        ["injected-thoughts", "variants", "thought-vs-text", "prefill", "dose-response", "demo"]
    );
}

/// A template that prints the BOS and a tokenizer that adds one give one.
#[test]
fn pitfall_11_no_double_bos() {
    let folder = chat_folder();
    let model = Model::open(folder.path()).unwrap();
    let tokenizer = model.tokenizer.as_deref().unwrap();
    let count = |tokens: &[u32]| tokens.iter().filter(|token| **token == BOS).count();
    let message = Message { role: "user".into(), content: "Hi.".into() };
    let chat = Request { messages: Some(vec![message]), ..Request::default() };
    let chat = model.render(&chat).unwrap();
    assert_eq!((chat.tokens[0], count(&chat.tokens)), (BOS, 1));
    // The trap is there: the rendered text, tokenised as any text is, has two.
    assert_eq!(count(&tokenizer.encode(&chat.text, true).unwrap().tokens), 2);
    let text = Request { text: Some("Hi.".into()), ..Request::default() };
    let text = model.render(&text).unwrap();
    assert_eq!((text.tokens[0], count(&text.tokens)), (BOS, 1));
    let words = ["sea".to_owned(), "air".to_owned()];
    let recipe = tiny::protocol(r#"["Bread", "Snow"]"#, "[0]", "[1]").vectors;
    let inputs = Inputs::new(&model, &Chat::default(), &recipe, &words).unwrap();
    assert_eq!((inputs.prompts.len(), inputs.baseline.len()), (2, 3));
    for tokens in inputs.prompts.into_iter().flatten().chain(inputs.baseline) {
        assert_eq!((tokens[0], count(&tokens)), (BOS, 1));
    }
    for prompt in &RUN.manifest.prompts {
        assert_eq!((prompt.tokens[0], count(&prompt.tokens)), (BOS, 1));
    }

    // The demo model's BOS is the token that opens each turn: one of them at the start.
    let model = Model::open(&demo_model()).unwrap();
    let prepared = prepare(&model, &Protocol::builtin("demo").unwrap()).unwrap();
    for prompt in prepared.prompts.values() {
        assert_eq!(prompt.pieces[0], "<|im_start|>");
        assert_ne!(prompt.pieces[1], "<|im_start|>");
        let turns = prompt.text.matches("<|im_start|>").count();
        let opening = prompt.pieces.iter().filter(|piece| *piece == "<|im_start|>").count();
        assert_eq!(opening, turns);
    }
}

/// A crash in the middle costs hours where a run cannot be gone on with. Here the device is lost
/// after so many kernels: at the start, while vectors are made, and among the trials.
#[cfg(feature = "host-kernels")]
#[test]
fn a_lost_device_leaves_a_folder_that_resumes_to_the_same_content() {
    use inkling::engine::{DeviceKind, Dtype};

    let model_folder = chat_folder();
    let model = Model::open(model_folder.path()).unwrap();
    let protocol = tiny::protocol(r#"["Bread"]"#, "[0, 2]", "[1.0]");
    let on_kernels = |fail_after| {
        start(&model, |options| {
            options.device = DeviceKind::HostKernels;
            options.dtype = Dtype::Bf16;
            options.fail_after = fail_after;
        })
    };
    let lines = |dir: &std::path::Path| {
        let text = fs_err::read_to_string(dir.join("trials.jsonl")).unwrap_or_default();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let whole = model_folder.path().join("whole");
    tiny::run_into(&whole, &protocol, &model, &on_kernels(None)).unwrap();
    let dir = model_folder.path().join("lost");
    let mut kept = Vec::new();
    let mut launches = 0;
    while let Err(error) = tiny::run_into(&dir, &protocol, &model, &on_kernels(Some(launches))) {
        assert!(error.to_string().contains("made to fail"), "{error}");
        kept.push(lines(&dir).len());
        launches += 100;
    }
    let trials = lines(&whole).len();
    assert!(kept[0] == 0 && kept.iter().any(|&n| n > 0 && n < trials), "kept {kept:?} of {trials}");
    assert_eq!(lines(&dir), lines(&whole));
}
