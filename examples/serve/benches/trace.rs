//! A trace of requests through the scheduler, without HTTP: Llama-3-8B's shape with random weights
//! on a GPU, or a tiny shape on the CPU.
//!
//!     cargo bench -p longctx-serve --features cuda --bench trace -- --methods dense-f16,kivi-4
//!
//! Lengths of prompts and answers are log-normal. A fixed number of requests is open at a time; a
//! request beyond the cache's memory waits in the scheduler. The time to the first token includes
//! that wait.
//!
//! `tokens/s` is the throughput of the whole run. It includes the start and the end, when the
//! memory is not full. `full` is the throughput while the memory is full: from the time when 90 %
//! of the largest number of sequences are held until the last request is admitted. The last columns
//! have the time in which the host launches the work of the steps, and the time in which it then
//! waits for the device.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use base_models::{Config, LoadOptions, Transformer};
use candle_core::{DType, Device};
use clap::Parser;
use longctx_core::Sampling;
use longctx_examples::llm::replayed;
use longctx_examples::methods::Method;
use longctx_examples::shapes::llama_3_8b;
use longctx_serve::metrics::Metrics;
use longctx_serve::scheduler::{Event, Options, Request, Scheduler};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, LogNormal};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{Semaphore, oneshot};

#[derive(Parser, Clone)]
struct Args {
    /// Cache methods
    #[arg(long, value_delimiter = ',', default_value = "dense-f16,kivi-4", value_parser = Method::named)]
    methods: Vec<Method>,
    /// Memory of the keys and values of all sequences, in MiB
    #[arg(long, default_value_t = 40 << 10)]
    cache_mib: usize,
    /// Number of requests
    #[arg(long, default_value_t = 500)]
    requests: usize,
    /// Open requests at a time; by default all
    #[arg(long, value_delimiter = ',')]
    concurrency: Vec<usize>,
    /// Median length of a prompt
    #[arg(long, default_value_t = 2048)]
    prompt_median: usize,
    /// Largest length of a prompt
    #[arg(long, default_value_t = 32_768)]
    prompt_max: usize,
    /// Median length of an answer
    #[arg(long, default_value_t = 256)]
    answer_median: usize,
    /// Largest length of an answer
    #[arg(long, default_value_t = 1024)]
    answer_max: usize,
    /// Standard deviation of the logarithms of lengths
    #[arg(long, default_value_t = 1.0)]
    sigma: f64,
    /// Tokens of a prompt per step
    #[arg(long, default_value_t = 2048)]
    prefill_chunk: usize,
    /// Tokens of a step at which no further prompt is added to it
    #[arg(long, default_value_t = 4096)]
    step_tokens: usize,
    /// Launches the kernels of decode steps one by one, instead of replaying CUDA graphs
    #[arg(long)]
    no_graphs: bool,
    /// Seed of lengths and tokens
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Added by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// Lengths of a request's prompt and answer.
type Lengths = (usize, usize);

fn main() -> Result<()> {
    let args = Args::parse();
    let device = Device::cuda_if_available(0)?;
    #[cfg(feature = "cuda")]
    longctx_core::cuda::keep_freed_memory(&device)?;
    let (config, dtype) = match device.is_cpu() {
        true => (tiny(), DType::F32),
        false => (llama_3_8b(), DType::F16),
    };
    let vocab = config.vocab_size as u32;
    let options = LoadOptions { device, dtype, ..Default::default() };
    let model = Transformer::random(config, &options)?;
    let lengths = lengths(&args)?;
    let total = |of: fn(&Lengths) -> usize| lengths.iter().map(of).sum::<usize>();
    println!(
        "{} requests, {} tokens of prompts, {} of answers",
        args.requests,
        total(|l| l.0),
        total(|l| l.1)
    );
    println!(
        "| cache | open at most | held at most | seconds | tokens/s | full, tokens/s | \
         first token p50, s | p95, s | steps | launching, s | waiting, s |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    for method in &args.methods {
        let open = match args.concurrency.is_empty() {
            true => vec![args.requests],
            false => args.concurrency.clone(),
        };
        for open in open {
            run(&args, &model, vocab, method, open, &lengths)?;
        }
    }
    Ok(())
}

/// A shape to try the program with.
fn tiny() -> Config {
    Config {
        vocab_size: 512,
        hidden_size: 128,
        intermediate_size: 256,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 128,
        ..llama_3_8b()
    }
}

fn lengths(args: &Args) -> Result<Vec<Lengths>> {
    let mut random = StdRng::seed_from_u64(args.seed);
    let of = |median: usize| LogNormal::new((median as f64).ln(), args.sigma);
    let (prompt, answer) = (of(args.prompt_median)?, of(args.answer_median)?);
    let mut sample =
        |of: &LogNormal<f64>, max: usize| (of.sample(&mut random) as usize).clamp(1, max);
    let pair = |_| (sample(&prompt, args.prompt_max), sample(&answer, args.answer_max));
    Ok((0..args.requests).map(pair).collect())
}

/// Serves all requests with one method and prints its row.
fn run(
    args: &Args,
    model: &Transformer,
    vocab: u32,
    method: &Method,
    open: usize,
    lengths: &[Lengths],
) -> Result<()> {
    let of_layer = (args.cache_mib << 20) / model.config().layers;
    let session = model.session(|spec| method.cache_within(spec, Some(of_layer)))?;
    let session = if args.no_graphs { session } else { replayed(session)? };
    let options = Options {
        prefill_chunk: Some(args.prefill_chunk),
        step_tokens: args.step_tokens,
        prefixes: 0,
    };
    let metrics = Arc::new(Metrics::default());
    let mut scheduler = Scheduler::new(Box::new(session), options, metrics.clone());
    let (requests, received) = unbounded_channel();
    let serving = std::thread::spawn(move || scheduler.run(received));
    let started = Instant::now();
    let (mut first, samples) = tokio::runtime::Runtime::new()?
        .block_on(send(args, vocab, open, lengths, requests, &metrics))?;
    let seconds = started.elapsed().as_secs_f64();
    if serving.join().is_err() {
        bail!("the scheduler panicked");
    }
    first.sort_by(f64::total_cmp);
    let percentile = |p: f64| first[((first.len() - 1) as f64 * p).round() as usize];
    let held = samples.iter().map(|sample| sample.held).max().unwrap_or(0);
    let full = while_full(&samples, held).map_or("never".into(), |rate| format!("{rate:.0}"));
    println!(
        "| {} | {open} | {held} | {seconds:.1} | {:.0} | {full} | {:.2} | {:.2} | {} | {:.1} | {:.1} |",
        method.name(),
        metrics.written_tokens.get() as f64 / seconds,
        percentile(0.5),
        percentile(0.95),
        metrics.steps.get(),
        metrics.forward_seconds.get(),
        metrics.sample_seconds.get(),
    );
    Ok(())
}

/// Sends the requests, at most `open` at a time. Returns the seconds to each first token, and
/// samples of the metrics.
async fn send(
    args: &Args,
    vocab: u32,
    open: usize,
    lengths: &[Lengths],
    requests: UnboundedSender<Request>,
    metrics: &Arc<Metrics>,
) -> Result<(Vec<f64>, Vec<Sample>)> {
    let places = Arc::new(Semaphore::new(open));
    let (done, ended) = oneshot::channel();
    let watch = tokio::spawn(watch(metrics.clone(), ended));
    let mut random = StdRng::seed_from_u64(args.seed + 1);
    let mut waiting = Vec::new();
    for &(prompt, answer) in lengths {
        let place = places.clone().acquire_owned().await?;
        let (events, mut received) = unbounded_channel();
        let prompt = (0..prompt).map(|_| random.random_range(0..vocab)).collect();
        let (sampling, stop) = (Sampling::Greedy, Vec::new());
        metrics.waiting.inc();
        requests.send(Request { prompt, max_tokens: answer, sampling, stop, events })?;
        let sent = Instant::now();
        waiting.push(tokio::spawn(async move {
            let mut first = None;
            while let Some(event) = received.recv().await {
                match event {
                    Event::Started { .. } => {}
                    Event::Token(_) => _ = first.get_or_insert(sent.elapsed().as_secs_f64()),
                    Event::Done { .. } => break,
                    Event::Failed(message) => bail!("{message}"),
                }
            }
            drop(place);
            Ok(first.unwrap_or(f64::NAN))
        }));
    }
    let mut first = Vec::new();
    for request in waiting {
        first.push(request.await??);
    }
    drop(done);
    Ok((first, watch.await?))
}

/// The metrics at a time.
struct Sample {
    at: Instant,
    written_tokens: u64,
    waiting: i64,
    held: i64,
}

/// Samples the metrics until the other end of `ended` is dropped.
async fn watch(metrics: Arc<Metrics>, mut ended: oneshot::Receiver<()>) -> Vec<Sample> {
    let mut samples = Vec::new();
    while let Err(oneshot::error::TryRecvError::Empty) = ended.try_recv() {
        samples.push(Sample {
            at: Instant::now(),
            written_tokens: metrics.written_tokens.get(),
            waiting: metrics.waiting.get(),
            held: metrics.sequences.get(),
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    samples
}

/// Returns the tokens per second while the memory is full; `None` if it never is.
fn while_full(samples: &[Sample], most: i64) -> Option<f64> {
    let first = samples.iter().position(|sample| 10 * sample.held >= 9 * most)?;
    let last =
        samples.iter().rposition(|sample| sample.waiting > 0).filter(|&last| last > first)?;
    let tokens = samples[last].written_tokens - samples[first].written_tokens;
    Some(tokens as f64 / (samples[last].at - samples[first].at).as_secs_f64())
}
