//! From a request to the tokens that the model is to continue: template, tokens, and what is done when they are too many.

use llama_cpp_2::token::LlamaToken;
use sarai_core::request::{GenerateRequest, Message, Prompt, Role, Tool, Truncate};

use super::load::Loaded;
use super::template::{self, Conversation, Markers};
use super::tools::{self, Format};
use crate::Error;

/// The part of the context that is kept for the answer where a conversation is cut and the request sets no limit.
const ROOM_FOR_ANSWER: u32 = 4;

/// What a model is to continue.
#[derive(Debug)]
pub(super) struct Tokens {
    pub(super) tokens: Vec<LlamaToken>,
    /// The end of the instructions, where they are at the beginning: other conversations may begin with them, too.
    pub(super) instructions: Option<usize>,
    pub(super) truncated: bool,
}

/// The template's text and its words for the vocabulary's markers, looked up once for a request.
struct Template<'a> {
    loaded: &'a Loaded,
    own: Option<String>,
    markers: Markers,
    tools: &'a [Tool],
    /// Tools for a model whose template does not know them.
    instructions: Option<Message>,
}

/// The format in which a model calls tools.
pub(super) fn tool_format(loaded: &Loaded) -> Format {
    own_template(loaded).as_deref().and_then(Format::of).unwrap_or(Format::Hermes)
}

/// The tokens of a request for a context of `n_ctx`.
pub(super) fn tokens(loaded: &Loaded, request: &GenerateRequest, n_ctx: u32) -> Result<Tokens, Error> {
    let template = Template::new(loaded, &request.tools);
    let fits = |tokens: &[LlamaToken], room: u32| tokens.len() + (room as usize) <= n_ctx as usize;
    let answer = request.sampling.max_tokens.unwrap_or(u32::MAX).clamp(1, n_ctx.div_ceil(ROOM_FOR_ANSWER));
    match &request.prompt {
        Prompt::Raw(text) => {
            let mut tokens = template.tokenize(text)?;
            let truncated = request.truncate == Truncate::Oldest && !fits(&tokens, 1);
            if truncated {
                // The first token of a vocabulary that has one stays at the beginning.
                let first = usize::from(tokens[0] == loaded.model().vocab().bos());
                let kept = (n_ctx - answer) as usize - first;
                tokens.drain(first..tokens.len() - kept);
            }
            Tokens { tokens, instructions: None, truncated }.checked(n_ctx)
        }
        Prompt::Chat(messages) if messages.is_empty() => Err(Error::EmptyPrompt),
        Prompt::Chat(messages) => {
            let whole = template.tokenize(&template.render(messages, true)?)?;
            if fits(&whole, 1) || request.truncate == Truncate::Error {
                let instructions = template.instructions_end(messages, &whole);
                return Tokens { tokens: whole, instructions, truncated: false }.checked(n_ctx);
            }
            let tokens = template.newest(messages, |tokens| fits(tokens, answer))?;
            Tokens { tokens, instructions: None, truncated: true }.checked(n_ctx)
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
    fn new(loaded: &'a Loaded, tools: &'a [Tool]) -> Self {
        let vocab = loaded.model().vocab();
        // A vocabulary without such a token gives -1, which llama.cpp must not be asked about.
        let marker = |token: LlamaToken| {
            let text = if token.0 < 0 { None } else { vocab.text(token) };
            text.map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let own = own_template(loaded);
        let knows_tools = own.as_deref().and_then(Format::of).is_some();
        let instructions =
            (!tools.is_empty() && !knows_tools).then(|| Message::system(tools::instructions(tools)));
        let markers = Markers { bos: marker(vocab.bos()), eos: marker(vocab.eos()) };
        Self { loaded, own, markers, tools: if knows_tools { tools } else { &[] }, instructions }
    }

    fn render(&self, messages: &[Message], to_be_answered: bool) -> Result<String, Error> {
        let with_instructions: Vec<Message>;
        let messages = match &self.instructions {
            Some(instructions) => {
                with_instructions = std::iter::once(instructions).chain(messages).cloned().collect();
                &with_instructions
            }
            None => messages,
        };
        let conversation =
            Conversation { messages, tools: self.tools, markers: &self.markers, to_be_answered };
        Ok(template::render(self.own.as_deref(), &conversation)?)
    }

    fn tokenize(&self, text: &str) -> Result<Vec<LlamaToken>, Error> {
        if text.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        // Many templates begin with the first token that the tokenizer would put there, too.
        let has_bos = !self.markers.bos.is_empty() && text.starts_with(&self.markers.bos);
        let tokens = self.loaded.model().vocab().tokenize(text.as_bytes(), !has_bos, true);
        // A text that the vocabulary has nothing for, such as blanks alone.
        if tokens.is_empty() { Err(Error::EmptyPrompt) } else { Ok(tokens) }
    }

    /// Where the leading instructions end in `whole`, the tokens of all messages. A template that cannot say the
    /// instructions alone leaves it open.
    fn instructions_end(&self, messages: &[Message], whole: &[LlamaToken]) -> Option<usize> {
        let leading = leading(messages);
        if leading == 0 && self.instructions.is_none() {
            return None;
        }
        let tokens = self.tokenize(&self.render(&messages[..leading], false).ok()?).ok()?;
        let common = common(&tokens, whole);
        (common > 0).then_some(common)
    }

    /// The instructions and as many of the newest messages as fit; the last one in any case.
    fn newest(
        &self,
        messages: &[Message],
        fits: impl Fn(&[LlamaToken]) -> bool,
    ) -> Result<Vec<LlamaToken>, Error> {
        let leading = leading(messages).min(messages.len().saturating_sub(1));
        let without = |oldest: usize| {
            let kept: Vec<Message> =
                messages[..leading].iter().chain(&messages[leading + oldest..]).cloned().collect();
            self.tokenize(&self.render(&kept, true)?)
        };
        let most = messages.len() - leading - 1;
        // The more is left out, the shorter it is: the least that is enough, by halving.
        let (mut too_few, mut enough) = (0, most);
        while enough - too_few > 1 {
            let middle = usize::midpoint(too_few, enough);
            // A template may refuse a conversation that begins with an answer; one more is left out then.
            match without(middle) {
                Ok(tokens) if fits(&tokens) => enough = middle,
                Ok(_) | Err(_) => too_few = middle,
            }
        }
        without(enough)
    }
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
