//! Compresses a prompt.
//!
//!     longctx compress --rate 0.5 --question "Who came late?" minutes.txt
//!     longctx compress --method llmlingua2 --encoder FOLDER --rate 0.25 < report.txt
//!
//! The compressed text is written to standard output. The counts, and on a terminal a coloured
//! diff, are written to standard error.

mod diff;
mod method;

use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use longctx_core::{Prompt, PromptCompressor, Rate};
use method::{Method, Models};
use prompt_compress::{StructuredPrompt, cl100k_tokens};

#[derive(clap::Args)]
pub struct Args {
    /// A file; by default standard input
    file: Option<PathBuf>,
    /// The share of tokens to keep, in (0, 1]
    #[arg(long, default_value_t = 0.5)]
    rate: f64,
    /// The compressor
    #[arg(long, value_enum, default_value_t = Method::Llmlingua)]
    method: Method,
    /// The question about the text, for compressors that use it
    #[arg(long)]
    question: Option<String>,
    /// Parse llmlingua's section tags in the text: `<llmlingua, rate=0.3>…</llmlingua>`,
    /// `<llmlingua, compress=False>…</llmlingua>`
    #[arg(long)]
    tags: bool,
    /// Show the coloured diff even if standard error is not a terminal
    #[arg(long)]
    diff: bool,
    #[command(flatten)]
    models: Models,
}

pub fn compress(args: Args) -> Result<()> {
    let text = match &args.file {
        Some(file) => std::fs::read_to_string(file).with_context(|| file.display().to_string())?,
        None => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            text
        }
    };
    let rate = Rate::new(args.rate)?;
    let mut compressor = args.method.open(&args.models)?;
    let (text, compressed) = if args.tags {
        let mut prompt = StructuredPrompt::parse(&text)?;
        if let Some(question) = &args.question {
            prompt = prompt.question(question);
        }
        (prompt.text(), prompt.compress_with(&mut compressor, rate)?)
    } else {
        let prompt = Prompt { question: args.question.as_deref(), ..Prompt::new(&text)? };
        let compressed = compressor.compress(prompt, rate)?;
        (text, compressed)
    };
    print(&compressed.text)?;
    if args.diff || std::io::stderr().is_terminal() {
        eprintln!("{}", diff::coloured(&text, &compressed));
    }
    let (before, after) = (cl100k_tokens(&text), cl100k_tokens(&compressed.text));
    let times = before as f64 / after.max(1) as f64;
    eprintln!("{before} tokens before, {after} after: {times:.2}x (cl100k_base)");
    Ok(())
}

/// Prints the text, on a terminal with a newline after it. A closed pipe is not an error.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let end = if out.is_terminal() && !text.ends_with('\n') { "\n" } else { "" };
    match write!(out, "{text}{end}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}
