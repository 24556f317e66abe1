//! Compares few tokens in full precision with many tokens in few bits: the needle test over
//! policies, stores and memory budgets.
//!
//!     cargo run --release --example trade_off
//!     cargo run --release --example trade_off -- --equal tokens --stores f16 --policies all \
//!         --shares 0.5,0.25,0.125
//!
//! The prefill is exact and shared by all caches; each cache then decodes separately. With
//! `--prefill-chunk` each cache has a separate prefill in chunks.

mod cell;
mod plot;
mod report;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use base_models::Pretrained;
use cell::{Cell, Equal};
use clap::Parser;
use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};
use longctx_core::{Batch, CausalLm, Footprint, Logits, SeqId};
use longctx_eval::Haystack;
use longctx_eval::needle::{Needle, Sample, score};
use longctx_examples::heads::Heads;
use longctx_examples::methods::Store;
use longctx_examples::model;
use longctx_examples::output::within;
use longctx_examples::place::Place;
use longctx_examples::shared_prefill::SharedPrefill;
use report::Row;
use serde::Serialize;

#[derive(Parser)]
#[command(about = "Sweeps eviction policies, stores and budgets over the needle (passkey) test")]
struct Args {
    /// A GGUF file, a folder in Hugging Face's layout, or a model of the Hub; by default
    /// SmolLM2-135M-Instruct, downloaded if it is missing
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    place: Place,
    /// Lengths of the prompts, in tokens
    #[arg(long, value_delimiter = ',', default_values_t = [2000])]
    tokens: Vec<usize>,
    /// Depths of the key: 0 is the start, 1 the end; each has a prompt with a different key
    #[arg(long, value_delimiter = ',', default_values_t = [0.1, 0.3, 0.5, 0.7, 0.9], value_parser = within(0.0..=1.0))]
    depths: Vec<f64>,
    /// Names of policies; "dense" keeps everything, "all" selects all
    #[arg(long, value_delimiter = ',', default_values = ["dense", "recent", "snap-kv", "h2o", "tova"], value_parser = names())]
    policies: Vec<String>,
    /// Stores of keys and values
    #[arg(long, value_delimiter = ',', default_values = ["f16", "kivi-4", "kivi-2"])]
    stores: Vec<Store>,
    /// Shares of the dense f16 cache, in layers without a sliding window
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.25, 0.125, 0.0625])]
    shares: Vec<f64>,
    /// The unit of shares
    #[arg(long, default_value = "bytes")]
    equal: Equal,
    /// Tokens of the prompt to feed at a time; by default the whole prompt, whose attention is then
    /// exact
    #[arg(long)]
    prefill_chunk: Option<usize>,
    /// Tokens to generate per answer
    #[arg(long, default_value_t = 12)]
    max_tokens: usize,
    /// Path of the saved table and plot, without extension
    #[arg(long, default_value = "results/trade_off")]
    out: PathBuf,
    /// Only plot a table that was saved as JSON
    #[arg(long)]
    redraw: Option<PathBuf>,
    /// Only save the prompts, their tokens and their keys in this JSON file
    #[arg(long)]
    save_prompts: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(!args.depths.is_empty(), "at least one depth");
    if let Some(table) = &args.redraw {
        return plot::save(&report::open(table)?, &args.out.with_extension("svg"));
    }
    let name = model::named(args.model.as_deref())?;
    let llm = Pretrained::open(&name, &args.place.transformer())?;
    if let Some(path) = &args.save_prompts {
        return save_prompts(&args, &llm, path);
    }
    // DuoAttention's scores are measured only for models without sliding windows.
    let windowed = llm.model.config().windows.iter().any(Option::is_some);
    let policies = match args.policies.iter().any(|policy| policy == "all") {
        true => {
            let fits = |policy: &&str| *policy != "duo-attention" || !windowed;
            cell::policies().filter(fits).map(String::from).collect()
        }
        false => args.policies.clone(),
    };
    let duo = policies.iter().any(|policy| policy == "duo-attention");
    ensure!(!(duo && windowed), "duo-attention: the model has layers with a sliding window");
    let heads = match duo {
        true => Heads::measure(&llm)?,
        false => Heads::default(),
    };
    let mut rows: Vec<Row> = Vec::new();
    for &tokens in &args.tokens {
        let cells = cells(&args, &policies, &heads, tokens)?;
        let prompts = prompts(&args, &llm, tokens)?;
        println!("{tokens} tokens: {} caches x {} prompts", cells.len(), prompts.len());
        let bar = ProgressBar::new((cells.len() * prompts.len()) as u64);
        bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} (left: {eta})")?);
        let mut own: Vec<_> = cells.iter().map(|cell| Row::new(cell, tokens)).collect();
        for Prompt { tokens, answer } in &prompts {
            let answers = match args.prefill_chunk {
                None => at_once(&llm, &cells, tokens, &args, &bar)?,
                Some(chunk) => one_by_one(&llm, &cells, tokens, chunk, &args, &bar)?,
            };
            for (row, (text, bytes)) in own.iter_mut().zip(answers) {
                row.add(score(&text, answer), bytes);
            }
        }
        bar.finish_and_clear();
        report::print(&own);
        rows.extend(own);
        report::save(&rows, &args.out)?;
    }
    plot::save(&rows, &args.out.with_extension("svg"))
}

fn names() -> PossibleValuesParser {
    PossibleValuesParser::new(cell::policies().chain(["all"]))
}

fn cells(args: &Args, policies: &[String], heads: &Heads, tokens: usize) -> Result<Vec<Cell>> {
    let (dense, policies): (Vec<&String>, Vec<_>) = policies.iter().partition(|p| *p == "dense");
    let mut cells: Vec<_> = dense.iter().map(|_| Cell::dense()).collect();
    for &share in &args.shares {
        ensure!(share > 0.0 && share < 1.0, "a share between 0 and 1, not {share}");
        for &store in &args.stores {
            for policy in &policies {
                cells.extend(Cell::new(policy, store, share, args.equal, tokens, heads)?);
            }
        }
    }
    Ok(cells)
}

#[derive(Serialize)]
struct Prompt {
    tokens: Vec<u32>,
    /// The key in the prompt.
    answer: String,
}

fn save_prompts(args: &Args, llm: &Pretrained, path: &Path) -> Result<()> {
    let of_length = |&tokens| prompts(args, llm, tokens);
    let prompts: Vec<_> = args.tokens.iter().map(of_length).collect::<Result<_>>()?;
    let all: Vec<_> = prompts.iter().flatten().collect();
    fs::write(path, serde_json::to_string(&all)?).with_context(|| path.display().to_string())
}

fn prompts(args: &Args, llm: &Pretrained, tokens: usize) -> Result<Vec<Prompt>> {
    let haystack = Haystack::generated(0);
    let count = |text: &str| anyhow::Ok(llm.tokenizer.encode(text.trim_end(), true)?.len());
    let prompt = |&depth: &f64| {
        // A different key for each depth, the same in every run.
        let seed = (depth * 1000.0) as u64;
        let needle = Needle { depth, digits: 7, seed };
        let Sample { prompt, answer } = needle.in_tokens(&haystack, tokens, count)?;
        // The prompt ends before the key. Its last space is removed: it would be a separate token.
        Ok(Prompt { tokens: llm.tokenizer.encode(prompt.trim_end(), true)?, answer })
    };
    args.depths.iter().map(prompt).collect()
}

type Answers = Vec<(String, Footprint)>;

/// Answers with one exact prefill for all caches.
fn at_once(
    llm: &Pretrained,
    cells: &[Cell],
    prompt: &[u32],
    args: &Args,
    bar: &ProgressBar,
) -> Result<Answers> {
    let mut session = llm.model.session(|spec| {
        let caches = cells.iter().map(|cell| cell.cache(spec));
        let caches = caches.collect::<longctx_core::Result<_>>()?;
        Ok(SharedPrefill::new(spec.clone(), caches))
    })?;
    let of_all = cells.len() as SeqId;
    let first = feed(&mut session, of_all, prompt)?;
    let mut answers = Vec::new();
    for seq in 0..of_all {
        session.fork(of_all, seq)?;
        answers.push(answer(llm, &mut session, seq, first, args)?);
        bar.inc(1);
    }
    Ok(answers)
}

/// Answers with a chunked prefill for each cache.
fn one_by_one(
    llm: &Pretrained,
    cells: &[Cell],
    prompt: &[u32],
    chunk: usize,
    args: &Args,
    bar: &ProgressBar,
) -> Result<Answers> {
    let mut answers = Vec::new();
    for cell in cells {
        let mut session = llm.model.session(|spec| cell.cache(spec))?;
        let mut first = 0;
        for chunk in prompt.chunks(chunk) {
            first = feed(&mut session, 0, chunk)?;
        }
        answers.push(answer(llm, &mut session, 0, first, args)?);
        bar.inc(1);
    }
    Ok(answers)
}

/// Continues greedily after the first token of the answer. Returns the answer and the bytes held at
/// its end.
fn answer(
    llm: &Pretrained,
    session: &mut impl CausalLm,
    seq: SeqId,
    first: u32,
    args: &Args,
) -> Result<(String, Footprint)> {
    let mut tokens = vec![first];
    while tokens.len() < args.max_tokens {
        let next = feed(session, seq, &tokens[tokens.len() - 1..])?;
        if llm.model.config().eos.contains(&next) {
            break;
        }
        tokens.push(next);
    }
    Ok((llm.tokenizer.decode(&tokens)?, session.seq_footprint(seq)))
}

/// Feeds tokens and returns the most probable next token.
fn feed(session: &mut impl CausalLm, seq: SeqId, ids: &[u32]) -> Result<u32> {
    let logits = session.forward(&Batch::single(seq, ids.len())?, ids, Logits::Last)?;
    Ok(logits.flatten_all()?.argmax(0)?.to_scalar()?)
}
