//! The files as files: reproducible, small, complete or not there.

use sarai_support::gguf::{Damage, Error, Kind, Model, Projector, Tensor, TensorType, Value, Writer};

fn kinds() -> [Kind; 5] {
    let labels = vec![("hard".to_owned(), vec!["theorem".to_owned()]), ("soft".to_owned(), Vec::new())];
    [Kind::Llama, Kind::Lfm2, Kind::BertEmbedding, Kind::BertClassifier { labels }, Kind::GemmaEmbedding]
}

#[test]
fn equal_settings_give_equal_bytes_and_another_seed_gives_others() {
    for kind in kinds() {
        let model = Model::new(kind.clone()).seed(5);
        let bytes = model.to_bytes().unwrap();
        assert!(bytes == model.to_bytes().unwrap(), "{kind:?}");
        assert!(bytes != model.seed(6).to_bytes().unwrap(), "{kind:?}");
    }
}

#[test]
fn a_file_is_below_two_megabytes_by_default() {
    for kind in kinds() {
        let size = Model::new(kind.clone()).to_bytes().unwrap().len();
        assert!((100_000..2_000_000).contains(&size), "{kind:?}: {size}");
    }
}

#[test]
fn dimensions_make_a_larger_file() {
    let model = Model::new(Kind::Llama).n_embd(512).n_head(8).n_ff(1536).n_layer(8);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.gguf");
    model.write_to(&path).unwrap();
    let size = std::fs::metadata(&path).unwrap().len();
    assert!((20_000_000..40_000_000).contains(&size), "{size}");
    assert_eq!(size.div_ceil(1_000_000), model.to_bytes().unwrap().len().div_ceil(1_000_000) as u64);
}

#[test]
fn a_file_replaces_the_one_before_and_leaves_nothing_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let model = Model::new(Kind::BertEmbedding);
    model.write_to(&path).unwrap();
    let model = model.seed(1);
    model.write_to(&path).unwrap();
    assert!(std::fs::read(&path).unwrap() == model.to_bytes().unwrap());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_cannot_be_put_in_place_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("taken");
    std::fs::create_dir_all(path.join("by a folder")).unwrap();
    let error = Model::new(Kind::BertEmbedding).write_to(&path).unwrap_err();
    assert!(matches!(&error, Error::Io { path: named, .. } if *named == path), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_cannot_be_made_is_refused_by_name() {
    let llama = || Model::new(Kind::Llama);
    for (model, name) in [
        (llama().n_embd(100), "n_embd"),
        (llama().n_ff(0), "n_ff"),
        (llama().n_layer(0), "n_layer"),
        (llama().n_head(5), "n_head"),
        (llama().n_head_kv(4), "n_head_kv"),
        (llama().n_ctx_train(0), "n_ctx_train"),
        (llama().n_vocab(10), "n_vocab"),
        (llama().says(["a", "b", "a"]), "says"),
        (Model::new(Kind::Lfm2).n_layer(1), "n_layer"),
        (Model::new(Kind::GemmaEmbedding).n_layer(1), "n_layer"),
        (Model::new(Kind::BertClassifier { labels: Vec::new() }), "labels"),
    ] {
        match model.to_bytes() {
            Err(Error::Setting { name: named, .. }) => assert_eq!(named, name),
            other => panic!("{name}: {:?}", other.map(|bytes| bytes.len())),
        }
    }
}

#[test]
fn labels_and_keywords_that_cannot_work_are_refused() {
    let label = |label: &str, keyword: &str| (label.to_owned(), vec![keyword.to_owned()]);
    for labels in
        [vec![label("a", "two words")], vec![label("a", "数学")], vec![label("a", "x"), label("a", "y")]]
    {
        let error = Model::new(Kind::BertClassifier { labels }).to_bytes().unwrap_err();
        assert!(matches!(error, Error::Label { .. }), "{error}");
    }
}

#[test]
fn every_kind_of_metadata_is_encoded_as_the_format_says() {
    let mut file = Writer::new();
    file.set("a", -2_i16);
    file.set("b", true);
    file.set("c", "é");
    file.set("d", vec![1.5_f64]);
    let mut expected = b"GGUF".to_vec();
    expected.extend(3_u32.to_le_bytes());
    expected.extend(0_u64.to_le_bytes());
    expected.extend(4_u64.to_le_bytes());
    let key = |name: &str| [&1_u64.to_le_bytes(), name.as_bytes()].concat();
    expected.extend([key("a"), vec![3, 0, 0, 0, 0xfe, 0xff]].concat());
    expected.extend([key("b"), vec![7, 0, 0, 0, 1]].concat());
    expected.extend([key("c"), vec![8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0xc3, 0xa9]].concat());
    expected.extend([key("d"), vec![9, 0, 0, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]].concat());
    expected.extend(1.5_f64.to_le_bytes());
    expected.resize(expected.len().next_multiple_of(32), 0);
    assert_eq!(file.to_bytes().unwrap(), expected);
}

#[test]
fn tensors_begin_at_multiples_of_32_and_are_filled_row_by_row() {
    let mut file = Writer::new();
    file.push(Tensor::new("a", [3, 2], TensorType::F32, |row, out| out.fill(row as f32)));
    file.push(Tensor::new("b", [1], TensorType::F16, |_, out| out.fill(-2.0)));
    assert_eq!(file.tensor_bytes().unwrap(), 26);
    let bytes = file.to_bytes().unwrap();
    let numbers: Vec<u8> = [0.0_f32, 0.0, 0.0, 1.0, 1.0, 1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut expected = vec![0; 64];
    expected[..24].copy_from_slice(&numbers);
    expected[32..34].copy_from_slice(&[0, 0xc0]);
    assert_eq!(bytes.len() % 32, 0);
    assert_eq!(bytes[bytes.len() - 64..], expected);
}

#[test]
fn two_tensors_of_one_name_are_refused() {
    let mut file = Writer::new();
    file.push(Tensor::new("a", [1], TensorType::F32, |_, _| {}));
    file.push(Tensor::new("a", [1], TensorType::F32, |_, _| {}));
    assert!(matches!(file.to_bytes(), Err(Error::Tensor { name, .. }) if name == "a"));
}

#[test]
fn setting_a_key_again_replaces_its_value() {
    let mut file = Model::new(Kind::Llama).writer().unwrap();
    file.set("llama.context_length", 9_u32);
    assert_eq!(file.get("llama.context_length"), Some(&Value::U32(9)));
    assert_eq!(file.remove("llama.context_length"), Some(Value::U32(9)));
    assert_eq!(file.get("llama.context_length"), None);
}

#[test]
fn damage_touches_what_it_names_and_nothing_else() {
    let model = Model::new(Kind::Llama);
    let whole = model.to_bytes().unwrap();
    let differing = |damage: Damage| {
        let bytes = model.damaged(&damage).unwrap();
        assert_eq!(bytes.len(), whole.len(), "{damage:?}");
        (0..whole.len()).filter(|i| bytes[*i] != whole[*i]).collect::<Vec<_>>()
    };
    assert_eq!(differing(Damage::Magic), [0, 1, 2, 3]);
    assert_eq!(differing(Damage::Version(2)), [4]);
    assert_eq!(differing(Damage::BlockCount(0)).len(), 1);
    assert_eq!(model.damaged(&Damage::Truncated(50)).unwrap(), whole[..50]);
    let duplicate = model.damaged(&Damage::DuplicateToken).unwrap();
    assert!(duplicate != whole && model.damaged(&Damage::DuplicateToken).unwrap() == duplicate);
}

#[test]
fn numbers_lists_and_shapes_can_be_made_wrong() {
    let projector = Projector::new(128);
    let whole = projector.writer().to_bytes().unwrap();
    let fewer = projector.damaged(&Damage::Shape("a.position_embd.weight".into(), vec![64, 10])).unwrap();
    assert_eq!(whole.len() - fewer.len(), 1490 * 64 * 4);
    let more = projector.damaged(&Damage::Shape("a.blk.0.attn_k.bias".into(), vec![64])).unwrap();
    assert!(more.len() > whole.len());
    let number = projector.damaged(&Damage::Number("clip.vision.block_count".into(), 9)).unwrap();
    assert_eq!((0..whole.len()).filter(|at| whole[*at] != number[*at]).count(), 1);
    let zeros = projector.damaged(&Damage::Zeros("clip.vision.image_mean".into(), 3)).unwrap();
    assert!(zeros.len() == whole.len() && zeros != whole);
}

#[test]
fn damage_to_what_is_not_there_is_an_error() {
    let model = Model::new(Kind::BertEmbedding);
    for damage in [
        Damage::MissingKey("llama.context_length".to_owned()),
        Damage::MissingTensor("output.weight".to_owned()),
        Damage::Truncated(usize::MAX),
    ] {
        assert!(matches!(model.damaged(&damage), Err(Error::Damage(_))), "{damage:?}");
    }
}
