use crate::request::{GenerateRequest, Message, Sampling};

/// The tones with a description of their own; any other word describes itself.
const TONES: &[(&str, &str)] = &[
    ("friendly", "warm, friendly and close, like a good acquaintance"),
    ("formal", "formal and courteous, without slang or contractions"),
    ("empathetic", "empathetic: first acknowledge how the listener may feel, then say it gently"),
    ("brief", "as brief as possible, without losing a fact"),
];

/// The request that says `text` again in `tone`.
pub(super) fn request(text: &str, tone: &str, sampling: Sampling) -> GenerateRequest {
    let described = TONES.iter().find(|(name, _)| *name == tone).map_or(tone, |(_, description)| description);
    let system = format!(
        "Rewrite the user's text so that its tone is {described}. Keep its language, its meaning and every fact. \
         Answer with the rewritten text only."
    );
    GenerateRequest::chat(vec![Message::system(system), Message::user(text)]).with_sampling(sampling)
}
