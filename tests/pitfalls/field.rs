//! What other engines get wrong when they steer and capture, one test for each.

use std::sync::Arc;

use inkling::{
    engine::{
        Capture, Injection, Job, norm, point,
        resolve::resolve,
        vectors::{Header, VectorFiles, VectorSet},
    },
    model::Model,
    request::{CaptureSite, Op, Request, Site, StrengthMode},
};
use serde_json::{Value, json};

use crate::{
    common::{demo_model, golden},
    tiny::{capture, drawing, inject, job, plain, prompt, start, vector},
};

/// Where keys and values are cached by tokens alone, a steered prompt's are read by a clean one that comes
/// later (and a clean one's by a steered one).
#[test]
fn field_1_a_steered_page_never_reaches_a_clean_request() {
    let prompt = prompt(50, 5);
    let clean =
        || Job { logprobs: Some(0), capture: vec![capture(2, 50)], ..drawing(&prompt, 8, 1) };
    let steered = |layer| Job { inject: vec![inject(layer, 3.0, 20, None)], ..clean() };
    let alone = start(&plain(), |options| options.share = false).run(clean()).unwrap();
    let engine = start(&plain(), |_| {});
    let first = engine.run(steered(0)).unwrap();
    assert!(first != alone, "the injection shows");
    assert!(engine.run(clean()).unwrap() == alone, "clean after steered");
    assert!(engine.run(steered(0)).unwrap().captures == first.captures, "steered after clean");
    // All at once, and a prompt that goes on where a steered one's ends.
    let longer = Job { tokens: [&prompt[..], &[7, 8, 9]].concat(), ..clean() };
    let apart = start(&plain(), |options| options.share = false).run(longer.clone()).unwrap();
    let jobs = vec![steered(0), clean(), steered(1), longer, steered(2), clean()];
    let mut got = vec![None; jobs.len()];
    engine
        .run_all(jobs, |at, finished| {
            got[at] = Some(finished?);
            Ok(())
        })
        .unwrap();
    assert!(got[1].as_ref() == Some(&alone) && got[5].as_ref() == Some(&alone));
    assert!(got[3].as_ref() == Some(&apart), "a longer prompt");
}

/// Captured rows are those of the request that asked, however requests are mixed in steps.
#[test]
fn field_2_captured_rows_belong_to_their_request() {
    let engine = start(&plain(), |options| options.max_batch = 4);
    let jobs: Vec<Job> = (0..30)
        .map(|at| {
            let len = 3 + at * 7 % 23;
            Job { capture: vec![capture(at % 3, len)], ..drawing(&prompt(len, at), 3, at as u64) }
        })
        .collect();
    let alone = start(&plain(), |options| options.share = false);
    engine
        .run_all(jobs.clone(), |at, finished| {
            let want = alone.run(jobs[at].clone()).unwrap();
            assert!(finished?.captures == want.captures, "request {at}");
            Ok(())
        })
        .unwrap();
}

/// Every request of a batch has its own vector, strength, layer and window: not one for the whole context.
#[test]
fn field_3_every_request_of_a_batch_is_steered_by_itself() {
    let engine = start(&plain(), |options| options.max_batch = 16);
    let prompt = prompt(16, 6);
    let jobs: Vec<Job> = (0..24)
        .map(|at| {
            let injection = Injection {
                vector: vector(at),
                ..inject(at % 3, 0.5 + at as f32 / 8.0, at % 11, Some(12 + at % 4))
            };
            Job { inject: vec![injection], ..job(&prompt) }
        })
        .collect();
    let planned: Vec<f64> = jobs
        .iter()
        .map(|job| f64::from(job.inject[0].strength) * norm(&job.inject[0].vector))
        .collect();
    let expected: Vec<u64> =
        jobs.iter().map(|job| (job.inject[0].to.unwrap() - job.inject[0].from) as u64).collect();
    engine
        .run_all(jobs, |at, finished| {
            let receipt = finished?.outcome.receipts.remove(0);
            let measured = f64::from(receipt.measured.unwrap());
            assert!((measured - planned[at]).abs() < 1e-3 * planned[at], "{at}: {receipt:?}");
            assert_eq!((receipt.rows_expected, receipt.rows_touched), (expected[at], expected[at]));
            Ok(())
        })
        .unwrap();
}

/// Engines that keep the stream in two halves until they are added report the norm of one of them.
#[test]
fn field_4_norms_are_of_the_whole_stream() {
    let engine = start(&plain(), |_| {});
    let prompt = prompt(20, 7);
    for (site, captured) in [
        (Site::ResidPre, CaptureSite::ResidPre),
        (Site::ResidMid, CaptureSite::ResidMid),
        (Site::ResidPost, CaptureSite::ResidPost),
    ] {
        for layer in 0..3 {
            let rows = Capture::rows(captured, Some(layer), (0..20).collect());
            let clean = engine.run(Job { capture: vec![rows], ..job(&prompt) }).unwrap();
            let norms = clean.captures[0].chunks_exact(48).map(norm);
            let mean = norms.sum::<f64>() / 20.0;
            let by_row = Injection {
                site,
                mode: StrengthMode::Row,
                strength: -0.25,
                ..inject(layer, 0.0, 0, Some(20))
            };
            let steered = engine.run(Job { inject: vec![by_row], ..job(&prompt) }).unwrap();
            let receipt = &steered.outcome.receipts[0];
            let (before, change) =
                (f64::from(receipt.norm_before.unwrap()), f64::from(receipt.measured.unwrap()));
            assert!((before - mean).abs() < 1e-4 * mean, "{site:?} {layer}: {before}, not {mean}");
            assert!((change - mean / 4.0).abs() < 1e-3 * mean, "{site:?} {layer}: {change}");
        }
    }
}

/// Weights that were quantised are steered and captured like others.
#[test]
fn field_5_quantised_models_are_steered_too() {
    let model = Model::open(&demo_model()).unwrap();
    let engine = start(&model, |options| options.context = Some(64));
    let dim = model.config.dim;
    let vector: Arc<[f32]> = (0..dim).map(|at| (at % 13) as f32 - 6.0).collect();
    let injection =
        |strength| Injection { vector: Arc::clone(&vector), ..inject(20, strength, 5, None) };
    let rows = || Capture::rows(CaptureSite::ResidPost, Some(20), vec![4, 5, 9]);
    let run = |inject| {
        let job = Job { inject, capture: vec![rows()], ..job(&prompt(10, 8)) };
        engine.run(job).unwrap().captures.remove(0)
    };
    let (clean, steered) = (run(Vec::new()), run(vec![injection(1.5)]));
    assert_eq!(clean[..dim], steered[..dim], "the row before the window");
    for row in 1..3 {
        for at in 0..dim {
            let want = 1.5f32.mul_add(vector[at], clean[row * dim + at]);
            assert_eq!(steered[row * dim + at], want, "row {row}, element {at}");
        }
    }
}

fn refused(model: &Model, base: &std::path::Path, injection: Value, want: &str) {
    let request = json!({"id": "a", "tokens": [5, 6, 7], "inject": [injection], "sampling": {"max_tokens": 2}});
    let request: Request = serde_json::from_value(request).unwrap();
    let error = resolve(&request, model, &mut VectorFiles::new(base)).err();
    let error = error.unwrap_or_else(|| panic!("{request:?} is accepted")).to_string();
    assert!(error.contains(want) && error.contains("inject[0]"), "{want:?} not in {error}");
}

/// A vector that is not there, or that would not be used, is an error, not a clean run.
#[test]
fn field_6_vectors_that_are_missing_or_unused_are_errors() {
    let (model, folder) = (plain(), tempfile::tempdir().unwrap());
    let header = Header { site: Some(Site::ResidPost), layers: vec![1], ..Header::default() };
    let mut set = VectorSet::new(header);
    set.insert("sea", vec![vec![1.0; 48]]).unwrap();
    set.save(&folder.path().join("set.safetensors")).unwrap();
    let base = folder.path();
    let named = |name: &str, layer: usize| json!({"vector": name, "layer": layer, "strength": 1});
    refused(&model, base, named("none.safetensors#sea", 1), "none.safetensors");
    refused(&model, base, named("set.safetensors#air", 1), "no vector of this name");
    refused(&model, base, named("set.safetensors#sea", 2), "no vector for this layer");
    refused(&model, base, named("set.safetensors", 1), "malformed vector reference");
    // A vector beside an operation that reads none, a source beside a vector, a source that is not there.
    let scale = json!({"op": "scale", "vector": "set.safetensors#sea", "layer": 1, "strength": 0});
    refused(&model, base, scale, "scale has no vector");
    let both = json!({"vector": [1.0], "source": {"request": "b"}, "layer": 1});
    refused(&model, base, both, "in two ways");
    let alone = json!({"source": {"request": "b"}, "layer": 1, "op": "replace", "window": "last"});
    let request = json!({"id": "a", "tokens": [5, 6, 7], "inject": [alone]});
    let request: Request = serde_json::from_value(request).unwrap();
    let error = resolve(&request, &model, &mut VectorFiles::new(base)).unwrap().alone();
    assert!(error.unwrap_err().to_string().contains("another request"));
}

/// A point that this model does not have, or where it has another one than the name says, is an error.
#[test]
fn field_7_a_point_that_the_model_lacks_is_an_error() {
    let model = plain();
    let base = std::path::Path::new("");
    let at = |fields: Value| {
        let mut injection = json!({"op": "scale", "strength": 0});
        injection.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        injection
    };
    refused(&model, base, at(json!({"hook": "blocks.3.hook_resid_post"})), "out of range");
    refused(&model, base, at(json!({"hook": "blocks.1.attn.hook_pattern"})), "no known name");
    refused(&model, base, at(json!({"hook": "model.layers.1.mlp.gate_proj"})), "no known name");
    refused(&model, base, at(json!({"hook": "q.1"})), "can be captured, not injected");
    refused(&model, base, at(json!({"site": "head_out", "layer": 1})), "needs a head");
    refused(&model, base, at(json!({"site": "head_out", "layer": 1, "head": 6})), "has 6 heads");
    refused(&model, base, at(json!({"site": "resid_mid", "layer": 1, "head": 0})), "has none");
    // What the module gives is not what is added, where a family normalises or scales it in between.
    for (family, refuses) in
        [("gemma2", true), ("granite", true), ("olmo2", true), ("qwen2", false)]
    {
        let config = Model::open(&golden(&format!("families/{family}"))).unwrap().config;
        let found = point("model.layers.0.mlp", &config);
        assert_eq!(found.is_err(), refuses, "{family}: {found:?}");
        point("mlp_out.0", &config).unwrap();
    }
}

/// Removing a head, or what a whole block adds, shows in what follows, and the receipt counts it.
#[test]
fn field_8_heads_and_branches_can_be_removed() {
    let engine = start(&plain(), |_| {});
    let prompt = prompt(12, 9);
    let ablate = |site, head| Injection {
        vector: Arc::default(),
        op: Op::Scale,
        strength: 0.0,
        site,
        head,
        ..inject(1, 0.0, 0, None)
    };
    let run = |inject: Vec<Injection>| {
        let capture = [CaptureSite::HeadOut, CaptureSite::AttnOut, CaptureSite::ResidMid]
            .map(|site| Capture::rows(site, Some(1), (0..12).collect()));
        engine.run(Job { inject, capture: capture.to_vec(), ..job(&prompt) }).unwrap()
    };
    let clean = run(Vec::new());
    let one = run(vec![ablate(Site::HeadOut, Some(2))]);
    let receipt = &one.outcome.receipts[0];
    assert_eq!((receipt.site.as_str(), receipt.rows_touched), ("head_out.1.2", 12));
    for (got, clean) in one.captures[0].chunks_exact(48).zip(clean.captures[0].chunks_exact(48)) {
        assert_eq!(got[16..24], [0.0; 8], "the third head of eight numbers");
        assert_eq!((&got[..16], &got[24..]), (&clean[..16], &clean[24..]), "the other heads");
    }
    assert_ne!(one.captures[1], clean.captures[1], "attention's branch");
    // Without any head attention adds nothing.
    let all = run((0..6).map(|head| ablate(Site::HeadOut, Some(head))).collect());
    assert!(all.captures[1].iter().all(|&v| v == 0.0));
    let none = run(vec![ablate(Site::AttnOut, None)]);
    assert_eq!(none.captures[2], all.captures[2], "the stream after it");
}
