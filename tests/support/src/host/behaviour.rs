use std::time::Duration;

/// What the host does with requests for text or vectors; the other paths always work, except where stated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Answers.
    Normal,
    /// Takes every connection and never says a word, on any path.
    BlackHole,
    /// Answers with this status and body.
    Status(u16, String),
    /// Answers with this status and body, and asks to be left alone for so many seconds.
    RetryAfter(u16, u64),
    /// Answers with this status, and never sends the body it announces.
    StatusWithoutBody(u16),
    /// Answers 200 with a page, as a proxy does.
    Html,
    /// Answers with a redirect to this address.
    Redirect(String),
    /// Takes so long for the first token, as a model that reads its prompt does.
    Thinks(Duration),
    /// Says nothing until [`Host::release`] is called.
    SlowFirstByte,
    /// Closes the connection in the middle of the answer, after so many tokens.
    CutAfter(usize),
    /// Ends the answer with an error line, after so many tokens.
    ErrorLineAfter(usize, String),
    /// Ends the answer properly, after so many tokens, but without `done`.
    EndWithoutDone(usize),
    /// Goes silent after so many tokens, until [`Host::release`] is called.
    StallAfter(usize),
    /// Sends the answer byte by byte: lines and characters come in pieces.
    Drip,
    /// Brings the last word in the line that ends the answer.
    LastWordWithEnd,
    /// Sends all lines at once.
    Lump,
    /// Sends a line of so many bytes.
    HugeLine(usize),
    /// Refuses requests that say anything about thinking, as old models do.
    NoThinking,
    /// Answers the first request of a connection, and hangs up on the next.
    HangUpOnReuse,
    /// Does not have the model.
    NoModel,
    /// Writes its counts as texts, and more fields than are known.
    OddNumbers,
    /// Sends bytes that are no UTF-8 in the place of the second token.
    BadText,
    /// Calls the tool `weather` for Madrid.
    Calls,
}
