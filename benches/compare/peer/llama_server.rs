//! llama-server.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Peer, Weights};
use crate::Result;

/// A running server; it ends with this.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    url: String,
    client: reqwest::Client,
}

impl Peer {
    /// Starts a server and waits until it is ready.
    pub(crate) async fn serve(&self, model: &Path, weights: Weights, flags: &[&str]) -> Result<Server> {
        // Free at this moment; nobody else is likely to take it in the next.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        // The client wants a provider even for plain HTTP; one that is there already is as good.
        let _there_already = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().no_proxy().build()?;
        let child = Command::new(self.program("llama-server")?)
            .arg("--model")
            .arg(model)
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .args(weights.server_flags())
            .args(flags)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let url = format!("http://127.0.0.1:{port}");
        let mut server = Server { child, url, client };
        server.ready().await?;
        Ok(server)
    }
}

impl Server {
    async fn ready(&mut self) -> Result<()> {
        const PATIENCE: Duration = Duration::from_mins(10);
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            let health = self.client.get(format!("{}/health", self.url)).send().await;
            if health.is_ok_and(|response| response.status().is_success()) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("llama-server ended before it was ready: {status}").into());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err("llama-server does not become ready".into())
    }

    /// Continues a prompt by `tokens` tokens, always the likeliest one, with nothing kept from before. Returns the
    /// tokens that came.
    pub(crate) async fn complete(&self, prompt: &str, tokens: u32) -> Result<u64> {
        let body = json!({
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "cache_prompt": false,
        });
        let request = self.client.post(format!("{}/completion", self.url)).body(body.to_string());
        let text = request.send().await?.error_for_status()?.text().await?;
        let answer: Value = serde_json::from_str(&text)?;
        answer["tokens_predicted"].as_u64().ok_or_else(|| format!("llama-server answers {text}").into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
