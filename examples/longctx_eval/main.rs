//! The paper's benchmark as a command: settings times tasks, taken up again where it was broken off, and a report.
//!
//!     cargo run --release --example longctx-eval -- list
//!     cargo run --release --example longctx-eval -- run --settings dense-f16,kivi-2 --tasks qasper,needle --data FOLDER --out results/eval
//!     cargo run --release --example longctx-eval -- agree --settings kivi-2,h2o-4x --text FILE --out results/eval
//!     cargo run --release --example longctx-eval -- report results/eval

mod agree;
mod chosen;
mod method;
mod progress;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use chosen::{Chosen, MOST, TaskArgs};
use clap::{Parser, Subcommand};
use longctx_eval::{Limits, Plan, Shard, report, run, setting};
use longctx_examples::output::{check_writable, number};
use longctx_examples::say;
use longctx_examples::subject::Models;
use progress::Progress;

#[derive(Parser)]
#[command(name = "longctx-eval", about = "Which way to hold a long context, and what is given up?")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer what is not answered yet, a line of results each
    Run(RunArgs),
    /// Compare token by token with the dense model on a text
    Agree(agree::Args),
    /// Write report.md, scores.csv, report.html and the pictures into a run's folder
    Report {
        /// The folder
        folder: PathBuf,
    },
    /// Name the settings, the methods and the tasks
    List,
}

#[derive(clap::Args)]
struct RunArgs {
    #[command(flatten)]
    chosen: Chosen,
    #[command(flatten)]
    tasks: TaskArgs,
    /// The most samples of a task
    #[arg(long, value_parser = number::<1, MOST>)]
    samples: Option<usize>,
    /// The most tokens to write in a turn
    #[arg(long, value_parser = number::<1, MOST>)]
    max_new: Option<usize>,
    /// This process's part of the work, as in 2/4; each part writes a file of its own
    #[arg(long, default_value = "1/1", value_parser = shard)]
    shard: Shard,
    /// Break off at the first bad record or failing sample
    #[arg(long)]
    strict: bool,
    /// The run's folder
    #[arg(long)]
    out: PathBuf,
}

fn main() -> Result<()> {
    match Args::parse().command {
        Command::Run(args) => answer(args),
        Command::Agree(args) => agree::agree(args),
        Command::Report { folder } => {
            for path in report::write(&folder)? {
                say!("{}", path.display());
            }
            Ok(())
        }
        Command::List => {
            list();
            Ok(())
        }
    }
}

fn answer(args: RunArgs) -> Result<()> {
    check_writable(&args.out)?;
    let models = args.chosen.models();
    let methods = method::all(&models);
    let settings = args.chosen.settings(&methods)?;
    let tasks = args.tasks.open(&models, &settings)?;
    let mut conditions = args.chosen.conditions(&settings)?;
    conditions.extend(args.tasks.conditions(&tasks, &settings)?);
    let plan = Plan {
        folder: args.out,
        settings,
        tasks: &tasks,
        limits: Limits { samples: args.samples, max_new_tokens: args.max_new },
        shard: args.shard,
        seed: args.tasks.seed,
        strict: args.strict,
        conditions,
    };
    let mut progress = Progress::new()?;
    let summary = run(&plan, &methods, &mut |event| progress.show(&event))?;
    progress.end();
    say!(
        "{} answered, {} before, {} failed, {} records left out.",
        summary.answered,
        summary.before,
        summary.failed,
        summary.skipped
    );
    let (model, total) = (summary.model.as_secs_f64(), summary.total.as_secs_f64());
    if summary.answered > 0 {
        let share = 100.0 * (1.0 - model / total);
        say!("{model:.1} s in the models, {total:.1} s in all: {share:.2} % around them.");
    }
    let failed = summary.failed;
    ensure!(failed == 0 || summary.answered > 0, "all {failed} samples failed");
    Ok(())
}

fn list() {
    let models = Models::default();
    let methods = method::all(&models);
    say!("Settings of the paper:");
    for setting in setting::paper() {
        let note = if methods.has(&setting) { "" } else { "  (not available)" };
        say!("  {:28} {} to {} tokens{note}", setting.name, setting.model, setting.context);
    }
    say!("Methods, each of which is a setting with --model:");
    let mut names: Vec<_> = methods.names().collect();
    names.sort_by_key(|name| family(name));
    for family in names.chunk_by(|a, b| family(a) == family(b)) {
        say!("  {}", family.join(" "));
    }
    say!("Tasks:");
    chosen::task_names().for_each(|name| say!("  {name}"));
}

/// A name without its ratio: what `list` puts on one line.
fn family(name: &str) -> &str {
    match name.rsplit_once('-') {
        Some((family, size)) if size.ends_with('x') => family,
        _ => name,
    }
}

fn shard(text: &str) -> Result<Shard, String> {
    let wrong = || format!("expected a part like 2/4, got {text:?}");
    let (index, count) = text.split_once('/').ok_or_else(wrong)?;
    let number = |text: &str| text.parse().map_err(|_| wrong());
    Ok(Shard { index: number(index)?, count: number(count)? })
}
