use super::*;

fn header(layers: &[usize]) -> Header {
    Header {
        model_hash: Some("abc".into()),
        site: Some(Site::ResidPost),
        layers: layers.to_vec(),
        recipe: "by hand".into(),
        ..Header::default()
    }
}

fn plain(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn a_set_reads_back_as_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set.safetensors");
    let mut set = VectorSet::new(header(&[3, 7]));
    set.insert("sea", vec![vec![1.0, -2.5, 1e-20], vec![0.1, 0.2, 25_137.0]]).unwrap();
    set.insert("air", vec![vec![0.0, 0.0, 0.0], vec![4.0, 5.0, 6.0]]).unwrap();
    set.save(&path).unwrap();
    let read = VectorSet::load(&path).unwrap();
    assert_eq!(read, set);
    assert_eq!(read.names().collect::<Vec<_>>(), ["air", "sea"]);
    assert_eq!(*read.get("sea", Some(7)).unwrap(), [0.1, 0.2, 25_137.0]);
    let error = read.get("sea", Some(4)).unwrap_err().to_string();
    assert!(error.contains("one of [3, 7]"), "{error}");
    assert!(read.get("sea", None).is_err(), "two layers and none named");
    assert!(read.get("fire", Some(3)).unwrap_err().to_string().contains("air, sea"));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "leftovers");
}

#[test]
fn plain_files_in_three_types() {
    let half_bytes = |b: [[u8; 2]; 2]| b.concat();
    let bytes = plain(&[
        ("flat", Dtype::F32, &[2], floats(&[1.0, 2.0])),
        (
            "half",
            Dtype::F16,
            &[2],
            half_bytes([1.5, -2.0].map(|v| half::f16::from_f32(v).to_le_bytes())),
        ),
        (
            "brain",
            Dtype::BF16,
            &[2],
            half_bytes([3.0, 0.5].map(|v| half::bf16::from_f32(v).to_le_bytes())),
        ),
        ("deep", Dtype::F32, &[2, 2], floats(&[1.0, 2.0, 3.0, 4.0])),
    ]);
    let set = VectorSet::parse(&bytes, "file").unwrap();
    assert_eq!(*set.get("flat", Some(17)).unwrap(), [1.0, 2.0]);
    assert_eq!(*set.get("half", None).unwrap(), [1.5, -2.0]);
    assert_eq!(*set.get("brain", None).unwrap(), [3.0, 0.5]);
    assert_eq!(*set.get("deep", Some(1)).unwrap(), [3.0, 4.0]);
    assert!(set.get("deep", Some(2)).is_err());
    assert_eq!(set.unnamed_layers("deep").unwrap(), Some(2));
    assert_eq!(set.unnamed_layers("flat").unwrap(), None);
}

#[test]
fn bad_files_are_refused() {
    let cases: [(&str, Vec<u8>); 6] = [
        ("not a safetensors file", b"nonsense".to_vec()),
        ("not finite", plain(&[("a", Dtype::F32, &[2], floats(&[1.0, f32::NAN]))])),
        ("shape", plain(&[("a", Dtype::F32, &[1, 1, 1], floats(&[1.0]))])),
        ("type", plain(&[("a", Dtype::I32, &[1], floats(&[1.0]))])),
        ("empty", plain(&[("a", Dtype::F32, &[0], vec![])])),
        (
            "widths",
            plain(&[
                ("a", Dtype::F32, &[1], floats(&[1.0])),
                ("b", Dtype::F32, &[2], floats(&[1.0, 2.0])),
            ]),
        ),
    ];
    for (want, bytes) in cases {
        let error = VectorSet::parse(&bytes, "file").unwrap_err().to_string();
        assert!(error.contains(want), "{want}: {error}");
    }
}

#[test]
fn lying_headers_are_refused() {
    let bytes = floats(&[3.0, 4.0]);
    let parse = |header: &str| {
        let view = TensorView::new(Dtype::F32, vec![2], &bytes).unwrap();
        let metadata = HashMap::from([(HEADER_KEY.to_owned(), header.to_owned())]);
        let file = safetensors::serialize([("a", view)], Some(metadata)).unwrap();
        VectorSet::parse(&file, "file").map_err(|error| error.to_string())
    };
    let good = r#"{"format":1,"layers":[5],"recipe":"","norms":{"a":[5.0]}}"#;
    assert_eq!(*parse(good).unwrap().get("a", Some(5)).unwrap(), [3.0, 4.0]);
    assert!(parse(&good.replace("[5]", "[5,6]")).unwrap_err().contains("number of layers"));
    assert!(parse(&good.replace("[5.0]", "[6.0]")).unwrap_err().contains("norms"));
    assert!(parse(&good.replace("\"a\"", "\"b\"")).unwrap_err().contains("norms"));
    assert!(parse(&good.replace("[5.0]", "[5.0],\"b\":[1]")).unwrap_err().contains("not there"));
    assert!(parse(&good.replace("\"format\":1", "\"format\":2")).unwrap_err().contains("version"));
    assert!(parse(&good.replace("recipe", "receipt")).unwrap_err().contains("header"));
    assert!(parse("{").unwrap_err().contains("header"));
}

/// A GGUF file with one text, `general.architecture`, and f32 tensors.
fn gguf(architecture: &str, tensors: &[(&str, &[f32])]) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut file = b"GGUF".to_vec();
    file.extend(3_u32.to_le_bytes());
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend(1_u64.to_le_bytes());
    file.extend(text("general.architecture"));
    file.extend(8_u32.to_le_bytes());
    file.extend(text(architecture));
    let mut data: Vec<u8> = Vec::new();
    for (name, values) in tensors {
        file.extend(text(name));
        file.extend(1_u32.to_le_bytes());
        file.extend((values.len() as u64).to_le_bytes());
        file.extend(0_u32.to_le_bytes());
        file.extend((data.len() as u64).to_le_bytes());
        data.extend(floats(values));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.resize(file.len().next_multiple_of(32), 0);
    [file, data].concat()
}

#[test]
fn control_vectors_are_read() {
    let directions: [(&str, &[f32]); 2] =
        [("direction.10", &[5.0, 6.0]), ("direction.9", &[3.0, 4.0])];
    let set = VectorSet::parse(&gguf("controlvector", &directions), "file").unwrap();
    assert_eq!(set.header.layers, [9, 10]);
    assert_eq!(set.header.site, Some(Site::ResidPost));
    assert_eq!(*set.get("direction", Some(9)).unwrap(), [3.0, 4.0]);
    assert_eq!(*set.get("direction", Some(10)).unwrap(), [5.0, 6.0]);
    assert!(set.get("direction", Some(0)).is_err());
    let refused = |architecture, tensors: &[(&str, &[f32])], want: &str| {
        let error = VectorSet::parse(&gguf(architecture, tensors), "file").unwrap_err().to_string();
        assert!(error.contains(want), "{want}: {error}");
    };
    refused("llama", &directions, "not a GGUF control vector");
    refused("controlvector", &[("direction.x", &[1.0])], "direction.LAYER");
    refused("controlvector", &[("direction.1", &[f32::NAN])], "not finite");
    refused("controlvector", &[("direction.1", &[1.0]), ("direction.2", &[1.0, 2.0])], "widths");
    refused("controlvector", &[], "empty");
}
