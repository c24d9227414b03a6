//! A loaded model that generates text.

use std::sync::Arc;

use async_trait::async_trait;
use sarai_core::backend::{LoadRequest, Model};
use sarai_core::failure::Failure;
use sarai_core::memory::{Footprint, Freed};
use sarai_core::request::{Delta, GenerateRequest, Prompt, TokenStream, TranscribeRequest};
use tokio::sync::mpsc;

use super::GgufSettings;
use super::engine::{Coming, Command, Engine, Sequence};
use super::header::Header;
use super::multimodal::{Medium, Multimodal};
use super::prompt::Media;
use super::sessions::Sessions;
use super::thread::{Resize, Thread, Workplace};
use super::transcribe;
use crate::Error;

/// What an answer can have besides the text of its tokens: what was held back, its end.
const BESIDES_TOKENS: usize = 4;

/// A cheap clone.
#[derive(Clone, Debug)]
pub(super) struct Generator {
    thread: Arc<Thread<Command>>,
    coming: Coming,
}

impl Generator {
    pub(super) async fn load(
        settings: Arc<GgufSettings>,
        header: Header,
        request: LoadRequest,
    ) -> Result<Self, Failure> {
        let coming = Coming::default();
        let seen = coming.clone();
        if header.text("tokenizer.chat_template").is_none() {
            let path = settings.path.display();
            tracing::warn!(%path, "the file has no chat template; conversations are put into ChatML, which the model may not know");
        }
        let thread =
            Thread::start(settings, header, request, move |workplace| work(workplace, &seen)).await?;
        Ok(Self { thread: Arc::new(thread), coming })
    }
}

impl Generator {
    pub(super) fn multimodal(&self) -> Option<&Multimodal> {
        self.thread.multimodal()
    }

    /// Turns the images and audio of a request into what stands for them in its prompt.
    async fn media(&self, request: &GenerateRequest, n_ctx: u32) -> Result<Media, Failure> {
        let mut media = Media::default();
        let Prompt::Chat(messages) = &request.prompt else { return Ok(media) };
        for message in messages {
            let images = message.images.iter().cloned().map(Medium::Image);
            for medium in images.chain(message.audio.iter().cloned().map(Medium::Audio)) {
                let cannot = match &medium {
                    Medium::Image(_) => Error::CannotSee,
                    Medium::Audio(_) => Error::CannotHear,
                };
                let multimodal = self.multimodal().ok_or(cannot)?;
                let pieces = multimodal.encode(medium.clone(), n_ctx as usize).await?;
                media.insert(&medium, pieces);
            }
        }
        Ok(media)
    }
}

fn work(workplace: Workplace<'_, Command>, coming: &Coming) -> Option<Resize> {
    let Workplace { settings, header, shape, loaded, context, growth, commands, stopping } = workplace;
    let sessions = Sessions::open(settings, header, context.n_ctx(), loaded.is_recurrent());
    let engine = Engine::new(loaded, context, sessions, shape, settings.parallel(), growth);
    engine.run(commands, coming, stopping)
}

#[async_trait]
impl Model for Generator {
    fn n_ctx(&self) -> Option<u32> {
        Some(self.thread.n_ctx())
    }

    fn memory(&self) -> Option<Footprint> {
        self.thread.memory()
    }

    fn memory_at_load(&self) -> Option<Footprint> {
        self.thread.memory_at_load()
    }

    async fn resize(&self, n_ctx: u32) -> Result<(), Failure> {
        self.thread.resize(n_ctx, Command::Resize).await
    }

    async fn generate(&self, request: GenerateRequest) -> Result<TokenStream, Failure> {
        let n_ctx = self.thread.n_ctx();
        let media = self.media(&request, n_ctx).await?;
        // Room for all of an answer: the engine never waits for a reader, and an answer is no longer than the context.
        let (deltas, stream) = mpsc::channel(n_ctx as usize + BESIDES_TOKENS);
        let coming = self.coming.announce();
        let prepare = move |loaded: &_| Sequence::prepare(loaded, &request, &media, n_ctx, deltas);
        let sequence = self.thread.with_model(prepare).await?;
        self.thread.send(Command::Answer(Box::new(sequence))).await?;
        drop(coming);
        let gone = self.thread.gone();
        // Up to the end or an error. A stream without either is one whose thread has ended.
        let deltas = futures::stream::unfold(Some((stream, gone)), |open| async {
            let (mut stream, gone) = open?;
            match stream.recv().await {
                Some(Ok(Delta::Text(text))) => Some((Ok(Delta::Text(text)), Some((stream, gone)))),
                Some(end) => Some((end, None)),
                None => Some((Err(gone), None)),
            }
        });
        Ok(Box::pin(deltas))
    }

    async fn transcribe(&self, request: TranscribeRequest) -> Result<TokenStream, Failure> {
        transcribe::transcribe(self, request).await
    }

    async fn unload(&self) -> Option<Freed> {
        self.thread.unload(Command::Stop).await
    }
}
