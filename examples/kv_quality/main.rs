//! Perplexity of a model whose keys and values are packed, by format and option.
//!
//!     cargo run --release --example kv_quality -- --text FOLDER
//!
//! The text is cut into contexts, which run side by side as a batch, a few tokens at a time, each
//! block attending to the packed past: the decode path, teacher-forced. Every token but a context's
//! first is predicted and counted. Methods are those of `examples/methods.rs`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use base_models::{LoadOptions, Pretrained};
use candle_core::{D, Device, Tensor};
use candle_nn::ops::log_softmax;
use clap::Parser;
use longctx_core::{Batch, CausalLm, Logits};
use longctx_eval::Haystack;
use longctx_examples::methods::Method;
use longctx_examples::model;

/// What the others are compared with.
const REFERENCE: &str = "dense-f16";

const METHODS: [&str; 23] = [
    REFERENCE,
    "kivi-8",
    "kivi-4",
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
    "flexgen-2",
    "flexgen-hadamard-2",
    "kivi-3",
    "kivi-keys-4-values-2",
    "kivi-keys-2-values-4",
    "kivi-edges-4-middle-2",
    "flexgen-4-attend-first",
    "flexgen-4-residual",
    "flexgen-hadamard-3-residual",
];

#[derive(Parser)]
#[command(about = "Perplexity over packed caches")]
struct Args {
    /// smollm2, gemma3, a GGUF file, a folder in Hugging Face's layout, or a model of the Hub; by default SmolLM2-135M-Instruct, fetched if need be
    #[arg(long)]
    model: Option<String>,
    /// A folder of text, or a text file
    #[arg(long)]
    text: PathBuf,
    /// Tokens of a context
    #[arg(long, default_value_t = 4096)]
    context: usize,
    /// Contexts
    #[arg(long, default_value_t = 5)]
    contexts: usize,
    /// Tokens fed at a time
    #[arg(long, default_value_t = 32)]
    block: usize,
    /// Methods to run, by name; changes are relative to dense-f16, if it comes first
    #[arg(long, value_delimiter = ',', default_values = METHODS, value_parser = Method::named)]
    methods: Vec<Method>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.block > 0 && args.context > 1 && args.contexts > 0, "sizes must be positive");
    let name = model::named(args.model.as_deref())?;
    let llm = Pretrained::open(&name, &LoadOptions::default())?;
    let contexts = contexts(&args, &llm)?;
    println!("| method | perplexity | over f16 | compression | seconds |");
    println!("|---|---|---|---|---|");
    let mut reference = None;
    for method in &args.methods {
        let start = Instant::now();
        let (perplexity, bytes) = perplexity(method, &llm, &contexts, args.block)?;
        if method.name() == REFERENCE {
            reference = Some(perplexity);
        }
        let change = reference.map(|f16| format!("{:+.2}%", 100.0 * (perplexity / f16 - 1.0)));
        let ratio = f16_bytes(&llm, &args) as f64 / bytes as f64;
        println!(
            "| {} | {perplexity:.3} | {} | {ratio:.2}x | {:.0} |",
            method.name(),
            change.unwrap_or_default(),
            start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

/// Bytes of all keys and values in f16.
fn f16_bytes(llm: &Pretrained, args: &Args) -> usize {
    let c = llm.model.config();
    2 * 2 * c.layers * c.kv_heads * c.head_dim * args.context * args.contexts
}

/// The contexts, each beginning where the last ended.
fn contexts(args: &Args, llm: &Pretrained) -> Result<Vec<Vec<u32>>> {
    let count = args.context * args.contexts;
    let text = Haystack::from_path(&args.text)?.words(count)?;
    let tokens = llm.tokenizer.encode(&text, true)?;
    ensure!(tokens.len() >= count, "the text has {} tokens, not {count}", tokens.len());
    Ok(tokens[..count].chunks(args.context).map(<[u32]>::to_vec).collect())
}

/// The perplexity, and the bytes held at the end.
fn perplexity(
    method: &Method,
    llm: &Pretrained,
    contexts: &[Vec<u32>],
    block: usize,
) -> Result<(f64, usize)> {
    let mut session = llm.model.session(|spec| method.cache(spec))?;
    let len = contexts[0].len();
    let mut loss = 0.0;
    for start in (0..len).step_by(block) {
        let fed = block.min(len - start);
        let lens: Vec<_> = (0..).zip(contexts).map(|(seq, _)| (seq, fed)).collect();
        let ids: Vec<_> = contexts.iter().flat_map(|c| &c[start..start + fed]).copied().collect();
        let logits = session.forward(&Batch::new(&lens)?, &ids, Logits::All)?;
        // A context's last token predicts one that is not there.
        let predicted = fed.min(len - 1 - start);
        let logits = logits.reshape((contexts.len(), fed, ()))?.narrow(1, 0, predicted)?;
        let log_p = log_softmax(&logits.contiguous()?, D::Minus1)?;
        let targets = contexts.iter().map(|c| &c[start + 1..start + 1 + predicted]);
        let targets =
            targets.map(|c| Tensor::new(c, &Device::Cpu)).collect::<Result<Vec<_>, _>>()?;
        let of_targets = log_p.gather(&Tensor::stack(&targets, 0)?.unsqueeze(2)?, D::Minus1)?;
        loss -= f64::from(of_targets.sum_all()?.to_scalar::<f32>()?);
    }
    let counted = contexts.len() * (len - 1);
    Ok(((loss / counted as f64).exp(), session.footprint().total()))
}
