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
use sarai_support::host::{Behaviour, Host};
use serde_json::json;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// How often each side has its turn, and requests of each task in one.
const ROUNDS: usize = 5;
const EACH: usize = 40;
/// What the host takes for its first token.
const THINKS: Duration = Duration::from_millis(20);
const CONNECT: Duration = Duration::from_millis(300);

#[tokio::main]
async fn main() -> Result<()> {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(["what", "sarai", "against", "difference", "bar"]);
    for n in [1, 64] {
        for row in overhead(n).await? {
            table.add_row(row);
        }
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
async fn ask(solar: ModelHandle) -> Result<(f64, f64)> {
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
async fn ask_bare(client: reqwest::Client, url: String) -> Result<(f64, f64)> {
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

/// So many requests at any time, each from a task of its own, as those of a server are.
async fn in_flight<F>(n: usize, ask: impl Fn() -> F + Clone + Send + 'static) -> Result<Vec<(f64, f64)>>
where
    F: Future<Output = Result<(f64, f64)>> + Send,
{
    let task = |place: usize| {
        let ask = ask.clone();
        async move {
            // Not all at the same instant: the host's time apart, they stay so.
            tokio::time::sleep(THINKS * place as u32 / n as u32).await;
            let mut times = Vec::new();
            for _ in 0..EACH {
                times.push(ask().await?);
            }
            // The first opens the connection.
            Ok(times.split_off(1))
        }
    };
    let tasks: Vec<_> = (0..n).map(|place| tokio::spawn(task(place))).collect();
    let all = futures::future::join_all(tasks).await;
    Ok(all.into_iter().map(|asked| asked?).collect::<Result<Vec<_>>>()?.concat())
}

async fn overhead(n: usize) -> Result<Vec<[String; 5]>> {
    let host = Host::start().await?;
    host.behave(Behaviour::Thinks(THINKS));
    let (solar, url) = (solar(&host.url(), None)?, host.url());
    let bare = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build()?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (solar, bare, url) = (solar.clone(), bare.clone(), url.clone());
        ours.extend(in_flight(n, move || ask(solar.clone())).await?);
        theirs.extend(in_flight(n, move || ask_bare(bare.clone(), url.clone())).await?);
    }
    let row = |what: &str, of: fn(&(f64, f64)) -> f64| {
        let (ours, theirs) = (median(ours.iter().map(of)), median(theirs.iter().map(of)));
        [
            format!("{what}, {n} in flight, against a bare client"),
            format!("{ours:.3} ms"),
            format!("{theirs:.3} ms"),
            format!("{:.3} ms", ours - theirs),
            "0.3 ms".to_owned(),
        ]
    };
    Ok(vec![row("first token", first), row("total", total)])
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
        refused.push(ask(solar(&refusing, Some(&local))?).await?.0);
        let fresh = handle(vec![PlaceSpec::Backend(Arc::new(local.clone()))])?;
        own.push(ask(fresh).await?.0);
    }
    row("refused connection to local text, loaded anew", median(refused), median(own), "20 ms".to_owned());
    let broken = solar(&refusing, Some(&local))?;
    for _ in 0..5 {
        ask(broken.clone()).await?;
    }
    ask(alone.clone()).await?;
    let (mut open, mut ready) = (Vec::new(), Vec::new());
    for _ in 0..50 {
        open.push(ask(broken.clone()).await?.0);
        ready.push(ask(alone.clone()).await?.0);
    }
    row("open breaker to local text", median(open), median(ready), "1 ms".to_owned());
    let hole = BlackHole::new()?;
    let mut waited = Vec::new();
    for _ in 0..10 {
        waited.push(ask(solar(&hole.url, Some(&local))?).await?.0);
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
