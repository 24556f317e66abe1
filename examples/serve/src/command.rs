//! The server as a command.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use longctx_examples::llm::Llm;
use longctx_examples::model;
use longctx_examples::output::number;
use longctx_examples::place::Place;
use tokio::sync::mpsc::unbounded_channel;

use crate::metrics::Metrics;
use crate::routes::{self, App};
use crate::scheduler::{Options, Scheduler};

/// The largest accepted memory limit. 16 EiB or more do not fit in a 64-bit number of bytes.
const MAX_MIB: usize = (1 << 44) - 1;

/// The options of the server.
#[derive(clap::Args)]
pub struct Args {
    /// smollm2, gemma3, a GGUF file, a folder in Hugging Face's layout, or a model of the Hub; by
    /// default SmolLM2-135M-Instruct, downloaded if it is missing
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    place: Place,
    /// The cache method of attention layers: dense-f16, kivi-4, kivi-2, snap-kv-4x, …
    #[arg(long, default_value = "dense-f16")]
    method: String,
    /// Memory limit of the keys and values of all sequences, in MiB; by default there is none
    #[arg(long, value_parser = number::<1, MAX_MIB>)]
    cache_mib: Option<usize>,
    /// Tokens of a prompt per step; 0 feeds the whole prompt, which is exact with every method but
    /// does not reuse prefixes
    #[arg(long, default_value_t = 128)]
    prefill_chunk: usize,
    /// Tokens of a step at which no further prompt is added to it
    #[arg(long, default_value_t = 512)]
    step_tokens: usize,
    /// Largest number of prompt prefixes kept for later requests
    #[arg(long, default_value_t = 64)]
    prefixes: usize,
    /// Largest number of tokens of an answer
    #[arg(long, default_value_t = 4096)]
    max_tokens: usize,
    /// Largest number of waiting requests; further requests get status 429
    #[arg(long, default_value_t = 1024)]
    queue: usize,
    /// Largest body of a request, in bytes
    #[arg(long, default_value_t = 4 << 20)]
    body_limit: usize,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1:8080")]
    address: SocketAddr,
    /// API key that requests must send as a bearer token
    #[arg(long, env = "LONGCTX_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
}

/// Serves until an interrupt or a termination signal.
///
/// # Errors
/// An option that is out of range, a model that cannot be opened, or an address that is in use.
#[tokio::main]
pub async fn serve(args: Args) -> Result<()> {
    ensure!(args.step_tokens > 0 && args.max_tokens > 0, "tokens: expected at least 1, got 0");
    let name = model::named(args.model.as_deref())?;
    let llm = Llm::open(&name, &args.place)?;
    let metrics = Arc::new(Metrics::default());
    let (requests, received) = unbounded_channel();
    let context = llm.context_length().unwrap_or(usize::MAX);
    let session = llm.session_with(&args.method, args.cache_mib.map(|mib| mib << 20))?;
    let vocab_size = session.vocab_size();
    let options = Options {
        prefill_chunk: Some(args.prefill_chunk).filter(|&chunk| chunk > 0),
        step_tokens: args.step_tokens,
        prefixes: if args.prefill_chunk > 0 { args.prefixes } else { 0 },
    };
    let mut scheduler = Scheduler::new(session, options, metrics.clone());
    let serving = std::thread::spawn(move || scheduler.run(received));
    let app = Arc::new(App {
        llm,
        name: listed_name(&name),
        context,
        vocab_size,
        max_tokens: args.max_tokens,
        queue: args.queue,
        api_key: args.api_key,
        requests,
        metrics,
        count: Default::default(),
    });
    let listener = tokio::net::TcpListener::bind(args.address)
        .await
        .with_context(|| format!("listening at {}", args.address))?;
    println!("{name} with {} at http://{}", args.method, listener.local_addr()?);
    let routes = routes::router(app, args.body_limit);
    axum::serve(listener, routes).with_graceful_shutdown(interrupted()).await?;
    // All senders are dropped, so the scheduler ends after the last request.
    tokio::task::spawn_blocking(move || serving.join())
        .await?
        .map_err(|_| anyhow::anyhow!("the scheduler panicked"))
}

/// Returns the name of a model's file or folder without its path.
fn listed_name(name: &str) -> String {
    match std::path::Path::new(name) {
        path if path.exists() => {
            path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
        }
        _ => name.to_owned(),
    }
}

/// Completes on an interrupt or a termination signal.
async fn interrupted() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! { _ = interrupt => {}, _ = terminate.recv() => {} }
            return;
        }
    }
    let _ = interrupt.await;
}
