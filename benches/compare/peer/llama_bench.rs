//! llama-bench.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::{Peer, Weights};
use crate::Result;

/// Tokens per second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Speeds {
    pub(crate) prompt: f64,
    pub(crate) decode: f64,
}

/// One of its tests: a prompt alone, or decoding alone.
#[derive(Debug, Deserialize)]
struct Test {
    n_prompt: usize,
    avg_ts: f64,
}

impl Peer {
    /// One run over a prompt of `n_prompt` tokens and one of decoding `n_gen`, after its own warm-up.
    pub(crate) fn speeds(
        &self,
        model: &Path,
        weights: Weights,
        threads: usize,
        n_prompt: usize,
        n_gen: u32,
    ) -> Result<Speeds> {
        let mut command = Command::new(self.program("llama-bench")?);
        command.arg("--model").arg(model).args(["--output", "json", "--repetitions", "1"]);
        command.args(["--threads", &threads.to_string()]);
        command.args(["--n-prompt", &n_prompt.to_string(), "--n-gen", &n_gen.to_string()]);
        command.args(weights.bench_flags());
        let output = command.stderr(Stdio::null()).output()?;
        if !output.status.success() {
            return Err(format!("llama-bench: {}", output.status).into());
        }
        let tests: Vec<Test> = serde_json::from_slice(&output.stdout)?;
        let speed = |prompt: bool| {
            let test = tests.iter().find(|test| (test.n_prompt > 0) == prompt);
            test.map(|test| test.avg_ts).ok_or("llama-bench left a test out")
        };
        Ok(Speeds { prompt: speed(true)?, decode: speed(false)? })
    }
}
