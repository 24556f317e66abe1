//! Measures the loss of quality of packed caches, by format and option.
//!
//!     cargo run --release --example kv_quality -- --text FOLDER
//!     cargo run --release --example kv_quality -- --text FOLDER --generate 1024
//!     cargo run --release --example kv_quality -- --plot TABLE.md --out PLOT.svg
//!
//! The first command measures perplexity with teacher forcing. The text is split into contexts that
//! run as one batch, a few tokens at a time. Each block of tokens attends to the packed past, as in
//! decoding. All tokens are predicted except the first of a context.
//!
//! The second command measures the KL divergence from the dense model while the model continues
//! prompts of the text. `--scores` measures the errors of the scores of TurboQuant's keys, with and
//! without the paper's residual bit; their names, such as `turboquant-keys-3-qjl`, are also
//! methods.
//!
//! Bits per number and compression count all bytes that the sequences hold at the end. Methods are
//! those of `examples/methods.rs`. `--device cuda` has kernels for most of them; the row of any
//! other method has the error.

mod bootstrap;
mod generation;
mod plot;
mod size;
mod subject;
mod teacher_forced;
mod turboquant_keys;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use base_models::Pretrained;
use clap::Parser;
use longctx_eval::Haystack;
use longctx_examples::model;
use longctx_examples::place::Place;
use subject::Subject;

/// The method that the others are compared with.
const REFERENCE: &str = "dense-f16";

const METHODS: [&str; 43] = [
    REFERENCE,
    "kivi-8",
    "fp8",
    "fp8-e5m2",
    "turboquant-k8v4",
    "kivi-4",
    "int4-rotated",
    "int4-rotated-asymmetric",
    "int4-keys-rotated",
    "int4-rotated-residual",
    "int4-rotated-sinks",
    "turboquant-4bit-nc",
    "turboquant-4bit-nc-edges-f16",
    "turboquant-k3v4-nc",
    "kvarn-k4v4",
    "kvarn-k4v4-64",
    "kvarn-k4v2",
    "kvarn-k4v2-64",
    "kvarn-k3v3",
    "kvarn-k2v2",
    "kivi-3",
    "int3-rotated",
    "int3-rotated-asymmetric",
    "int3-rotated-sinks",
    "turboquant-3bit-nc",
    "turboquant-3bit-nc-edges-f16",
    "kivi-2",
    "flexgen-4",
    "flexgen-hadamard-4",
    "kivi-before-rope-4",
    "kivi-before-rope-2",
    "kivi-4-sinks",
    "kivi-2-sinks",
    "kivi-before-rope-2-sinks",
    "flexgen-4-sinks",
    "flexgen-3",
    "flexgen-hadamard-3",
    "kivi-keys-4-values-2",
    "kivi-keys-2-values-4",
    "kivi-edges-4-middle-2",
    "flexgen-4-attend-first",
    "flexgen-4-residual",
    "flexgen-hadamard-3-residual",
];

#[derive(Parser)]
#[command(about = "Quality of packed caches")]
struct Args {
    /// smollm2, gemma3, a GGUF file, a folder in Hugging Face's layout, or a model of the Hub; by
    /// default SmolLM2-135M-Instruct, downloaded if it is missing
    #[arg(long)]
    model: Option<String>,
    /// A folder of text files, or a text file
    #[arg(long, required_unless_present = "plot")]
    text: Option<PathBuf>,
    /// Tokens per context, or per prompt with --generate [default: 4096, or 256]
    #[arg(long)]
    context: Option<usize>,
    /// Number of contexts, or of prompts with --generate [default: 5, or 64]
    #[arg(long)]
    contexts: Option<usize>,
    /// Tokens fed at a time
    #[arg(long, default_value_t = 32)]
    block: usize,
    /// Measure generation: continue each prompt by this number of tokens
    #[arg(long)]
    generate: Option<usize>,
    /// Names of methods; changes are relative to dense-f16 if it is the first
    #[arg(long, value_delimiter = ',', default_values = METHODS, value_parser = Subject::named)]
    methods: Vec<Subject>,
    /// Measure the scores of TurboQuant's keys
    #[arg(long, conflicts_with_all = ["generate", "methods"])]
    scores: bool,
    /// Only plot the tables of perplexity in these files
    #[arg(long, value_delimiter = ',')]
    plot: Vec<PathBuf>,
    /// Where to save the plot
    #[arg(long, default_value = "results/kv_quality.svg")]
    out: PathBuf,
    #[command(flatten)]
    place: Place,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if !args.plot.is_empty() {
        return plot::draw(&args.plot, &args.out);
    }
    let (context, count) = if args.generate.is_some() { (256, 64) } else { (4096, 5) };
    let (context, count) = (args.context.unwrap_or(context), args.contexts.unwrap_or(count));
    let sizes = args.block > 0 && context > 1 && count > 0 && args.generate != Some(0);
    ensure!(sizes, "sizes must be positive");
    let name = model::named(args.model.as_deref())?;
    let llm = Pretrained::open(&name, &args.place.transformer())?;
    let contexts = contexts(&args, &llm, context, count)?;
    match args.generate {
        None if args.scores => turboquant_keys::table(&llm, &contexts, args.block),
        Some(tokens) => generation::table(&args.methods, REFERENCE, &llm, &contexts, tokens),
        None => teacher_forced::table(&args.methods, REFERENCE, &llm, &contexts, args.block),
    }
}

/// Returns consecutive contexts of the text.
fn contexts(args: &Args, llm: &Pretrained, context: usize, count: usize) -> Result<Vec<Vec<u32>>> {
    let all = context * count;
    let text = args.text.as_ref().context("--text is missing")?;
    let text = Haystack::from_path(text)?.words(all)?;
    let tokens = llm.tokenizer.encode(&text, true)?;
    ensure!(tokens.len() >= all, "the text has {} tokens, not {all}", tokens.len());
    Ok(tokens[..all].chunks(context).map(<[u32]>::to_vec).collect())
}

/// Returns whether the error says that the device has no kernels for a method.
fn lacks_kernels(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(longctx_core::Error::Unsupported(_)))
}
