//! Vectors that other programs write, and that they read.

use std::{
    collections::HashMap,
    path::Path,
    process::{Command, Output},
};

use inkling::{
    VectorSet,
    engine::vectors::Header,
    request::{Op, Site},
};
use safetensors::{Dtype, tensor::TensorView};

fn plain() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/plain")
}

fn import(from: &Path, out: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inkling"));
    command.arg("vectors").arg("--import").arg(from).arg("--out").arg(out);
    command.arg("--model").arg(plain()).args(more).output().unwrap()
}

fn imported(from: &Path, out: &Path, more: &[&str]) -> String {
    let output = import(from, out, more);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

fn refused(from: &Path, more: &[&str], want: &str) {
    let output = import(from, &from.with_extension("out.safetensors"), more);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains(want), "{want:?} not in {said}");
}

/// A sparse autoencoder of seven features over a width of 48, as `SAELens` keeps it.
fn autoencoder(folder: &Path, config: &str, dtype: Dtype) {
    fs_err::create_dir_all(folder).unwrap();
    fs_err::write(folder.join("cfg.json"), config).unwrap();
    let number = |at: usize| (at % 97) as f32 - 40.0;
    let bytes: Vec<u8> = match dtype {
        Dtype::F32 => (0..7 * 48).flat_map(|at| number(at).to_le_bytes()).collect(),
        _ => (0..7 * 48).flat_map(|at| half::bf16::from_f32(number(at)).to_le_bytes()).collect(),
    };
    let decoder = TensorView::new(dtype, vec![7, 48], &bytes).unwrap();
    let file = safetensors::serialize([("W_dec", decoder)], None).unwrap();
    fs_err::write(folder.join("sae_weights.safetensors"), file).unwrap();
}

#[test]
fn decoder_rows_of_an_autoencoder_are_vectors() {
    let scratch = tempfile::tempdir().unwrap();
    let (folder, out) = (scratch.path().join("sae"), scratch.path().join("set.safetensors"));
    let old =
        r#"{"hook_name": "blocks.2.hook_resid_pre", "hook_layer": 2, "d_in": 48, "d_sae": 7}"#;
    let new = r#"{"d_in": 48, "metadata": {"hook_name": "blocks.1.hook_mlp_out"}}"#;
    for (config, dtype, site, layer) in
        [(old, Dtype::F32, Site::ResidPre, 2), (new, Dtype::BF16, Site::MlpOut, 1)]
    {
        autoencoder(&folder, config, dtype);
        let said = imported(&folder, &out, &["--features", "6,0"]);
        assert!(said.contains("hook_") && said.contains(" is "), "the mapping is told: {said}");
        let set = VectorSet::load(&out).unwrap();
        assert_eq!((set.header.site, &set.header.layers[..]), (Some(site), &[layer][..]));
        assert!(set.header.recipe.contains("sparse autoencoder"), "{}", set.header.recipe);
        assert_eq!(set.names().collect::<Vec<_>>(), ["feature_0", "feature_6"]);
        let row = set.get("feature_6", Some(layer)).unwrap();
        assert!(row.iter().enumerate().all(|(at, v)| *v == ((6 * 48 + at) % 97) as f32 - 40.0));
    }
    refused(&folder, &["--features", "7"], "no such feature");
    refused(&folder, &[], "no features named");
    autoencoder(&folder, r#"{"hook_name": "blocks.1.attn.hook_z"}"#, Dtype::F32);
    refused(&folder, &["--features", "1"], "all heads together");
    autoencoder(&folder, r#"{"hook_name": "blocks.9.hook_resid_pre"}"#, Dtype::F32);
    refused(&folder, &["--features", "1"], "out of range");
    autoencoder(&folder, r#"{"d_in": 48}"#, Dtype::F32);
    refused(&folder, &["--features", "1"], "which point it is of");
    fs_err::remove_file(folder.join("sae_weights.safetensors")).unwrap();
    autoencoder(&scratch.path().join("other"), r#"{"hook_name": "ln_final"}"#, Dtype::F32);
    refused(&scratch.path().join("other"), &["--features", "1"], "no known name");
}

/// A vector goes through every format and is the same; what a format cannot say is refused or told.
#[test]
fn a_vector_goes_through_every_format() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    let rows = |layers: usize| -> Vec<Vec<f32>> {
        (0..layers).map(|layer| (0..48).map(|at| (layer * 50 + at) as f32).collect()).collect()
    };
    let header = Header { site: Some(Site::ResidPost), layers: vec![0, 1, 2], ..Header::default() };
    let mut set = VectorSet::new(Header { operation: Op::ProjectOut, ..header.clone() });
    set.insert("sea", rows(3)).unwrap();
    set.save(&path("set.safetensors")).unwrap();
    let again = VectorSet::load(&path("set.safetensors")).unwrap();
    assert_eq!(again.header.operation, Op::ProjectOut);

    imported(&path("set.safetensors"), &path("sea.npy"), &[]);
    imported(&path("sea.npy"), &path("back.safetensors"), &["--layers", "0,1,2"]);
    let back = VectorSet::load(&path("back.safetensors")).unwrap();
    for layer in 0..3 {
        assert_eq!(back.get("sea", Some(layer)).unwrap(), set.get("sea", Some(layer)).unwrap());
    }
    // Control vectors begin at block 1.
    let said = imported(&path("set.safetensors"), &path("sea.gguf"), &[]);
    assert!(said.contains("begin at block 1") && said.contains("[0]"), "{said}");
    let control = VectorSet::load(&path("sea.gguf")).unwrap();
    assert_eq!(control.header.layers, [1, 2]);
    assert_eq!(control.get("direction", Some(2)).unwrap(), set.get("sea", Some(2)).unwrap());

    let mut first = VectorSet::new(Header { layers: vec![0], ..header.clone() });
    first.insert("sea", rows(1)).unwrap();
    let error = first.save_control_vector(&path("first.gguf"), "llama").unwrap_err().to_string();
    assert!(error.contains("no block of the vector has a place"), "{error}");
    let mut two = VectorSet::new(header);
    two.insert("sea", rows(3)).unwrap();
    two.insert("air", rows(3)).unwrap();
    for error in [
        two.save_control_vector(&path("two.gguf"), "llama").map(drop).unwrap_err(),
        two.save_npy(&path("two.npy")).unwrap_err(),
    ] {
        assert!(error.to_string().contains("2 vectors"), "{error}");
    }
    assert!(!path("two.gguf").exists() && !path("two.npy").exists());
}

/// A file of a version that counts layers in another way is not taken for one that counts as this does.
#[test]
fn layers_that_are_counted_otherwise_are_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("set.safetensors");
    let numbers = vec![0; 4 * 48];
    let write = |numbering: &str| {
        let view = TensorView::new(Dtype::F32, vec![48], &numbers).unwrap();
        let header = format!(
            r#"{{"format": 1, "layers": [], "layer_numbering": "{numbering}", "recipe": "", "norms": {{"sea": [0]}}}}"#
        );
        let metadata = HashMap::from([("inkling.vectors".to_owned(), header)]);
        fs_err::write(&path, safetensors::serialize([("sea", view)], Some(metadata)).unwrap())
            .unwrap();
        VectorSet::load(&path)
    };
    write("block, from 0").unwrap();
    let error = write("hidden_states").unwrap_err().to_string();
    assert!(error.contains("unknown way") && error.contains("from 0"), "{error}");
}
