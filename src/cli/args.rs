use std::path::PathBuf;

use clap::{Args as Group, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use sarai::core::request::MOST_LOGPROBS;
use sarai::core::scheduler::Eviction;
use serde::Serialize;

/// Several language models at once on one modest machine, within a memory budget.
#[derive(Debug, Parser)]
#[command(version, about, after_help = AFTER_HELP, max_term_width = 110)]
pub(super) struct Args {
    #[command(flatten)]
    pub(super) common: Common,

    /// Give the result as one JSON object on stdout.
    #[arg(long, global = true)]
    pub(super) json: bool,

    #[command(subcommand)]
    pub(super) command: Command,
}

const AFTER_HELP: &str = "\
Exit codes: 0 ok; 1 the request failed; 2 bad usage or configuration; 3 over the memory budget; \
4 host unreachable and no fallback; 130 interrupted.
SARAI_LOG=info (or debug, or a filter such as sarai_core=debug) logs to stderr.";

/// What all commands share.
#[derive(Debug, Group)]
pub(super) struct Common {
    /// The configuration [default: config/sarai.yaml, then sarai/sarai.yaml in the user's configuration folder].
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    /// The memory budget in GB (10⁹ bytes), instead of the configuration's.
    #[arg(long, global = true, value_name = "GB")]
    pub(super) max_ram_gb: Option<f64>,

    /// How many LLMs may be loaded at once, instead of the configuration's limit.
    #[arg(long, global = true, value_name = "N")]
    pub(super) max_concurrent_llms: Option<usize>,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Show the main job on small models made on the spot.
    Demo(DemoArgs),
    /// Ask a model; without PROMPT, a conversation.
    Chat(ChatArgs),
    /// Embed texts.
    Embed(EmbedArgs),
    /// Rank documents by how well they answer a query.
    Rerank(RerankArgs),
    /// Write down what is said in an audio file.
    Transcribe(TranscribeArgs),
    /// Say what is on an image, or answer a question about it.
    Describe(DescribeArgs),
    /// Say a text again in another tone.
    Modulate(ModulateArgs),
    /// Ask the router where a text should go, and why.
    Route(RouteArgs),
    /// Run a pipeline.
    Run(RunArgs),
    /// Show the models, what they take or would take here, and what the hosts hold.
    Ps,
    /// Say what requests for these models would load, evict or refuse. Loads nothing.
    Plan(PlanArgs),
    /// Play a trace of requests on the configuration's models without loading any, to choose a budget.
    Simulate(SimulateArgs),
    /// Measure.
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Have hosts free a model's memory. Deletes nothing.
    Unload(UnloadArgs),
    /// Check a configuration.
    Check(CheckArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the manual page.
    Man,
}

#[derive(Debug, Group)]
pub(super) struct DemoArgs {
    /// What is asked in the third use. The toy models know about this program and local models.
    #[arg(long, default_value = "Why was my model evicted?")]
    pub(super) text: String,
}

#[derive(Debug, Group)]
pub(super) struct ChatArgs {
    /// The model.
    pub(super) model: String,
    /// What to ask; `-` reads it from stdin.
    pub(super) prompt: Option<String>,
    /// Instructions to the model.
    #[arg(long)]
    pub(super) system: Option<String>,
    /// An image to see beside PROMPT; may be given several times.
    #[arg(long, value_name = "FILE", requires = "prompt", conflicts_with = "raw")]
    pub(super) image: Vec<PathBuf>,
    /// Audio to hear beside PROMPT; may be given several times.
    #[arg(long, value_name = "FILE", requires = "prompt", conflicts_with = "raw")]
    pub(super) audio: Vec<PathBuf>,
    /// Continue PROMPT as it is, without the model's chat template.
    #[arg(long, requires = "prompt", conflicts_with = "system")]
    pub(super) raw: bool,
    /// At most this many tokens.
    #[arg(long, value_name = "N")]
    pub(super) max_tokens: Option<u32>,
    /// Randomness; 0 always takes the likeliest token.
    #[arg(long, value_name = "T")]
    pub(super) temperature: Option<f32>,
    /// Makes the answer repeatable.
    #[arg(long, value_name = "N")]
    pub(super) seed: Option<u32>,
    /// End the answer before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub(super) stop: Vec<String>,
    /// Answer with JSON that is valid under the JSON schema in this file.
    #[arg(long, value_name = "FILE", conflicts_with = "grammar")]
    pub(super) schema: Option<PathBuf>,
    /// Answer with text of the GBNF grammar in this file, from its rule `root`.
    #[arg(long, value_name = "FILE")]
    pub(super) grammar: Option<PathBuf>,
    /// Leave out the oldest messages of a conversation that is longer than the context, instead of failing.
    #[arg(long)]
    pub(super) truncate_oldest: bool,
    /// Give each token's probability, and those of the N likeliest beside it, 20 at most.
    #[arg(long, value_name = "N", requires = "json", value_parser = clap::value_parser!(u32).range(..=i64::from(MOST_LOGPROBS)))]
    pub(super) logprobs: Option<u32>,
}

#[derive(Debug, Group)]
pub(super) struct EmbedArgs {
    /// The model.
    pub(super) model: String,
    /// The texts.
    #[arg(required = true)]
    pub(super) texts: Vec<String>,
}

#[derive(Debug, Group)]
pub(super) struct RerankArgs {
    /// The model.
    pub(super) model: String,
    /// The query.
    pub(super) query: String,
    /// The documents.
    #[arg(required = true)]
    pub(super) documents: Vec<String>,
}

#[derive(Debug, Group)]
pub(super) struct TranscribeArgs {
    /// The model.
    pub(super) model: String,
    /// A WAV, FLAC, MP3 or OGG file; `-` reads it from stdin.
    pub(super) audio: PathBuf,
    /// The language that is spoken, such as es; the model finds out without it.
    #[arg(long, value_name = "CODE")]
    pub(super) language: Option<String>,
    /// What the model is told beside the audio; for models that only transcribe, words that are likely to occur.
    #[arg(long)]
    pub(super) prompt: Option<String>,
}

#[derive(Debug, Group)]
pub(super) struct DescribeArgs {
    /// The model.
    pub(super) model: String,
    /// A PNG, JPEG, WebP or GIF file; `-` reads it from stdin.
    pub(super) image: PathBuf,
    /// What to ask about it.
    #[arg(default_value = "Describe the image.")]
    pub(super) prompt: String,
    /// At most this many tokens.
    #[arg(long, value_name = "N")]
    pub(super) max_tokens: Option<u32>,
    /// Randomness; 0 always takes the likeliest token.
    #[arg(long, value_name = "T")]
    pub(super) temperature: Option<f32>,
}

#[derive(Debug, Group)]
pub(super) struct ModulateArgs {
    /// The model.
    pub(super) model: String,
    /// The tone: brief, empathetic, formal, friendly, or one of the configuration.
    pub(super) tone: String,
    /// The text; `-` reads it from stdin.
    #[arg(default_value = "-")]
    pub(super) text: String,
}

#[derive(Debug, Group)]
pub(super) struct RouteArgs {
    /// The text.
    pub(super) text: String,
}

#[derive(Debug, Group)]
pub(super) struct RunArgs {
    /// The pipeline.
    pub(super) pipeline: String,
    /// Text for it; `-` reads it from stdin.
    #[arg(long)]
    pub(super) text: Option<String>,
    /// A WAV, FLAC, MP3 or OGG file for it.
    #[arg(long, value_name = "FILE")]
    pub(super) audio: Option<PathBuf>,
    /// A PNG, JPEG, WebP or GIF file for it.
    #[arg(long, value_name = "FILE")]
    pub(super) image: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Run several models at once: speeds, memory against the budget, and what that gains against one after another.
    Concurrent(ConcurrentArgs),
}

#[derive(Debug, Group)]
pub(super) struct ConcurrentArgs {
    /// The models.
    #[arg(long, value_delimiter = ',', default_value = "solar,lfm2,omni")]
    pub(super) models: Vec<String>,
    /// Tokens that each answer has at most.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) tokens: u32,
    /// The image for models that see; each request encodes it anew.
    #[arg(long, value_name = "FILE")]
    pub(super) image: Option<PathBuf>,
    /// Make synthetic models to measure with, instead of the configuration's.
    #[arg(long, value_enum)]
    pub(super) shape: Option<ShapeArg>,
    /// Runs of each measurement; medians are shown.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub(super) runs: usize,
}

/// Synthetic models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(super) enum ShapeArg {
    /// Some megabytes, made on the spot.
    Tiny,
    /// As large as the real ones: SOLAR-10.7B, LFM2-1.2B, Qwen2.5-Omni-7B, EmbeddingGemma. 15 GB, kept for the next time.
    Full,
}

#[derive(Debug, Group)]
pub(super) struct PlanArgs {
    /// The models, as if asked for in this order.
    #[arg(required = true)]
    pub(super) models: Vec<String>,
}

#[derive(Debug, Group)]
pub(super) struct SimulateArgs {
    /// The trace: CSV with the columns time and model, or JSON lines with these keys; times in seconds, and `seconds` for
    /// how long an answer takes. `-` reads it from stdin.
    pub(super) trace: PathBuf,
    /// A budget in GB to try; may be given several times. The configuration's without it.
    #[arg(long = "budget", value_name = "GB", value_parser = positive)]
    pub(super) budgets: Vec<f64>,
    /// Who is evicted first; both ways without it.
    #[arg(long, value_enum)]
    pub(super) eviction: Option<EvictionArg>,
    /// How long an answer takes where the trace does not say.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = positive)]
    pub(super) answer_seconds: f64,
    /// How long a load takes for each GB, for models that were never loaded here.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5, value_parser = positive)]
    pub(super) load_seconds_per_gb: f64,
}

/// Who is evicted first.
#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(super) enum EvictionArg {
    /// Whose absence costs least for what it frees.
    CostAware,
    /// The least recently used.
    Lru,
}

impl From<EvictionArg> for Eviction {
    fn from(arg: EvictionArg) -> Self {
        match arg {
            EvictionArg::CostAware => Self::CostAware,
            EvictionArg::Lru => Self::Lru,
        }
    }
}

fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if number.is_finite() && number > 0.0 && number < 1e9 {
        Ok(number)
    } else {
        Err("must be above 0".to_owned())
    }
}

#[derive(Debug, Group)]
pub(super) struct UnloadArgs {
    /// A model of the configuration; with --host, also a model's name there.
    pub(super) model: String,
    /// Only on this host.
    #[arg(long)]
    pub(super) host: Option<String>,
}

#[derive(Debug, Group)]
pub(super) struct CheckArgs {
    /// The configuration, as --config.
    pub(super) file: Option<PathBuf>,
    /// Print every setting with where it comes from; secrets are hidden.
    #[arg(long)]
    pub(super) resolved: bool,
}
