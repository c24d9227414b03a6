//! From a request to the tokens that the model is to continue: template, tokens, what stands in for images and audio, and what
//! is done when they are too many.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;

use llama_cpp_2::token::LlamaToken;
use sarai_core::request::{GenerateRequest, Message, Prompt, Role, Tool, Truncate};

use super::engine::Layout;
use super::load::Loaded;
use super::multimodal::{Medium, Piece, Pieces};
use super::template::{self, Conversation, Markers};
use super::tools::{self, Format};
use crate::Error;

/// The part of the context that is kept for the answer where a conversation is cut and the request sets no limit.
const ROOM_FOR_ANSWER: u32 = 4;

/// What a model is to continue.
#[derive(Debug)]
pub(super) struct Tokens {
    pub(super) tokens: Vec<LlamaToken>,
    /// What some of them stand in for.
    pub(super) layout: Layout,
    /// How many of them, at the end, are the beginning of the answer.
    pub(super) prefill: usize,
    /// The end of the instructions, where they are at the beginning: other conversations may begin with them, too.
    pub(super) instructions: Option<usize>,
    pub(super) truncated: bool,
}

/// What stands in a prompt for the images and audio of a request's messages.
#[derive(Clone, Debug, Default)]
pub(super) struct Media(BTreeMap<usize, Pieces>);

impl Media {
    /// Notes what stands for one of them.
    pub(super) fn insert(&mut self, medium: &Medium, pieces: Pieces) {
        self.0.insert(Self::key(medium.bytes()), pieces);
    }

    /// What stands for each image and audio of these messages, in their order.
    fn of(&self, messages: &[Message]) -> Result<Vec<&Pieces>, Error> {
        let mut all = Vec::new();
        for message in messages {
            for image in &message.images {
                all.push(self.0.get(&Self::key(image.bytes())).ok_or(Error::CannotSee)?);
            }
            for audio in &message.audio {
                all.push(self.0.get(&Self::key(audio.bytes())).ok_or(Error::CannotHear)?);
            }
        }
        Ok(all)
    }

    /// Clones of an image or audio share their bytes: as long as the request lives, their place tells them apart.
    fn key(bytes: &[u8]) -> usize {
        bytes.as_ptr().addr()
    }
}

/// Stands in the template's text for an image or audio. Nobody can write it by chance or on purpose: a part of it is random.
fn medium() -> &'static str {
    static MEDIUM: OnceLock<String> = OnceLock::new();
    MEDIUM.get_or_init(|| format!("<|medium-{:016x}|>", RandomState::new().hash_one(0)))
}

/// The template's text and its words for the vocabulary's markers, looked up once for a request.
struct Template<'a> {
    loaded: &'a Loaded,
    own: Option<String>,
    markers: Markers,
    tools: &'a [Tool],
    /// Tools for a model whose template does not know them.
    instructions: Option<String>,
    /// The beginning of the answer.
    prefill: &'a str,
    media: &'a Media,
}

/// A prompt's tokens on their way to [`Tokens`].
#[derive(Debug)]
struct Begun {
    tokens: Vec<LlamaToken>,
    layout: Layout,
    /// How many of the tokens, at the end, are the answer's.
    prefill: usize,
}

/// The format in which a model calls tools.
pub(super) fn tool_format(loaded: &Loaded) -> Format {
    own_template(loaded).as_deref().and_then(Format::of).unwrap_or(Format::Hermes)
}

/// The tokens of a request for a context of `n_ctx`, and of what has been said of its answer.
pub(super) fn tokens(
    loaded: &Loaded,
    request: &GenerateRequest,
    said: &str,
    media: &Media,
    n_ctx: u32,
) -> Result<Tokens, Error> {
    let template = Template::new(loaded, &request.tools, said, media);
    let fits = |tokens: &[LlamaToken], room: u32| tokens.len() + (room as usize) <= n_ctx as usize;
    let answer = request.sampling.max_tokens.unwrap_or(u32::MAX).clamp(1, n_ctx.div_ceil(ROOM_FOR_ANSWER));
    match &request.prompt {
        Prompt::Raw(text) => {
            let Begun { mut tokens, layout, prefill } = template.begun(text, Vec::new())?;
            let truncated = request.truncate == Truncate::Oldest && !fits(&tokens, 1);
            if truncated {
                // The first token of a vocabulary that has one stays at the beginning.
                let first = usize::from(tokens[0] == loaded.model().vocab().bos());
                let kept = (n_ctx - answer) as usize - first;
                tokens.drain(first..tokens.len() - kept);
            }
            // Of what has been said, too, the beginning may have gone.
            let prefill = prefill.min(tokens.len());
            Tokens { tokens, layout, prefill, instructions: None, truncated }.checked(n_ctx)
        }
        Prompt::Chat(messages) if messages.is_empty() => Err(Error::EmptyPrompt),
        Prompt::Chat(messages) => {
            let whole = template.conversation(messages)?;
            if fits(&whole.tokens, 1) || request.truncate == Truncate::Error {
                let instructions = template.instructions_end(messages, &whole.tokens);
                let Begun { tokens, layout, prefill } = whole;
                return Tokens { tokens, layout, prefill, instructions, truncated: false }.checked(n_ctx);
            }
            let Begun { tokens, layout, prefill } =
                template.newest(messages, |tokens| fits(tokens, answer))?;
            Tokens { tokens, layout, prefill, instructions: None, truncated: true }.checked(n_ctx)
        }
    }
}

impl Tokens {
    fn checked(self, n_ctx: u32) -> Result<Self, Error> {
        if self.tokens.len() < n_ctx as usize {
            return Ok(self);
        }
        Err(Error::PromptTooLong { tokens: self.tokens.len(), n_ctx })
    }
}

impl<'a> Template<'a> {
    fn new(loaded: &'a Loaded, tools: &'a [Tool], prefill: &'a str, media: &'a Media) -> Self {
        let vocab = loaded.model().vocab();
        // A vocabulary without such a token gives -1, which llama.cpp must not be asked about.
        let marker = |token: LlamaToken| {
            let text = if token.0 < 0 { None } else { vocab.text(token) };
            text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let own = own_template(loaded);
        let knows_tools = own.as_deref().and_then(Format::of).is_some();
        let instructions = (!tools.is_empty() && !knows_tools).then(|| tools::instructions(tools));
        let markers = Markers { bos: marker(vocab.bos()), eos: marker(vocab.eos()) };
        let tools = if knows_tools { tools } else { &[] };
        Self { loaded, own, markers, tools, instructions, prefill, media }
    }

    /// The tokens of a conversation that is to be answered, and of the answer's beginning.
    fn conversation(&self, messages: &[Message]) -> Result<Begun, Error> {
        self.begun(&self.render(messages, true)?, self.media.of(messages)?)
    }

    /// The tokens of a prompt and of the answer's beginning. The two are cut into tokens apart, as they were when the answer
    /// began: a model does not write a token that begins in its prompt.
    fn begun(&self, prompt: &str, media: Vec<&Pieces>) -> Result<Begun, Error> {
        let (mut tokens, layout) = self.tokenize(prompt, media)?;
        let said = self.tokens_after_a_line(self.prefill);
        tokens.extend_from_slice(&said);
        Ok(Begun { tokens, layout, prefill: said.len() })
    }

    /// The tokens of a text that is no beginning: some vocabularies put a blank before the first word of a text, so the end of a
    /// line is put there, and taken off again.
    fn tokens_after_a_line(&self, text: &str) -> Vec<LlamaToken> {
        if text.is_empty() {
            return Vec::new();
        }
        let vocab = self.loaded.model().vocab();
        let tokens = |text: &str| vocab.tokenize(text.as_bytes(), false, false);
        let (line, both) = (tokens("\n"), tokens(&format!("\n{text}")));
        // A text that begins with blanks may have become one token with it.
        both.strip_prefix(line.as_slice()).map_or_else(|| tokens(text), <[LlamaToken]>::to_vec)
    }

    fn render(&self, messages: &[Message], to_be_answered: bool) -> Result<String, Error> {
        let with_instructions: Vec<Message>;
        let messages = match &self.instructions {
            Some(instructions) => {
                with_instructions = with(messages, instructions);
                &with_instructions
            }
            None => messages,
        };
        let conversation = Conversation {
            messages,
            tools: self.tools,
            markers: &self.markers,
            medium: medium(),
            to_be_answered,
        };
        Ok(template::render(self.own.as_deref(), &conversation)?)
    }

    /// The tokens of a text, with what stands for images and audio at their places in it.
    fn tokenize(&self, text: &str, media: Vec<&Pieces>) -> Result<(Vec<LlamaToken>, Layout), Error> {
        if text.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let mut parts: Vec<&str> = if media.is_empty() { vec![text] } else { text.split(medium()).collect() };
        if parts.len() != media.len() + 1 {
            return Err(Error::TemplateDropsMedia { there: media.len(), kept: parts.len() - 1 });
        }
        let (mut tokens, mut layout) = (Vec::new(), Layout::default());
        let first = parts.remove(0);
        // Many templates begin with the first token that the tokenizer would put there, too.
        let has_bos = !self.markers.bos.is_empty() && first.starts_with(&self.markers.bos);
        let vocab = self.loaded.model().vocab();
        tokens.extend(vocab.tokenize(first.as_bytes(), !has_bos, true));
        for (pieces, text) in media.into_iter().zip(parts) {
            for piece in pieces.iter() {
                match piece {
                    Piece::Tokens(marker) => tokens.extend_from_slice(marker),
                    Piece::Embedded(embedded) => {
                        layout.place(tokens.len(), embedded);
                        tokens.extend(embedded.stand_ins());
                    }
                }
            }
            tokens.extend(vocab.tokenize(text.as_bytes(), false, true));
        }
        // A text that the vocabulary has nothing for, such as blanks alone.
        if tokens.is_empty() { Err(Error::EmptyPrompt) } else { Ok((tokens, layout)) }
    }

    /// Where the leading instructions end in `whole`, the tokens of all messages. A template that cannot say the
    /// instructions alone leaves it open.
    fn instructions_end(&self, messages: &[Message], whole: &[LlamaToken]) -> Option<usize> {
        let leading = leading(messages);
        if leading == 0 && self.instructions.is_none() {
            return None;
        }
        let leading = &messages[..leading];
        let media = self.media.of(leading).ok()?;
        let (tokens, _) = self.tokenize(&self.render(leading, false).ok()?, media).ok()?;
        let common = common(&tokens, whole);
        (common > 0).then_some(common)
    }

    /// The instructions and as many of the newest turns as fit, each of them whole: templates may insist that roles
    /// alternate. Of the last turn, where that is too long alone, the question and the newest of what followed on it.
    fn newest(&self, messages: &[Message], fits: impl Fn(&[LlamaToken]) -> bool) -> Result<Begun, Error> {
        let shorter = shorter(messages);
        let begun = |at: usize| self.conversation(&shorter[at].of(messages));
        // The more is left out, the shorter it is: the least that is enough, by halving.
        let (mut enough, mut most) = (0, shorter.len() - 1);
        while enough < most {
            let middle = usize::midpoint(enough, most);
            if fits(&begun(middle)?.tokens) {
                most = middle;
            } else {
                enough = middle + 1;
            }
        }
        begun(enough)
    }
}

/// Messages with instructions in their leading system message: many templates take one and no more.
fn with(messages: &[Message], instructions: &str) -> Vec<Message> {
    match messages {
        [first, rest @ ..] if first.role == Role::System => {
            let merged = Message::system(format!("{}\n\n{instructions}", first.content));
            std::iter::once(&merged).chain(rest).cloned().collect()
        }
        _ => std::iter::once(&Message::system(instructions)).chain(messages).cloned().collect(),
    }
}

/// What is left of a conversation besides its instructions.
#[derive(Clone, Copy, Debug)]
struct Left {
    /// The question of the last turn, where that has lost what followed on it first.
    question: Option<usize>,
    /// All from here on.
    from: usize,
}

impl Left {
    fn of(self, messages: &[Message]) -> Vec<Message> {
        let question = self.question.map(|at| &messages[at]);
        messages[..leading(messages)].iter().chain(question).chain(&messages[self.from..]).cloned().collect()
    }
}

/// What may be left of a conversation: all but its oldest turn, then less and less turns, at last less and less of what
/// followed on the last question. A turn begins with what its user says. Never empty.
fn shorter(messages: &[Message]) -> Vec<Left> {
    let begins = leading(messages);
    let of = |role: Role| (begins..messages.len()).filter(move |at| messages[*at].role == role);
    let question = of(Role::User).next_back();
    let turns = of(Role::User).filter(|at| *at > begins).map(|from| Left { question: None, from });
    let parts = of(Role::Assistant).filter(|from| question.is_some_and(|question| *from > question + 1));
    let all: Vec<Left> = turns.chain(parts.map(|from| Left { question, from })).collect();
    if all.is_empty() { vec![Left { question: None, from: begins }] } else { all }
}

/// Messages at the beginning that are instructions.
fn leading(messages: &[Message]) -> usize {
    messages.iter().take_while(|message| message.role == Role::System).count()
}

/// Tokens that two texts have in common at their beginning.
pub(super) fn common(a: &[LlamaToken], b: &[LlamaToken]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn own_template(loaded: &Loaded) -> Option<String> {
    let own = loaded.model().chat_template(None).ok()?;
    Some(own.as_c_str().to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use sarai_core::request::ToolCall;

    use super::*;

    fn said(messages: &[Message]) -> String {
        messages.iter().map(|message| message.content.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn whole_turns_go_from_the_oldest_and_then_parts_of_the_last_answer() {
        let calls = |text: &str| {
            let call = ToolCall { name: "f".into(), arguments: serde_json::Map::new() };
            Message::assistant(text).with_tool_calls(vec![call])
        };
        let messages = [
            Message::system("sys"),
            Message::assistant("a0"),
            Message::user("u1"),
            Message::assistant("a1"),
            Message::user("u2"),
            calls("c1"),
            Message::tool("f", "t1"),
            calls("c2"),
            Message::tool("f", "t2"),
        ];
        let left = |messages: &[Message]| -> Vec<String> {
            shorter(messages).iter().map(|left| said(&left.of(messages))).collect()
        };
        assert_eq!(left(&messages), ["sys u1 a1 u2 c1 t1 c2 t2", "sys u2 c1 t1 c2 t2", "sys u2 c2 t2"]);
        assert_eq!(left(&[Message::user("u")]), ["u"]);
        assert_eq!(left(&[Message::system("s")]), ["s"]);
    }

    #[test]
    fn instructions_join_the_system_message_that_is_there() {
        let merged = with(&[Message::system("Be brief."), Message::user("Hi")], "Tools: none");
        assert_eq!(merged, [Message::system("Be brief.\n\nTools: none"), Message::user("Hi")]);
        let alone = with(&[Message::user("Hi")], "Tools: none");
        assert_eq!(alone, [Message::system("Tools: none"), Message::user("Hi")]);
    }
}
