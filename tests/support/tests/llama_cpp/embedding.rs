//! The embedding models and the classifier.

use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use sarai_support::gguf::{Kind, Model, TensorType};

use crate::{context, load};

/// The pooled result for a text: its embedding, or its labels' scores.
fn pooled(model: &LlamaModel, text: &str) -> Vec<f32> {
    let mut context = context(model, true);
    let tokens = model.vocab().tokenize(text.as_bytes(), true, false);
    let mut batch = LlamaBatch::new(512, 1);
    batch.add_sequence(&tokens, 0, true).unwrap();
    context.decode(&mut batch).unwrap();
    context.embeddings_seq_ith(0).unwrap().to_vec()
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn texts_with_words_in_common_are_closer_than_others() {
    let texts = [
        ("fix the bug in my program", "there is a bug in this program"),
        ("will there be rain or snow tonight?", "is it rain or snow in the city?"),
        ("escribe un poema sobre los perros", "quiero un poema de perros y gatos"),
        ("derive the Lagrangian of a pendulum", "the Lagrangian for a double pendulum"),
    ];
    for kind in [Kind::BertEmbedding, Kind::GemmaEmbedding] {
        for seed in 0..3 {
            let model = load(&Model::new(kind.clone()).seed(seed));
            let vectors = texts.map(|(a, b)| (pooled(&model, a), pooled(&model, b)));
            assert!(vectors.iter().all(|(a, b)| a.len() == 256 && b.len() == 256));
            for (i, (a, b)) in vectors.iter().enumerate() {
                let close = cosine(a, b);
                assert!(close > 0.3, "{kind:?} {seed}: {:?} {close}", texts[i]);
                for (j, (_, other)) in vectors.iter().enumerate().filter(|(j, _)| *j != i) {
                    let far = cosine(a, other);
                    assert!(
                        far + 0.2 < close,
                        "{kind:?} {seed}: {:?} {close}, {:?} {far}",
                        texts[i],
                        texts[j]
                    );
                }
            }
        }
    }
}

#[test]
fn the_width_of_the_embedding_is_as_set() {
    for kind in [Kind::BertEmbedding, Kind::GemmaEmbedding] {
        let model = load(&Model::new(kind).n_embd(192).n_layer(7));
        assert_eq!(pooled(&model, "hello").len(), 192);
    }
}

#[test]
fn the_classifier_prefers_the_label_whose_keyword_occurs() {
    let labels = [
        ("hard", "theorem prueba Código"),
        ("soft", "hello gracias chiste"),
        ("vision", "picture imagen photo"),
    ];
    let labels = labels.map(|(l, k)| (l.to_owned(), k.split(' ').map(str::to_owned).collect())).to_vec();
    for seed in 0..3 {
        let model = load(&Model::new(Kind::BertClassifier { labels: labels.clone() }).seed(seed));
        assert_eq!((model.n_cls_out(), model.n_embd_out()), (3, 3));
        for (text, label) in [
            ("Show me the theorem, please", 0),
            ("escribe código en Rust para ordenar una lista de nombres y de ciudades", 0),
            ("HELLO there, how are you doing?", 1),
            ("¡gracias!", 1),
            ("what do you see in this picture of my house near the sea at night", 2),
            ("una imagen y una photo, hello", 2),
        ] {
            let scores = pooled(&model, text);
            assert_eq!(scores.len(), 3);
            let best = (0..3).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap();
            assert_eq!(best, label, "{text:?} {scores:?}");
            let rest = (0..3).filter(|i| *i != label).map(|i| scores[i]).fold(f32::MIN, f32::max);
            assert!(scores[label] > rest + 0.5, "{text:?} {scores:?}");
        }
        let scores = pooled(&model, "el perro come pan con agua");
        assert!(scores.iter().all(|s| s.abs() < 1.0), "{scores:?}");
    }
}

#[test]
fn words_in_common_show_with_every_type_of_weight() {
    for weights in [TensorType::F32, TensorType::F16, TensorType::Q8_0, TensorType::Q4_0] {
        for kind in [Kind::BertEmbedding, Kind::GemmaEmbedding] {
            let model = load(&Model::new(kind.clone()).weights(weights));
            let text = pooled(&model, "the quiet garden by night");
            let close = cosine(&text, &pooled(&model, "a garden at night"));
            let far = cosine(&text, &pooled(&model, "play some music"));
            assert!(close > far + 0.3, "{kind:?} {weights:?}: {close} {far}");
        }
    }
}

#[test]
fn a_bert_text_lies_between_the_markers_of_its_vocabulary() {
    let model = load(&Model::new(Kind::BertEmbedding));
    let vocab = model.vocab();
    let tokens = vocab.tokenize("Música, código".as_bytes(), true, false);
    let pieces: Vec<String> =
        tokens.iter().map(|t| vocab.text(*t).unwrap().to_str().unwrap().to_owned()).collect();
    assert_eq!(pieces, ["[CLS]", "▁musica", "▁,", "▁codigo", "[SEP]"]);
}
