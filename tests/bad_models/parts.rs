//! GGUF models in several files.

use std::fs;

use inkling::model::Model;
use tempfile::TempDir;

use crate::{
    assert_refused,
    gguf::{GgufFile, GgufTensor, entry_text, entry_u32, tensor},
    load,
};

/// The good file as three parts: metadata only, five tensors, six tensors.
fn parts() -> Vec<GgufFile> {
    let good = GgufFile::good();
    let number = good.tensors.len() as u64;
    let part = |index: u64, tensors: &[GgufTensor]| {
        let mut part = GgufFile::good();
        if index > 0 {
            part.metadata.clear();
        }
        part.tensors = tensors.to_vec();
        part.set("split.no", entry_u32("", index).1);
        part.set("split.count", entry_u32("", 3).1);
        part.set("split.tensors.count", entry_u32("", number).1);
        part
    };
    vec![part(0, &[]), part(1, &good.tensors[..5]), part(2, &good.tensors[5..])]
}

fn write(parts: &[GgufFile]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (index, part) in parts.iter().enumerate() {
        let name = format!("tiny-{:05}-of-00003.gguf", index + 1);
        fs::write(folder.path().join(name), part.bytes()).unwrap();
    }
    folder
}

/// The parts with one change are refused, by the first and by the last of them.
fn refused(place: &str, cause: &str, change: impl FnOnce(&mut Vec<GgufFile>)) {
    let mut parts = parts();
    change(&mut parts);
    let folder = write(&parts);
    for name in ["tiny-00001-of-00003.gguf", "tiny-00003-of-00003.gguf"] {
        assert_refused(load(&folder.path().join(name)), place, cause);
    }
}

#[test]
fn a_model_in_parts_is_opened_by_any_of_them_or_their_folder() {
    let folder = write(&parts());
    let all: Vec<Model> = (1..=3)
        .map(|number| folder.path().join(format!("tiny-{number:05}-of-00003.gguf")))
        .chain([folder.path().to_owned()])
        .map(|path| load(&path).unwrap())
        .collect();
    for model in &all {
        assert_eq!(model.name, "tiny-00001-of-00003.gguf");
        assert_eq!(model.hash().unwrap(), all[0].hash().unwrap());
    }
    let whole = TempDir::new().unwrap();
    let path = whole.path().join("tiny.gguf");
    fs::write(&path, GgufFile::good().bytes()).unwrap();
    let whole = load(&path).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let (one, other) = (&whole.checkpoint, &all[0].checkpoint);
    let (one, other) = (one.look_at(name, &[8, 8]).unwrap(), other.look_at(name, &[8, 8]).unwrap());
    let (mut got, mut want) = ([0.0; 8], [0.0; 8]);
    for row in 0..8 {
        one.read_row(row, &mut want);
        other.read_row(row, &mut got);
        assert_eq!(got, want);
    }
    // The hash covers the last part.
    let mut changed = parts();
    changed[2].tensors.last_mut().unwrap().data[0] = 1;
    let changed = write(&changed);
    assert_ne!(load(changed.path()).unwrap().hash().unwrap(), all[0].hash().unwrap());
    assert_ne!(whole.hash().unwrap(), all[0].hash().unwrap());
}

#[test]
fn a_part_alone_is_refused() {
    let folder = write(&parts());
    fs::remove_file(folder.path().join("tiny-00002-of-00003.gguf")).unwrap();
    let missing = "tiny-00002-of-00003.gguf";
    let first = folder.path().join("tiny-00001-of-00003.gguf");
    assert_refused(load(&first), missing, "a part of the model is missing");
    assert_refused(load(folder.path()), missing, "a part of the model is missing");
    let renamed = folder.path().join("renamed.gguf");
    fs::rename(&first, &renamed).unwrap();
    assert_refused(load(&renamed), "renamed.gguf", "-00001-of-00003.gguf");
    // With a file of another model beside them, a folder is no model's.
    let name = folder.path().file_name().unwrap().to_str().unwrap().to_owned();
    assert_refused(load(folder.path()), &name, "2 .gguf files");
}

#[test]
fn parts_that_contradict_each_other_are_refused() {
    let other = "a file is not the part of the model that its name says";
    let last = "tiny-00003-of-00003.gguf: split";
    refused("-00003-of-00003.gguf", "name", |parts| {
        parts[2].set("split.count", entry_u32("", 4).1);
    });
    refused("split.no", "-00003-of-00003.gguf", |parts| {
        parts[2].set("split.no", entry_u32("", 7).1);
    });
    refused("tiny-00002-of-00003.gguf: split.no", other, |parts| {
        parts[1].set("split.no", entry_u32("", 0).1);
    });
    refused("tiny-00002-of-00003.gguf: split.count", "got:      no such key", |parts| {
        parts[1].metadata.clear();
        parts[1].set("split.no", entry_u32("", 1).1);
    });
    refused(last, other, |parts| parts[2].set("split.tensors.count", entry_u32("", 12).1));
    refused("tiny-00002-of-00003.gguf: general.architecture", "got:      qwen2", |parts| {
        parts[1].set("general.architecture", entry_text("", "qwen2").1);
    });
    refused("output_norm.weight", "a tensor stands in two parts", |parts| {
        parts[2].tensors.push(tensor("output_norm.weight", &[8]));
    });
    refused("split.tensors.count", "the parts' tensors are not all", |parts| {
        parts[2].tensors.pop();
    });
    refused("tiny-00002-of-00003.gguf", "not a GGUF file", |parts| parts[1].magic = b"GGML");
}
