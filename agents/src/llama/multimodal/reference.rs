//! The same prompt with an image and audio, computed by steps of the engine's kind and by the library's own helper.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::mtmd::{MtmdBitmap, MtmdContext, MtmdContextParams, MtmdInputText, mtmd_default_marker};
use llama_cpp_2::token::LlamaToken;
use sarai_core::backend::LoadRequest;
use sarai_core::config::Context as ContextLength;
use sarai_core::memory::Estimate;
use sarai_core::request::Capability;
use sarai_support::gguf::{Kind, Model, Projector};

use super::super::GgufSettings;
use super::super::context::{Batch, Context, Step};
use super::super::engine::{Layout, Next};
use super::super::estimate;
use super::super::header::Header;
use super::super::load::Loaded;
use super::super::runtime;
use super::embedded::Piece;
use super::mtmd::{Mtmd, Seen};
use crate::media::{Picture, Sound};

const N_CTX: u32 = 2048;
const WIDTH: u32 = 192;

struct Case {
    _folder: tempfile::TempDir,
    settings: GgufSettings,
    mmproj: PathBuf,
    loaded: Arc<Loaded>,
}

impl Case {
    fn new(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (path, mmproj) = (folder.path().join("model.gguf"), folder.path().join("mmproj.gguf"));
        Model::new(kind).write_to(&path).unwrap();
        Projector::new(WIDTH).write_to(&mmproj).unwrap();
        let settings = GgufSettings {
            context: ContextLength::Fixed(N_CTX),
            threads: Some(1),
            ..GgufSettings::new(&path, Capability::Generate)
        };
        let request = LoadRequest::new(Estimate::default());
        let loaded = Loaded::load(&settings, false, &request).unwrap().0;
        Self { _folder: folder, settings, mmproj, loaded }
    }

    fn picture() -> Picture {
        let (width, height) = (168, 112);
        let rgb = (0..width * height * 3).map(|n| (n * 7 % 251) as u8).collect();
        Picture { width, height, rgb }
    }

    fn sound() -> Sound {
        Sound { samples: (0..16_000).map(|n| (n as f32 * 0.2).sin() * 0.4).collect(), rate: 16_000 }
    }

    /// The scores after the whole prompt, and the position of what comes next, by the library's helper.
    fn by_the_library(&self) -> (Vec<f32>, usize) {
        let backend = runtime::backend().unwrap();
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(N_CTX))
            .with_n_batch(512)
            .with_n_threads(1)
            .with_n_threads_batch(1);
        let mut context = self.loaded.model().new_context(backend, params).unwrap();
        let params = MtmdContextParams { n_threads: 1, print_timings: false, ..MtmdContextParams::default() };
        let mut mtmd =
            MtmdContext::init_from_file(self.mmproj.to_str().unwrap(), self.loaded.model(), &params).unwrap();
        let Picture { width, height, rgb } = Self::picture();
        let image = MtmdBitmap::from_image_data(width, height, &rgb).unwrap();
        let audio = MtmdBitmap::from_audio_data(&Self::sound().samples).unwrap();
        let marker = mtmd_default_marker();
        let text = format!("the dog {marker} and the cat {marker} are here");
        let text = MtmdInputText { text, add_special: true, parse_special: true };
        let chunks = mtmd.tokenize(text, &[&image, &audio]).unwrap();
        let next = chunks.eval_chunks(&mut mtmd, &mut context, 0, 0, 512, true).unwrap();
        (context.get_logits_ith(-1).to_vec(), usize::try_from(next).unwrap())
    }

    /// The same in steps of at most so many tokens; on purpose, with the picture so many positions too late.
    fn by_steps(&self, most: usize, late: usize) -> (Vec<f32>, usize) {
        let mut mtmd = Mtmd::load(&self.mmproj, &self.loaded, (1, 512), false).unwrap();
        let vocab = self.loaded.model().vocab();
        let (mut tokens, mut layout): (Vec<LlamaToken>, _) = (Vec::new(), Layout::default());
        let media = [Seen::Picture(Self::picture()), Seen::Sound(Self::sound())];
        let texts = [" and the cat ", " are here"];
        tokens.extend(vocab.tokenize(b"the dog ", true, true));
        for (seen, text) in media.iter().zip(texts) {
            for piece in mtmd.encode(seen, 1, |_| Ok(())).unwrap() {
                match piece {
                    Piece::Tokens(marker) => tokens.extend(marker),
                    Piece::Embedded(embedded) => {
                        layout.place(tokens.len(), &embedded);
                        tokens.extend(embedded.stand_ins());
                    }
                }
            }
            tokens.extend(vocab.tokenize(text.as_bytes(), false, true));
        }
        let header = Header::read(&self.settings.path).unwrap();
        let shape = estimate::shape(&header, &self.settings, N_CTX);
        let mut context = Context::new(&self.loaded, &shape).unwrap();
        let (mut computed, mut batch, mut row) = (0, Batch::default(), None);
        while computed < tokens.len() {
            batch.clear();
            let end = match layout.next(computed) {
                Next::Tokens(until) => until.min(tokens.len()).min(computed + most),
                Next::Embedded { embedded, done } => {
                    let end = embedded.len().min(done + most);
                    let from = layout.position(computed - done) + late;
                    batch.push_embedded(embedded, done..end, from, 3, false);
                    computed + end - done
                }
            };
            if batch.len() == 0 {
                for at in computed..end {
                    let position = layout.position(at) + if at > 20 { late } else { 0 };
                    row = Some(batch.push(tokens[at], position, 3, at + 1 == tokens.len()));
                }
            }
            assert_eq!(context.decode(&batch, &|| false).unwrap(), Step::Done);
            computed = end;
        }
        (context.logits(row.unwrap()).unwrap().to_vec(), layout.position(tokens.len()))
    }
}

#[test]
fn images_and_audio_stand_where_the_librarys_own_helper_puts_them() {
    let off = |expected: &[f32], found: &[f32]| {
        expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    for kind in [Kind::Qwen2Vl, Kind::Llama, Kind::Lfm2] {
        let case = Case::new(kind.clone());
        let (expected, next) = case.by_the_library();
        // The same steps as the helper's compute the same; smaller ones round otherwise.
        for (most, tolerance) in [(500, 1e-4), (17, 0.15)] {
            let (found, after) = case.by_steps(most, 0);
            assert_eq!(after, next, "{kind:?}");
            let off = off(&expected, &found);
            assert!(off < tolerance, "{kind:?} in steps of {most}: off by {off}");
        }
    }
    let case = Case::new(Kind::Qwen2Vl);
    let late = off(&case.by_the_library().0, &case.by_steps(500, 1).0);
    assert!(late > 0.01, "one position more makes no difference: {late}");
}

#[test]
fn a_file_that_is_no_projector_is_an_error() {
    let case = Case::new(Kind::Llama);
    let load = |path: &Path| Mtmd::load(path, &case.loaded, (1, 512), false).map(drop);
    assert!(load(&case.settings.path).is_err());
    assert!(load(Path::new("no-such-file.gguf")).is_err());
}
