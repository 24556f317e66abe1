//! The paper's benchmark as a command: runs settings times tasks, resumes an interrupted run, and
//! writes reports.
//!
//!     longctx eval list
//!     longctx eval run --settings dense-f16,kivi-2 --tasks qasper,needle --out results/eval
//!     longctx eval agree --settings kivi-2,h2o-4x --text FILE --out results/eval
//!     longctx eval report results/eval

mod agree;
mod failures;
mod groups;
mod method;
mod options;
mod progress;
mod results_table;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Subcommand;
use failures::Failures;
use longctx_eval::statistics::{self, Difference, Verdict};
use longctx_eval::{
    Limits, Methods, Plan, Setting, Shard, Summary, Task, records, report, run, setting,
};
use longctx_examples::output::{check_writable, number, within};
use longctx_examples::say;
use longctx_examples::subject::Models;
use options::{SettingOptions, TaskOptions};
use progress::Progress;
use results_table::ResultsTable;

use crate::MAX_COUNT;

#[derive(Subcommand)]
pub enum Command {
    /// Answer all samples that have no result yet, one line of results per sample. The exit code is
    /// 1 if a sample that was tried has no result
    Run(Box<RunArgs>),
    /// Compare settings with the dense model token by token on a text
    Agree(Box<agree::Args>),
    /// Write report.md, scores.csv, report.html and the plots into a run's folder
    Report {
        /// The run's folder; with --compare, the folder of the new compare.html
        folder: PathBuf,
        /// The folders of two runs to compare, setting by setting
        #[arg(long, num_args = 2, value_names = ["A", "B"])]
        compare: Vec<PathBuf>,
    },
    /// List the settings, the methods and the tasks
    List,
}

#[derive(clap::Args)]
pub struct RunArgs {
    #[command(flatten)]
    options: SettingOptions,
    #[command(flatten)]
    tasks: TaskOptions,
    /// The largest number of samples of a task
    #[arg(long, value_parser = number::<1, MAX_COUNT>)]
    samples: Option<usize>,
    /// The largest number of new tokens per turn
    #[arg(long, value_parser = number::<1, MAX_COUNT>)]
    max_new: Option<usize>,
    /// Samples of a setting that are decoded as one batch; for a server, its setting's
    /// `concurrency` applies instead
    #[arg(long, default_value_t = 1, value_parser = number::<1, 4096>)]
    batch: usize,
    /// Compute the prefill of each prompt once for consecutive settings that differ only in the
    /// cache; their speeds are then not measured
    #[arg(long, conflicts_with = "prefill_chunk")]
    share_prefill: bool,
    /// This process's part of the work, such as 2/4; each part writes its own file
    #[arg(long, default_value = "1/1", value_parser = shard)]
    shard: Shard,
    /// Start with 16 samples of a task and double them for settings without a verdict against the
    /// dense setting, until each has one or no samples are left
    #[arg(long)]
    until_sure: bool,
    /// The difference that --until-sure ignores, in points of a score from 0 to 100
    #[arg(long, default_value_t = 2.0, value_parser = within(0.0..=100.0))]
    margin: f64,
    /// Stop at the first bad record or failing sample
    #[arg(long)]
    strict: bool,
    /// The run's folder
    #[arg(long)]
    out: PathBuf,
}

pub fn eval(command: Command) -> Result<()> {
    match command {
        Command::Run(args) => answer(*args),
        Command::Agree(args) => agree::agree(*args),
        Command::Report { folder, compare } => {
            let written = match compare.as_slice() {
                [a, b] => vec![report::compare(a, b, &folder)?],
                _ => report::write(&folder)?,
            };
            for path in written {
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
    ensure!(
        !args.until_sure || args.shard == Shard::WHOLE,
        "--until-sure needs the whole run: shards do not see each other's results"
    );
    let models = args.options.models(args.batch);
    let methods = method::all(&models, args.share_prefill);
    let settings = args.options.settings(&methods)?;
    let tasks = args.tasks.open(&models, &settings)?;
    let mut conditions = args.options.conditions(&settings)?;
    conditions.extend(args.tasks.conditions(&tasks, &settings)?);
    let samples =
        if args.until_sure { Some(args.samples.unwrap_or(FIRST_SAMPLES)) } else { args.samples };
    let mut plan = Plan {
        folder: args.out,
        settings,
        tasks: &tasks,
        limits: Limits { samples, max_new_tokens: args.max_new },
        shard: args.shard,
        seed: args.tasks.seed,
        strict: args.strict,
        conditions,
    };
    let mut failures = Failures::default();
    let mut summary = pass(&plan, &methods, &mut failures)?;
    // A pass in which every sample failed is not followed by another one.
    while args.until_sure && (summary.answered > 0 || summary.failed == 0) {
        let samples = plan.limits.samples.unwrap_or(FIRST_SAMPLES);
        plan.settings = unsure(&plan, args.margin / 100.0)?;
        if plan.settings.is_empty() || samples >= most_samples(&tasks)? {
            break;
        }
        plan.limits.samples = Some(2 * samples);
        let names: Vec<&str> = plan.settings.iter().map(|setting| setting.name.as_str()).collect();
        say!("{} samples a task, for {}", 2 * samples, names.join(", "));
        summary = pass(&plan, &methods, &mut failures)?;
    }
    failures.check()
}

/// The number of samples of a task that --until-sure starts with.
const FIRST_SAMPLES: usize = 16;

fn most_samples(tasks: &[Box<dyn Task>]) -> Result<usize> {
    let counts = tasks.iter().map(|task| Ok(task.samples()?.samples.len()));
    Ok(counts.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(0))
}

/// Returns the settings that need more samples, and the dense settings that they are compared with.
fn unsure(plan: &Plan<'_>, margin: f64) -> Result<Vec<Setting>> {
    let records = records(&plan.folder)?;
    let names: Vec<String> = plan.settings.iter().map(|setting| setting.name.clone()).collect();
    let mut wanted = std::collections::BTreeSet::new();
    for name in &names {
        let Some(reference) = statistics::reference(&names, name).filter(|other| other != name)
        else {
            continue;
        };
        let difference = Difference::between(&records, name, reference);
        if difference.is_none_or(|difference| difference.verdict(margin) == Verdict::Unsure) {
            wanted.extend([name.clone(), reference.to_owned()]);
        }
    }
    Ok(plan.settings.iter().filter(|setting| wanted.contains(&setting.name)).cloned().collect())
}

/// Answers the samples that have no result yet and prints a summary.
fn pass(plan: &Plan<'_>, methods: &Methods<'_>, failures: &mut Failures) -> Result<Summary> {
    let mut progress = Progress::new()?;
    let mut results = ResultsTable::new(&plan.folder, &plan.settings);
    let summary = run(plan, methods, &mut |event| {
        progress.show(&event);
        failures.update(&event);
        if let Some(row) = results.row(&event) {
            progress.row(&row);
        }
    })?;
    progress.end();
    say!(
        "{} samples answered, {} answered before, {} failed, {} records skipped.",
        summary.answered,
        summary.before,
        summary.failed,
        summary.skipped
    );
    let (model, total) = (summary.model.as_secs_f64(), summary.total.as_secs_f64());
    if summary.answered > 0 {
        let share = 100.0 * (1.0 - model / total);
        say!("{model:.1} s in models of {total:.1} s in total; {share:.2} % in the harness.");
    }
    Ok(summary)
}

fn list() {
    let models = Models::default();
    let methods = method::all(&models, false);
    say!("Settings of the paper:");
    for setting in setting::paper() {
        let note = if methods.has(&setting) { "" } else { "  (not available)" };
        say!("  {:28} {} to {} tokens{note}", setting.name, setting.model, setting.context);
    }
    say!("\nMethods, each a setting with --model:");
    let mut names: Vec<_> = methods.names().collect();
    names.sort_by_key(|name| (groups::group(name), family(name)));
    for group in names.chunk_by(|a, b| groups::group(a) == groups::group(b)) {
        say!("\n{}", groups::group(group[0]).title());
        for family in group.chunk_by(|a, b| family(a) == family(b)) {
            say!("  {:84} {}", family.join(" "), groups::description(family[0]));
        }
    }
    say!("\nTasks, by group:");
    for (group, tasks) in options::task_groups() {
        say!("  {group}: {}", tasks.join(" "));
    }
}

/// Returns a name without its ratio; `list` prints names with the same result on one line.
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
