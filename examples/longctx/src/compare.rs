//! Runs the needle test with each method: keys found, bytes held, time.
//!
//! A model without attention layers has no cache, so it runs once, with its recurrent state.
//!
//!     longctx compare
//!     longctx compare --model smollm2
//!     longctx compare --model state-spaces/mamba-130m-hf
//!     longctx compare --device cuda
//!     longctx compare --words 512,4096 --methods dense-f16,h2o-4x --haystack FOLDER
//!
//! Methods are those of `examples/methods.rs`; the error for an unknown name lists them.

mod report;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use longctx_core::{GenerateOptions, SeqId, generate};
use longctx_eval::Haystack;
use longctx_eval::needle::{Needle, Sample, score, spaced};
use longctx_examples::llm::Llm;
use longctx_examples::methods::Method;
use longctx_examples::output::{check_writable, number};
use longctx_examples::place::Place;
use longctx_examples::{model, peak_memory, say};
use report::Row;

use crate::MAX_COUNT;

/// Compression ratios are relative to this method's bytes.
const REFERENCE: &str = "dense-f16";
/// The default methods take 35 seconds on two cores with the embedded model. InfLLM reads a quarter
/// of the tokens, but its bytes are those of all tokens, because it holds them.
const METHODS: [&str; 9] = [
    REFERENCE,
    "dense-f32",
    "kivi-4",
    "kivi-2",
    "streaming-llm-4x",
    "streaming-llm-4x-kivi-4",
    "h2o-4x",
    "snap-kv-4x",
    "infllm-4x",
];
/// The sequence of every prompt.
const SEQ: SeqId = 0;

#[derive(clap::Args)]
pub struct Args {
    /// embedded (a model of 7 million parameters in this repository), smollm2 (downloaded if it is
    /// missing), gemma3, a GGUF file, a folder in Hugging Face's layout, or a model of the Hub; a
    /// transformer or a recurrent model
    #[arg(long, default_value = "embedded")]
    model: String,
    #[command(flatten)]
    place: Place,
    /// A folder of text files, or a text file, to hide the key in; by default generated text
    #[arg(long)]
    haystack: Option<PathBuf>,
    /// Lengths of the text, in words
    #[arg(long, value_delimiter = ',', default_values_t = [512, 1024, 2048], value_parser = number::<0, MAX_COUNT>)]
    words: Vec<usize>,
    /// Number of depths of the key, evenly spaced from the start to the end
    #[arg(long, default_value_t = 5, value_parser = number::<1, 1000>)]
    depths: usize,
    /// Number of digits of the key
    #[arg(long, default_value_t = 7, value_parser = number::<1, 1000>)]
    digits: usize,
    /// Tokens to generate per answer
    #[arg(long, default_value_t = 16, value_parser = number::<1, MAX_COUNT>)]
    max_tokens: usize,
    /// Tokens of the prompt to feed at a time; by default the whole prompt, which is exact with
    /// every method except InfLLM
    #[arg(long, value_parser = number::<1, MAX_COUNT>)]
    prefill_chunk: Option<usize>,
    /// Names of the methods to run
    #[arg(long, value_delimiter = ',', default_values = METHODS, value_parser = Method::named)]
    methods: Vec<Method>,
    /// Folder of the saved table
    #[arg(long, default_value = "results")]
    out: PathBuf,
}

pub fn compare(args: Args) -> Result<()> {
    ensure!(!args.words.is_empty(), "at least one length");
    check_writable(&args.out)?;
    let name = model::named(Some(&args.model))?;
    let llm = Llm::open(&name, &args.place)?;
    // A model without attention layers never creates a cache.
    let mut methods: Vec<_> = match llm.has_attention() {
        true => args.methods.iter().map(|method| (method.name(), method)).collect(),
        false => vec![("state", &args.methods[0])],
    };
    // The reference runs first, because the ratios of the other rows need it.
    methods.sort_by_key(|(name, _)| *name != REFERENCE);
    let prompts = prompts(&args, &llm)?;
    let longest = prompts.iter().map(|(tokens, _)| tokens.len()).max().unwrap_or(0);
    if let Some(limit) = llm.context_length() {
        ensure!(
            longest + args.max_tokens <= limit,
            "a prompt of {longest} tokens and an answer of {} do not fit the model's context of {limit}; reduce --words or --max-tokens",
            args.max_tokens
        );
    }
    say!("{name}: {} prompts, the longest of {longest} tokens.", prompts.len());
    let bar = ProgressBar::new((methods.len() * prompts.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} (left: {eta})")?);
    bar.suspend(report::heading);
    let mut rows: Vec<Row> = Vec::new();
    for (name, method) in methods {
        bar.set_message(name.to_owned());
        let mut row = run(name, method, &llm, &prompts, &args, &bar)?;
        let reference = rows.iter().chain([&row]).find(|row| row.method == REFERENCE);
        row.ratio = reference.map(|reference| reference.kv_bytes as f64 / row.kv_bytes as f64);
        bar.suspend(|| report::print(&row));
        rows.push(row);
    }
    bar.finish_and_clear();
    say!("KV bytes are those after the longest prompt, {longest} tokens.");
    report::save(&rows, &args.out)
}

/// Returns the tokens of each prompt, and its key.
fn prompts(args: &Args, llm: &Llm) -> Result<Vec<(Vec<u32>, String)>> {
    let haystack = match &args.haystack {
        Some(path) => Haystack::from_path(path)?,
        None => Haystack::generated(0),
    };
    let mut prompts = Vec::new();
    for &words in &args.words {
        for (seed, depth) in (0..).zip(spaced(0.0, 1.0, args.depths)) {
            let needle = Needle { depth, digits: args.digits, seed };
            let Sample { prompt, answer } = needle.in_words(&haystack, words)?;
            // The prompt ends before the key. Its last space is removed: it would be a separate
            // token, which is rare before a number in training text.
            prompts.push((llm.encode(prompt.trim_end())?, answer));
        }
    }
    Ok(prompts)
}

fn run(
    name: &str,
    method: &Method,
    llm: &Llm,
    prompts: &[(Vec<u32>, String)],
    args: &Args,
    bar: &ProgressBar,
) -> Result<Row> {
    peak_memory::reset();
    let mut session = llm.session(|spec| method.cache(spec))?;
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        stop: llm.eos().to_vec(),
        prefill_chunk: args.prefill_chunk,
        ..Default::default()
    };
    let (mut exact, mut partial, mut longest, mut kv_bytes) = (0.0, 0.0, 0, 0);
    let (mut prefill, mut decode) = ((0, Duration::ZERO), (0, Duration::ZERO));
    for (tokens, answer) in prompts {
        session.remove(SEQ);
        let done =
            generate(session.as_mut(), SEQ, tokens, &options, |_| ControlFlow::Continue(()))?;
        let score = score(&llm.decode(&done.tokens)?, answer);
        exact += score.exact;
        partial += score.partial;
        prefill = (prefill.0 + tokens.len(), prefill.1 + done.prefill_time);
        decode = (decode.0 + done.decode_steps, decode.1 + done.decode_time);
        if tokens.len() >= longest {
            longest = tokens.len();
            kv_bytes = session.footprint().total();
        }
        bar.inc(1);
    }
    let per_second = |(count, time): (usize, Duration)| count as f64 / time.as_secs_f64();
    Ok(Row {
        method: name.into(),
        tried: prompts.len(),
        exact,
        partial: partial / prompts.len() as f64,
        longest_prompt: longest,
        kv_bytes,
        ratio: None,
        prefill_tokens_per_second: per_second(prefill),
        decode_tokens_per_second: per_second(decode),
        peak_resident_bytes: peak_memory::peak(),
    })
}
