//! Speech to text by a model that hears and converses: each window of a recording is put to it with an instruction, and what it
//! says of them is joined.

use std::time::Duration;

use futures::{Stream, StreamExt};
use sarai_core::audio::Audio;
use sarai_core::backend::Model;
use sarai_core::failure::{Failure, FailureKind};
use sarai_core::request::{
    Completion, Delta, FinishReason, GenerateRequest, Message, Sampling, TokenStream, TranscribeRequest,
};

use super::generator::Generator;
use crate::Error;
use crate::media::{Sound, cut, sound};

/// What a model hears at once: Whisper's encoder, which most of them have, reads half a minute.
const WINDOW: Duration = Duration::from_secs(30);
/// Windows that are on their way together: while one is written down, the next one's embeddings are made.
const AHEAD: usize = 2;
const INSTRUCTION: &str = "Transcribe the audio";

/// Writes down what is said in a recording.
pub(super) async fn transcribe(
    model: &Generator,
    request: TranscribeRequest,
) -> Result<TokenStream, Failure> {
    let multimodal = model.multimodal().ok_or(Error::CannotHear)?;
    let rate = multimodal.sample_rate()?;
    let instruction = instruction(&request);
    let sampling =
        Sampling { temperature: request.sampling.temperature.or(Some(0.0)), ..request.sampling.clone() };
    let read = move || {
        let sound = sound::decode(&request.audio, rate)?;
        windows(&sound)
    };
    let windows = super::blocking(read).await?;
    let model = model.clone();
    let asked = move |window: Audio| {
        let message = Message::user(instruction.clone()).with_audio(vec![window]);
        let request = GenerateRequest::chat(vec![message]).with_sampling(sampling.clone());
        let model = model.clone();
        async move { model.generate(request).await }
    };
    let parts = futures::stream::iter(windows).map(asked).buffered(AHEAD);
    Ok(Box::pin(joined(parts)))
}

/// The parts of a recording that are not silent, each as audio of its own.
fn windows(sound: &Sound) -> Result<Vec<Audio>, Error> {
    let windows = cut::windows(&sound.samples, sound.rate, WINDOW)?;
    windows.into_iter().map(|window| wav(&sound.samples[window], sound.rate)).collect()
}

fn instruction(request: &TranscribeRequest) -> String {
    match (&request.prompt, &request.language) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(language)) => format!("{INSTRUCTION}. Its language is {language}."),
        (None, None) => format!("{INSTRUCTION}."),
    }
}

/// One stream of all parts, one after another: the texts with a blank between them, and one end.
fn joined(
    parts: impl Stream<Item = Result<TokenStream, Failure>> + Send + 'static,
) -> impl Stream<Item = Result<Delta, Failure>> + Send {
    let state = Joined {
        parts: Box::pin(parts),
        part: None,
        held: String::new(),
        begun: (false, false),
        whole: None,
    };
    futures::stream::unfold(Some(state), |state| async {
        let mut state = state?;
        match state.next().await {
            Ok(Delta::Text(text)) => Some((Ok(Delta::Text(text)), Some(state))),
            end => Some((end, None)),
        }
    })
}

struct Joined<P> {
    parts: std::pin::Pin<Box<P>>,
    part: Option<TokenStream>,
    /// White space that is held back until text follows.
    held: String,
    /// Whether the present part has said something, and whether any has.
    begun: (bool, bool),
    whole: Option<Completion>,
}

impl<P: Stream<Item = Result<TokenStream, Failure>>> Joined<P> {
    async fn next(&mut self) -> Result<Delta, Failure> {
        loop {
            let Some(part) = &mut self.part else {
                match self.parts.next().await {
                    Some(part) => self.part = Some(part?),
                    None => return Ok(Delta::Done(self.end())),
                }
                continue;
            };
            let cut_off =
                || Failure::new(FailureKind::CutOff, "a part of the recording was not written to its end");
            match part.next().await.ok_or_else(cut_off)?? {
                Delta::Text(text) => {
                    if let Some(text) = self.say(&text) {
                        return Ok(Delta::Text(text));
                    }
                }
                Delta::Done(completion) => {
                    self.part = None;
                    self.add(completion);
                }
            }
        }
    }

    /// What of a part's text can be said now: without white space at the part's beginning and end, of which one blank comes
    /// between two parts.
    fn say(&mut self, text: &str) -> Option<String> {
        let (in_part, ever) = self.begun;
        let text = if in_part { text } else { text.trim_start() };
        let body = text.trim_end();
        let after = &text[body.len()..];
        if body.is_empty() {
            self.held.push_str(after);
            return None;
        }
        self.begun = (true, true);
        let before = std::mem::replace(&mut self.held, after.to_owned());
        Some(if ever && !in_part { format!(" {body}") } else { before + body })
    }

    /// A part has ended.
    fn add(&mut self, completion: Completion) {
        self.held.clear();
        self.begun.0 = false;
        let Some(whole) = &mut self.whole else {
            self.whole = Some(completion);
            return;
        };
        let sum = |a: Option<u32>, b: Option<u32>| Some(a?.saturating_add(b?));
        whole.prompt_tokens = sum(whole.prompt_tokens, completion.prompt_tokens);
        whole.cached_tokens = sum(whole.cached_tokens, completion.cached_tokens);
        whole.completion_tokens = sum(whole.completion_tokens, completion.completion_tokens);
        whole.decode_time = whole.decode_time.zip(completion.decode_time).map(|(a, b)| a + b);
        whole.truncated |= completion.truncated;
        if completion.finish_reason == FinishReason::Length {
            whole.finish_reason = FinishReason::Length;
        }
    }

    fn end(&mut self) -> Completion {
        self.whole.take().unwrap_or(Completion::new(FinishReason::Stop))
    }
}

/// Samples as a WAV file of 32-bit floats with one channel, which reads back as the very same samples.
fn wav(samples: &[f32], rate: u32) -> Result<Audio, Error> {
    /// `WAVE_FORMAT_IEEE_FLOAT`.
    const FLOAT: u16 = 3;
    let too_long = || Error::Compute { reason: "a window of audio is too long".to_owned() };
    let bytes = u32::try_from(size_of_val(samples)).map_err(|_| too_long())?;
    let mut file = Vec::with_capacity(44 + size_of_val(samples));
    file.extend(b"RIFF");
    file.extend((36 + bytes).to_le_bytes());
    file.extend(b"WAVEfmt ");
    file.extend(16_u32.to_le_bytes());
    file.extend([FLOAT, 1].map(u16::to_le_bytes).concat());
    file.extend([rate, rate * 4].map(u32::to_le_bytes).concat());
    file.extend([4_u16, 32].map(u16::to_le_bytes).concat());
    file.extend(b"data");
    file.extend(bytes.to_le_bytes());
    file.extend(samples.iter().flat_map(|sample| sample.to_le_bytes()));
    Audio::new(file).map_err(|_| too_long())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(texts: &[&str], tokens: u32, reason: FinishReason) -> Result<TokenStream, Failure> {
        let end = Completion { completion_tokens: Some(tokens), ..Completion::new(reason) };
        let texts: Vec<_> = texts.iter().map(|text| Ok(Delta::Text((*text).to_owned()))).collect();
        Ok(futures::stream::iter(texts).chain(futures::stream::iter([Ok(Delta::Done(end))])).boxed())
    }

    async fn said(parts: Vec<Result<TokenStream, Failure>>) -> (String, Result<Completion, FailureKind>) {
        let mut all = Box::pin(joined(futures::stream::iter(parts)));
        let mut text = String::new();
        loop {
            match all.next().await {
                Some(Ok(Delta::Text(more))) => text.push_str(&more),
                Some(Ok(Delta::Done(end))) => return (text, Ok(end)),
                Some(Err(failure)) => return (text, Err(failure.kind)),
                None => panic!("no end"),
            }
        }
    }

    #[tokio::test]
    async fn parts_are_joined_by_one_blank_and_counted_together() {
        let parts = vec![
            part(&[" Hello", " there.", " \n"], 3, FinishReason::Stop),
            part(&["  "], 1, FinishReason::Length),
            part(&["\nHow", " are you?"], 4, FinishReason::Stop),
        ];
        let (text, end) = said(parts).await;
        let end = end.unwrap();
        assert_eq!(text, "Hello there. How are you?");
        assert_eq!((end.completion_tokens, end.finish_reason), (Some(8), FinishReason::Length));
    }

    #[tokio::test]
    async fn a_part_that_fails_ends_it_with_that() {
        let failure = || Failure::new(FailureKind::Engine, "on purpose");
        let parts = vec![part(&["Hello"], 1, FinishReason::Stop), Err(failure())];
        let (text, end) = said(parts).await;
        assert_eq!((text.as_str(), end.err()), ("Hello", Some(FailureKind::Engine)));
        let cut: TokenStream = futures::stream::iter([Ok(Delta::Text("Hel".to_owned()))]).boxed();
        assert_eq!(said(vec![Ok(cut)]).await.1.err(), Some(FailureKind::CutOff));
    }

    #[test]
    fn a_window_reads_back_as_the_same_samples() {
        let samples: Vec<f32> = (0..16_000).map(|n| (n as f32 * 0.1).sin() * 0.3).collect();
        let read = sound::decode(&wav(&samples, 16_000).unwrap(), 16_000).unwrap();
        assert_eq!((read.rate, read.samples), (16_000, samples));
    }
}
