use std::collections::BTreeMap;

use super::{captures::captures, *};
use crate::{
    engine::vectors::{Header, VectorSet},
    request::{CaptureSite, Layers, NamedPositions, Positions, VectorRef},
};

const LIMITS: Limits = Limits {
    layers: 4,
    heads: 2,
    head_dim: 1,
    dim: 2,
    vocab: 10,
    context: 16,
    changes_branches: false,
};

/// The error's text; `want` must stand in it.
#[track_caller]
fn refused<T>(result: Result<T>, want: &[&str]) {
    let text = result.err().expect("an error").to_string();
    for want in want {
        assert!(text.contains(want), "{want:?} not in {text}");
    }
}

fn injection(vector: VectorRef, layer: OneOrMany) -> request::Injection {
    request::Injection { layer: Some(layer), ..request::Injection::add(vector, 0, 1.0) }
}

/// Resolves one injection over the whole sequence against a model whose hash is `abc`.
fn inject(wanted: &request::Injection, files: &mut VectorFiles) -> Result<Vec<Injection>> {
    let mut source = Source { limits: LIMITS, model_hash: &|| Ok("abc".into()), files };
    injections(wanted, &[window(0, None)], &mut source, "inject[0]")
}

fn window(from: usize, to: Option<usize>) -> TokenWindow {
    TokenWindow { from, to, every: 1 }
}

fn values(values: &[f32]) -> VectorRef {
    VectorRef::Values(values.to_vec())
}

/// A folder with `set.safetensors`: sea and air of `model` at layers 1 and 2.
fn folder(model: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut set = VectorSet::new(Header {
        model_hash: Some(model.into()),
        site: Some(Site::ResidPost),
        layers: vec![1, 2],
        recipe: String::new(),
        ..Header::default()
    });
    set.insert("sea", vec![vec![1.0, 0.0], vec![2.0, 0.0]]).unwrap();
    set.insert("air", vec![vec![0.0, 1.0], vec![0.0, 2.0]]).unwrap();
    set.save(&folder.path().join("set.safetensors")).unwrap();
    folder
}

#[test]
fn sampling_values_are_checked() {
    let check = |change: fn(&mut Sampling)| {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        check_sampling(&sampling)
    };
    check(|_| {}).unwrap();
    check(|s| s.temperature = 0.0).unwrap();
    refused(check(|s| s.temperature = -0.1), &["sampling.temperature", "-0.1"]);
    refused(check(|s| s.temperature = f32::INFINITY), &["sampling.temperature"]);
    refused(check(|s| s.temperature = f32::NAN), &["sampling.temperature"]);
    refused(check(|s| s.top_p = 0.0), &["sampling.top_p"]);
    refused(check(|s| s.top_p = 1.5), &["sampling.top_p"]);
    refused(check(|s| s.min_p = 1.0), &["sampling.min_p"]);
    refused(check(|s| s.min_p = f32::NAN), &["sampling.min_p"]);
}

#[test]
fn counts_tokens_and_context_are_checked() {
    let request = Request { n: 1, logprobs: Some(10), ..Request::default() };
    check_counts(&request, LIMITS).unwrap();
    refused(check_counts(&Request { n: 0, ..request.clone() }, LIMITS), &["n\n", "1 or more"]);
    refused(check_counts(&Request { logprobs: Some(11), ..request }, LIMITS), &["logprobs", "11"]);
    refused(check_tokens(&[], LIMITS, "prompt"), &["prompt", "at least one"]);
    refused(check_tokens(&[3, 10], LIMITS, "tokens"), &["token 1", "0..=9", "10"]);
    check_context(6, 10, LIMITS).unwrap();
    refused(check_context(7, 10, LIMITS), &["at most 16", "7 of prompt + 10"]);
    refused(check_stop(&[String::new()], None), &["stop[0]"]);
    refused(check_stop(&["x".into()], None), &["stop", "tokenizer"]);
    let score = [Continuation::Tokens(vec![1, 2]), Continuation::Tokens(vec![])];
    assert_eq!(continuations(&score[..1], None, LIMITS).unwrap(), [[1, 2]]);
    refused(continuations(&score, None, LIMITS), &["score[1]"]);
    refused(continuations(&[Continuation::Text("a".into())], None, LIMITS), &["score[0]"]);
}

#[test]
fn windows_must_touch_rows() {
    let (raw, reference) = (StrengthMode::Raw, StrengthMode::Reference);
    // Five prompt rows and three of generated tokens.
    check_window(raw, window(7, None), 5, 8, "inject[0]").unwrap();
    refused(check_window(raw, window(8, None), 5, 8, "inject[0]"), &["inject[0].from", "before 8"]);
    check_window(reference, window(4, None), 5, 8, "inject[0]").unwrap();
    check_window(reference, window(0, Some(2)), 5, 8, "inject[0]").unwrap();
    refused(check_window(reference, window(5, None), 5, 8, "inject[0]"), &["strength_mode"]);
    refused(
        check_window(reference, window(0, Some(1)), 5, 8, "inject[0]"),
        &["strength_mode", "0..1"],
    );
}

#[test]
fn numbers_as_vectors() {
    let mut files = VectorFiles::new("");
    let mut check = |wanted: request::Injection| inject(&wanted, &mut files);
    let both = check(injection(values(&[3.0, 4.0]), OneOrMany::Many(vec![3, 0]))).unwrap();
    assert_eq!(both.iter().map(|i| i.layer).collect::<Vec<_>>(), [3, 0]);
    assert_eq!(*both[1].vector, [3.0, 4.0]);
    let one = |v: &[f32]| injection(values(v), OneOrMany::One(0));
    refused(check(one(&[1.0])), &["inject[0].vector", "2 (the width", "got:      1"]);
    refused(check(one(&[1.0, f32::INFINITY])), &["inject[0].vector", "index 1"]);
    refused(check(one(&[0.0, 0.0])), &["inject[0].vector", "zero"]);
    let layers = |layer| injection(values(&[1.0, 1.0]), layer);
    refused(check(layers(OneOrMany::One(4))), &["inject[0].layer", "0..=3", "4 blocks"]);
    refused(check(layers(OneOrMany::Many(vec![]))), &["inject[0].layer", "no layers"]);
    refused(check(layers(OneOrMany::Many(vec![1, 1]))), &["inject[0].layer", "twice"]);
    let strength = request::Injection { strength: Some(f32::INFINITY), ..one(&[1.0, 1.0]) };
    refused(check(strength), &["inject[0]", "strength"]);
    let layered = request::Injection { vector_layer: Some(1), ..one(&[1.0, 1.0]) };
    refused(check(layered), &["inject[0].vector", "vector_layer"]);
}

#[test]
fn vectors_from_files() {
    let folder = folder("abc");
    let mut files = VectorFiles::new(folder.path());
    let named = |name: &str, layer| injection(VectorRef::Named(name.into()), OneOrMany::One(layer));
    let sea = "set.safetensors#sea";
    let found = inject(&named(sea, 2), &mut files).unwrap();
    assert_eq!(*found[0].vector, [2.0, 0.0]);
    let again = inject(&named(sea, 2), &mut files).unwrap();
    assert!(Arc::ptr_eq(&found[0].vector, &again[0].vector), "each file is read once");

    // The input of block 2 is the output of block 1.
    let pre = request::Injection { site: Some(Site::ResidPre), ..named(sea, 2) };
    assert_eq!(*inject(&pre, &mut files).unwrap()[0].vector, [1.0, 0.0]);
    let mid = request::Injection { site: Some(Site::ResidMid), ..named(sea, 2) };
    refused(inject(&mid, &mut files), &["inject[0].vector", "another site"]);
    let insisted = request::Injection { vector_layer: Some(1), ..mid };
    assert_eq!(*inject(&insisted, &mut files).unwrap()[0].vector, [1.0, 0.0]);
    refused(inject(&named(sea, 3), &mut files), &["one of [1, 2]", "vector_layer"]);

    let sum = |terms: &[(&str, f32)]| {
        let terms = terms.iter().map(|(name, weight)| (format!("set.safetensors#{name}"), *weight));
        injection(VectorRef::Sum(terms.collect::<BTreeMap<_, _>>()), OneOrMany::One(1))
    };
    let mixed = inject(&sum(&[("sea", 2.0), ("air", -1.0)]), &mut files).unwrap();
    assert_eq!(*mixed[0].vector, [2.0, -1.0]);
    refused(inject(&sum(&[]), &mut files), &["zero"]);
    refused(inject(&sum(&[("sea", f32::NAN)]), &mut files), &["not finite"]);

    refused(inject(&named("set.safetensors", 1), &mut files), &["FILE#NAME"]);
    refused(inject(&named("set.safetensors#fire", 1), &mut files), &["air, sea"]);
    refused(inject(&named("none.safetensors#sea", 1), &mut files), &["none.safetensors"]);
}

#[test]
fn vectors_of_another_model_are_refused() {
    let folder = folder("another");
    let mut files = VectorFiles::new(folder.path());
    let vector = VectorRef::Named("set.safetensors#sea".into());
    let wanted = injection(vector, OneOrMany::One(2));
    refused(inject(&wanted, &mut files), &["another model", "abc", "vector_layer"]);
    let insisted = request::Injection { vector_layer: Some(2), ..wanted };
    assert_eq!(*inject(&insisted, &mut files).unwrap()[0].vector, [2.0, 0.0]);
}

#[test]
fn captures_become_indices() {
    let capture = |site, layers, positions| {
        let wanted =
            request::Capture { site: Some(site), hook: None, layers, positions, reduce: None };
        captures(&wanted, 5, LIMITS, "capture[0]")
    };
    let (post, logits) = (CaptureSite::ResidPost, CaptureSite::Logits);
    let all = Positions::default;
    let found = capture(post, Some(Layers::All(request::All::All)), all()).unwrap();
    assert_eq!(found.len(), 4);
    assert_eq!((found[3].layer, &found[3].positions[..]), (Some(3), &[0, 1, 2, 3, 4][..]));
    let last = Positions::Named(NamedPositions::Last);
    assert_eq!(capture(logits, None, last).unwrap()[0].positions, [4]);
    let list = |list: &[i64]| Positions::List(list.to_vec());
    assert_eq!(capture(logits, None, list(&[0, -2])).unwrap()[0].positions, [0, 3]);
    let some = || Some(Layers::List(vec![1]));
    refused(capture(logits, some(), all()), &["capture[0].layers", "logits"]);
    refused(capture(post, None, all()), &["capture[0].layers", "resid_post"]);
    refused(capture(post, Some(Layers::List(vec![4])), all()), &["capture[0].layers", "0..=3"]);
    refused(capture(post, some(), list(&[5])), &["capture[0].positions", "-5..=4"]);
    refused(capture(post, some(), list(&[-6])), &["capture[0].positions"]);
    refused(capture(post, some(), list(&[2, 1])), &["ascending"]);
    refused(capture(post, some(), list(&[])), &["no positions"]);
}

/// An injection as JSON, resolved.
fn of_json(text: &str) -> Result<Vec<Injection>> {
    inject(&serde_json::from_str(text).unwrap(), &mut VectorFiles::new(""))
}

#[test]
fn operations_have_their_fields_and_no_others() {
    for good in [
        r#"{"vector": [3, 4], "layer": 1, "op": "project_out"}"#,
        r#"{"vector": [3, 4], "layer": 1, "op": "set", "strength": 2, "keep_norm": true}"#,
        r#"{"vector": [3, 4], "layer": 1, "op": "clamp", "max": 2, "strength_mode": "row"}"#,
        r#"{"vector": [3, 4], "layer": 1, "op": "clamp", "min": -1, "max": 2}"#,
        r#"{"vector": [3, 4], "layer": 1, "op": "replace", "strength": 1}"#,
        r#"{"layer": 1, "op": "scale", "strength": 0, "site": "mlp_out"}"#,
    ] {
        assert_eq!(of_json(good).unwrap().len(), 1, "{good}");
    }
    for (bad, want) in [
        (r#"{"layer": 1, "strength": 2}"#, "add needs a vector"),
        (r#"{"vector": [3, 4], "layer": 1}"#, "add needs a strength"),
        (r#"{"vector": [3, 4], "layer": 1, "strength": 1, "min": 0}"#, "add has no min"),
        (r#"{"vector": [3, 4], "layer": 1, "op": "project_out", "strength": 1}"#, "no strength"),
        (r#"{"vector": [3, 4], "layer": 1, "op": "clamp"}"#, "a min, a max or both"),
        (
            r#"{"vector": [3, 4], "layer": 1, "op": "clamp", "min": 2, "max": 1}"#,
            "min is above max",
        ),
        (r#"{"vector": [3, 4], "layer": 1, "op": "scale", "strength": 2}"#, "scale has no vector"),
        (r#"{"layer": 1, "op": "scale", "strength": 2, "keep_norm": true}"#, "changes nothing"),
        (r#"{"layer": 1, "op": "scale", "strength": 2, "strength_mode": "row"}"#, "strength_mode"),
    ] {
        refused(of_json(bad), &[want, "inject[0]"]);
    }
}

#[test]
fn layers_may_be_ranges() {
    let of = |layer: &str| {
        let all = of_json(&format!(r#"{{"vector": [3, 4], "layer": {layer}, "strength": 1}}"#))?;
        Ok(all.iter().map(|injection| injection.layer).collect::<Vec<_>>())
    };
    assert_eq!(of(r#"{"first": 1, "last": 3}"#).unwrap(), [1, 2, 3]);
    assert_eq!(of(r#""all""#).unwrap(), [0, 1, 2, 3]);
    refused(of(r#"{"first": 3, "last": 1}"#), &["reversed", "inject[0].layer"]);
    refused(of(r#"{"first": 1, "last": 4}"#), &["0..=3"]);
}

#[test]
fn conditions_are_looked_for_somewhere() {
    let of = |when: &str| {
        of_json(&format!(
            r#"{{"vector": [3, 4], "layer": 2, "strength": 1, "when": {{"vector": [1, 0], {when}}}}}"#
        ))
    };
    let found = of(r#""layer": 1, "above": 0.5, "latch": true"#).unwrap();
    let when = found[0].when.as_ref().unwrap();
    assert_eq!((when.above, when.below, when.latch), (0.5, f32::INFINITY, true));
    refused(of(r#""layer": 1"#), &["above, below or both", "inject[0].when"]);
    refused(of(r#""layer": 4, "above": 1"#), &["0..=3", "inject[0].when"]);
}

#[test]
fn points_have_other_programs_names() {
    let of = |point: &str| of_json(&format!(r#"{{"vector": [3, 4], "strength": 1, {point}}}"#));
    let found = of(r#""hook": "blocks.2.hook_attn_out""#).unwrap();
    assert_eq!((found[0].site, found[0].layer), (Site::AttnOut, 2));
    refused(of(r#""hook": "model.layers.2", "layer": 2"#), &["two ways", "inject[0]"]);
    refused(of(r#""hook": "model.layers.2", "site": "resid_mid""#), &["two ways"]);
    refused(of(r#""hook": "model.norm""#), &["captured, not injected", "final_norm"]);
    refused(of(r#""hook": "blocks.4.hook_attn_out""#), &["out of range", "inject[0]: hook"]);
    refused(of(r#""site": "resid_mid""#), &["needs a layer"]);
    let capture =
        |text: &str| captures(&serde_json::from_str(text).unwrap(), 5, LIMITS, "capture[0]");
    let found = capture(r#"{"hook": "hidden_states[4]"}"#).unwrap();
    assert_eq!((found[0].site, found[0].layer), (CaptureSite::FinalNorm, None));
    refused(capture(r#"{"hook": "lm_head", "site": "logits"}"#), &["one point", "capture[0]"]);
    refused(capture("{}"), &["one point"]);
}
