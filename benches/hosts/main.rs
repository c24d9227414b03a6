//! What the pool costs a request to a host, and how soon a local model stands in for one that fails: `cargo bench --bench hosts`.
//! Against a host on loopback, with a scripted local model that answers at once.

#![expect(clippy::print_stdout, reason = "a program for a terminal")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use futures::StreamExt;
use sarai::core::backend::ServedBy;
use sarai::core::config::{HostConfig, HostKind};
use sarai::core::testing::{FakeBackend, FakeProbe};
use sarai::{
    AnswerEvent, Bytes, CallOptions, GenerateRequest, Limits, Message, ModelHandle, ModelPool, ModelSpec,
    PlaceSpec,
};
use sarai_agents::ollama::Client;
use sarai_agents::remote::{HostApi, RemoteBackend};
use sarai_core::request::Capability;
use sarai_support::host::Host;
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Requests of each side, in turns.
const ROUNDS: usize = 400;
const CONNECT: Duration = Duration::from_millis(300);

#[tokio::main]
async fn main() -> Result<()> {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["what", "sarai", "against", "difference", "bar"]);
    for at_once in [1, 64] {
        overhead(at_once, &mut table).await?;
    }
    fallback(&mut table).await?;
    println!("{table}");
    Ok(())
}

fn config(url: &str) -> HostConfig {
    let long = Duration::from_secs(60);
    HostConfig {
        kind: HostKind::Ollama,
        url: url.to_owned(),
        api_key: None,
        max_ram: None,
        watch_interval: None,
        connect_timeout: CONNECT,
        first_token_timeout: long,
        load_timeout: long,
        stall_timeout: long,
        total_timeout: long,
        retries: 0,
        parallel: 64,
        keep_alive: long,
        continues: true,
    }
}

/// SOLAR on a host, with a local stand-in where there is one.
fn solar(url: &str, local: Option<&FakeBackend>) -> Result<ModelHandle> {
    let api: Arc<dyn HostApi> = Arc::new(Client::new("lan".parse()?, &config(url))?);
    let remote = RemoteBackend::new([(api, "solar".to_owned())], None, Capability::Generate);
    let mut places = vec![PlaceSpec::Backend(Arc::new(remote))];
    places.extend(local.map(|local| PlaceSpec::Backend(Arc::new(local.clone()))));
    handle(places)
}

fn handle(places: Vec<PlaceSpec>) -> Result<ModelHandle> {
    let limits = Limits { budget: Bytes(1_000_000_000), max_waiting: 1000, ..Limits::default() };
    let pool = ModelPool::builder(limits)
        .probe(Arc::new(FakeProbe::new(Bytes(16_000_000_000))))
        .model(ModelSpec::new("solar".parse()?, places))
        .build()?;
    Ok(pool.handle("solar")?)
}

/// From the request to the first text and to the end, in milliseconds.
async fn ask(solar: &ModelHandle) -> Result<(f64, f64)> {
    let started = Instant::now();
    let request = GenerateRequest::chat(vec![Message::user("hola")]);
    let mut answer = solar.generate(request, CallOptions::default()).await?;
    let mut first = None;
    while let Some(event) = answer.next().await {
        if let AnswerEvent::Text(_) = event? {
            first.get_or_insert(milliseconds(started));
        }
    }
    Ok((first.unwrap_or_default(), milliseconds(started)))
}

/// The same by a client that does nothing else.
async fn ask_bare(client: &reqwest::Client, url: &str) -> Result<(f64, f64)> {
    let started = Instant::now();
    let body = json!({"model": "solar", "messages": [{"role": "user", "content": "hola"}], "stream": true})
        .to_string();
    let response = client.post(format!("{url}/api/chat")).body(body).send().await?;
    let mut first = None;
    let mut pieces = response.bytes_stream();
    while let Some(piece) = pieces.next().await {
        piece?;
        first.get_or_insert(milliseconds(started));
    }
    Ok((first.unwrap_or_default(), milliseconds(started)))
}

async fn overhead(at_once: usize, table: &mut Table) -> Result<()> {
    let host = Host::start().await?;
    let (solar, url) = (solar(&host.url(), None)?, host.url());
    let bare = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS / at_once + 1 {
        let pool = futures::future::join_all((0..at_once).map(|_| ask(&solar))).await;
        let alone = futures::future::join_all((0..at_once).map(|_| ask_bare(&bare, &url))).await;
        // The first round opens the connections.
        if round > 0 {
            ours.extend(pool.into_iter().collect::<Result<Vec<_>>>()?);
            theirs.extend(alone.into_iter().collect::<Result<Vec<_>>>()?);
        }
    }
    for (what, of) in [("first token", first as fn(&(f64, f64)) -> f64), ("total", total)] {
        let (ours, theirs) = (median(ours.iter().map(of)), median(theirs.iter().map(of)));
        table.add_row([
            format!("{what}, {at_once} at once, against a bare client"),
            format!("{ours:.3} ms"),
            format!("{theirs:.3} ms"),
            format!("{:.3} ms", ours - theirs),
            "0.3 ms".to_owned(),
        ]);
    }
    Ok(())
}

async fn fallback(table: &mut Table) -> Result<()> {
    let local = FakeBackend::new(ServedBy::GgufNative("solar.gguf".into()), Bytes(1000));
    let alone = handle(vec![PlaceSpec::Backend(Arc::new(local.clone()))])?;
    let refusing = Host::refusing().await?;
    let mut row = |what: &str, ours: f64, theirs: f64, bar: String| {
        table.add_row([
            what.to_owned(),
            format!("{ours:.3} ms"),
            format!("{theirs:.3} ms"),
            format!("{:.3} ms", ours - theirs),
            bar,
        ]);
    };
    let (mut refused, mut own) = (Vec::new(), Vec::new());
    for _ in 0..50 {
        refused.push(ask(&solar(&refusing, Some(&local))?).await?.0);
        let fresh = handle(vec![PlaceSpec::Backend(Arc::new(local.clone()))])?;
        own.push(ask(&fresh).await?.0);
    }
    row("refused connection to local text, loaded anew", median(refused), median(own), "20 ms".to_owned());
    let broken = solar(&refusing, Some(&local))?;
    for _ in 0..5 {
        ask(&broken).await?;
    }
    ask(&alone).await?;
    let (mut open, mut ready) = (Vec::new(), Vec::new());
    for _ in 0..50 {
        open.push(ask(&broken).await?.0);
        ready.push(ask(&alone).await?.0);
    }
    row("open breaker to local text", median(open), median(ready), "1 ms".to_owned());
    let hole = BlackHole::new()?;
    let mut waited = Vec::new();
    for _ in 0..10 {
        waited.push(ask(&solar(&hole.url, Some(&local))?).await?.0);
    }
    let connect = CONNECT.as_secs_f64() * 1e3;
    row("connection that nobody answers, against its deadline", median(waited), connect, "20 ms".to_owned());
    Ok(())
}

/// A port whose connections are neither taken nor refused: its queue is full.
struct BlackHole {
    url: String,
    _listener: std::os::fd::OwnedFd,
    _queue: Vec<std::net::TcpStream>,
}

impl BlackHole {
    fn new() -> Result<Self> {
        use rustix::net::{AddressFamily, SocketType, bind, getsockname, listen, socket};
        let listener = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        bind(&listener, &std::net::SocketAddr::from(([127, 0, 0, 1], 0)))?;
        listen(&listener, 0)?;
        let address = std::net::SocketAddr::try_from(getsockname(&listener)?)?;
        let mut queue = Vec::new();
        while let Ok(connection) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(100))
        {
            queue.push(connection);
        }
        Ok(Self { url: format!("http://{address}"), _listener: listener, _queue: queue })
    }
}

fn first(times: &(f64, f64)) -> f64 {
    times.0
}

fn total(times: &(f64, f64)) -> f64 {
    times.1
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}
