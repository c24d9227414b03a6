//! The rows of the table, a file for each.

mod batch4;
mod cancel;
mod free_running;
mod helper;
mod lease;
mod prefix;
mod second_turn;
mod single;
mod switch;
mod three_same;
mod trio;

use clap::ValueEnum;

use crate::Result;
use crate::args::Bench;
use crate::report::Figure;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Row {
    /// One request at a time: decoding and prompts, against llama-bench
    Single,
    /// Four requests at once on one model, against llama-server -np 4
    Batch4,
    /// SOLAR, LFM2 and a 1B decoding at once, against each alone
    Trio,
    /// Three LFM2 at once, against three llama-servers
    ThreeSame,
    /// Evict a model and load SOLAR, to its first token, against llama-server's start
    Switch,
    /// The second turn of a conversation after a reload, against computing it anew
    SecondTurn,
    /// Eight requests below one system prompt: the prompt tokens that are computed
    Prefix,
    /// Embeddings while language models work, against an idle machine
    Helper,
    /// A cancel during a long prompt, and what chunks cost
    Cancel,
    /// Helper and language models at once with their priorities, against threads that run as they like
    FreeRunning,
    /// A lease of a model that is ready and its release, through the pool
    Lease,
}

impl Row {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Batch4 => "batch4",
            Self::Trio => "trio",
            Self::ThreeSame => "three_same",
            Self::Switch => "switch",
            Self::SecondTurn => "second_turn",
            Self::Prefix => "prefix",
            Self::Helper => "helper",
            Self::Cancel => "cancel",
            Self::FreeRunning => "free_running",
            Self::Lease => "lease",
        }
    }

    pub(crate) async fn measure(self, bench: &Bench) -> Result<Vec<Figure>> {
        match self {
            Self::Single => single::measure(bench).await,
            Self::Batch4 => batch4::measure(bench).await,
            Self::Trio => trio::measure(bench).await,
            Self::ThreeSame => three_same::measure(bench).await,
            Self::Switch => switch::measure(bench).await,
            Self::SecondTurn => second_turn::measure(bench).await,
            Self::Prefix => prefix::measure(bench).await,
            Self::Helper => helper::measure(bench).await,
            Self::Cancel => cancel::measure(bench).await,
            Self::FreeRunning => free_running::measure(bench).await,
            Self::Lease => lease::measure(bench).await,
        }
    }
}
