//! The command `longctx`.
//!
//!     cargo install --path examples/longctx
//!     longctx compare
//!     longctx eval run --settings dense-f16,kivi-2 --tasks needle --out results/eval
//!     longctx plan --model FOLDER --memory 80GiB --context 32768
//!     longctx serve --method kivi-4
//!     longctx compress --rate 0.5 --question "Who came late?" minutes.txt

mod compare;
mod compress;
mod eval;
mod plan;

use anyhow::Result;
use clap::Parser;

/// The largest accepted number of tokens or words, more than any model reads.
const MAX_COUNT: usize = 10_000_000;

#[derive(Parser)]
#[command(name = "longctx", version, about = "Long contexts in little memory")]
enum Command {
    /// Compare methods on the needle (passkey) test: keys found, bytes, speed
    Compare(Box<compare::Args>),
    /// Evaluate methods: quality, memory and speed
    #[command(subcommand)]
    Eval(eval::Command),
    /// Compute how many tokens and sequences fit in a given memory under each method, without
    /// weights
    Plan(plan::Args),
    /// Serve a model over the OpenAI API, many sequences at a time
    Serve(Box<longctx_serve::Args>),
    /// Compress a prompt
    Compress(compress::Args),
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Compare(args) => compare::compare(*args),
        Command::Eval(command) => eval::eval(command),
        Command::Plan(args) => plan::plan(args),
        Command::Serve(args) => longctx_serve::serve(*args),
        Command::Compress(args) => compress::compress(args),
    }
}
