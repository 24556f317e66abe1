//! Perplexity of a model whose keys and values are packed, by format and option.
//!
//!     cargo run --release --example kv_quality -- --text FOLDER
//!
//! The text is cut into contexts, which run side by side as a batch, a few tokens at a time, each block attending to the packed past: the decode
//! path, teacher-forced. Every token but a context's first is predicted and counted.

mod method;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use base_models::{LoadOptions, Pretrained};
use candle_core::{D, Device, IndexOp, Tensor};
use candle_nn::ops::log_softmax;
use clap::Parser;
use longctx_core::{CausalLm, Logits};
use longctx_eval::Haystack;
use longctx_examples::model;
use method::{METHODS, Method, REFERENCE};

#[derive(Parser)]
#[command(about = "Perplexity over packed caches")]
struct Args {
    /// A GGUF file, a folder in Hugging Face's layout, or a model of the Hub; by default SmolLM2-135M-Instruct, fetched if need be
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
    /// Methods to run, separated by semicolons; by default all
    #[arg(long, value_delimiter = ';')]
    methods: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.block > 0 && args.context > 1 && args.contexts > 0, "sizes must be positive");
    let name = match &args.model {
        Some(name) => name.clone(),
        None => model::smollm2()?.display().to_string(),
    };
    let llm = Pretrained::open(&name, &LoadOptions::default())?;
    let tokens = tokens(&args, &llm)?;
    println!("| method | perplexity | over f16 | compression | seconds |");
    println!("|---|---|---|---|---|");
    let mut reference = None;
    for method in chosen(&args.methods)? {
        let start = Instant::now();
        let (perplexity, bytes) = perplexity(method, &llm, &tokens, args.block)?;
        if method.name == REFERENCE {
            reference = Some(perplexity);
        }
        let change = reference.map(|f16| format!("{:+.2}%", 100.0 * (perplexity / f16 - 1.0)));
        let ratio = f16_bytes(&llm, &args) as f64 / bytes as f64;
        println!(
            "| {} | {perplexity:.3} | {} | {ratio:.2}x | {:.0} |",
            method.name,
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

fn chosen(names: &[String]) -> Result<Vec<&'static Method>> {
    let known: Vec<_> = METHODS.iter().map(|m| m.name).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        anyhow::bail!("there is no method {name:?}; there are: {}", known.join(", "));
    }
    let wanted = |m: &&Method| names.is_empty() || names.iter().any(|name| name == m.name);
    Ok(METHODS.iter().filter(wanted).collect())
}

/// `[contexts, context]`, each context beginning where the last ended.
fn tokens(args: &Args, llm: &Pretrained) -> Result<Tensor> {
    let count = args.context * args.contexts;
    let text = Haystack::from_path(&args.text)?.words(count)?;
    let mut tokens = llm.tokenizer.encode(&text, true)?;
    ensure!(tokens.len() >= count, "the text has {} tokens, not {count}", tokens.len());
    tokens.truncate(count);
    Ok(Tensor::from_vec(tokens, (args.contexts, args.context), &Device::Cpu)?)
}

/// The perplexity, and the bytes held at the end.
fn perplexity(
    method: &Method,
    llm: &Pretrained,
    tokens: &Tensor,
    block: usize,
) -> Result<(f64, usize)> {
    let mut session = llm.model.session(method.cache)?;
    let (contexts, context) = tokens.dims2()?;
    let mut loss = 0.0;
    for start in (0..context).step_by(block) {
        let fed = block.min(context - start);
        let logits = session.forward(&tokens.narrow(1, start, fed)?.contiguous()?, Logits::All)?;
        // A context's last token predicts one that is not there.
        let predicted = fed.min(context - 1 - start);
        let targets = tokens.narrow(1, start + 1, predicted)?.contiguous()?;
        let log_p = log_softmax(&logits.i((.., ..predicted))?.contiguous()?, D::Minus1)?;
        let of_targets = log_p.gather(&targets.unsqueeze(2)?, D::Minus1)?;
        loss -= f64::from(of_targets.sum_all()?.to_scalar::<f32>()?);
    }
    let counted = contexts * (context - 1);
    Ok(((loss / counted as f64).exp(), session.footprint().total()))
}
