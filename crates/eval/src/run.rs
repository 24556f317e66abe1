//! Runs: settings times tasks, one line per answer, resumable.

mod content;
mod folder;
mod methods;
mod pending;
mod reader;
mod record;
mod running;
#[cfg(feature = "http")]
mod server;
mod shorten;
mod subject;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use content::content_hash;
pub use folder::{Manifest, records};
pub use methods::Methods;
pub use reader::{Reader, Text};
pub use record::{Record, Timings};
#[cfg(feature = "http")]
pub use server::Server;
pub use subject::{Answer, Passage, Question, Queue, Subject, SubjectError};

use self::content::question_hash;
use self::folder::{Results, join};
use self::pending::Pending;
use crate::{Error, Result, Sample, Setting, Task, peak_memory};

/// Limits for every sample of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// The largest number of samples of a task; the first ones are used. A folder's run can grow: a
    /// later process may use a larger number.
    pub samples: Option<usize>,
    /// The largest number of new tokens per turn, if the task allows more.
    pub max_new_tokens: Option<usize>,
}

/// The part of a run that this process executes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    /// Index of the part, from 1 to `count`.
    pub index: usize,
    /// Number of processes that share the work.
    pub count: usize,
}

impl Shard {
    /// The whole run.
    pub const WHOLE: Self = Self { index: 1, count: 1 };

    fn check(self) -> Result<()> {
        if self.count == 0 {
            return Err(Error::setting("number of shards", "at least 1", 0));
        }
        match (1..=self.count).contains(&self.index) {
            true => Ok(()),
            false => Err(Error::setting("shard", format!("1 to {}", self.count), self.index)),
        }
    }
}

/// A run.
pub struct Plan<'a> {
    /// The folder of the results.
    pub folder: PathBuf,
    /// The settings to evaluate.
    pub settings: Vec<Setting>,
    /// The tasks.
    pub tasks: &'a [Box<dyn Task>],
    /// Limits for every sample.
    pub limits: Limits,
    /// The part of this process.
    pub shard: Shard,
    /// Seed, recorded with every result. The caller generates tasks from it.
    pub seed: u64,
    /// Whether the first bad record of a task's data, or the first error of a subject, stops the
    /// run. Otherwise it is skipped.
    pub strict: bool,
    /// Other conditions that affect an answer, by name: the content of a model's files
    /// ([`content_hash`]), the prefill chunk, the arguments of methods. A folder's run refuses
    /// another value of an existing name; new names can be added.
    pub conditions: BTreeMap<String, String>,
}

/// An event during a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// An incomplete last line of an earlier process was dropped. Its sample will be answered
    /// again.
    Dropped(&'a str),
    /// A record of a task's data was skipped.
    Skipped(&'a Error),
    /// The run started, with the number of answers of this process and of those that already exist.
    Started {
        /// Samples times settings.
        total: usize,
        /// Answers that already exist.
        done: usize,
    },
    /// A setting's subject is being opened.
    Opening(&'a Setting),
    /// A sample was answered.
    Answered(&'a Record),
    /// All of this process's samples of a setting have been tried.
    Finished(&'a Setting),
    /// A sample could not be answered, or a setting could not be opened. There is no result, and a
    /// later run tries again.
    Failed(&'a Error),
}

/// The counts and times of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// Samples answered by this process.
    pub answered: usize,
    /// Samples answered by earlier processes.
    pub before: usize,
    /// Samples that could not be answered.
    pub failed: usize,
    /// Records of the tasks' data that were skipped.
    pub skipped: usize,
    /// Time within models and prompt compressors.
    pub model: Duration,
    /// Time of answering, scoring and writing results, without opening models.
    pub total: Duration,
}

/// Answers the samples that have no result yet.
///
/// A subject that cannot be opened is reported once, and its samples count as failed, unless the
/// plan is strict. If a subject for several settings cannot be opened, one is opened for each half
/// of the settings.
///
/// # Errors
/// - [`Error::Setting`] if the folder belongs to a run with another token limit or seed, or with
///   other settings or conditions of the same name; if it has a result for another question of the
///   same name; or if another process writes the same shard.
/// - [`Error::NotAvailable`], before anything runs, if a setting's method is not registered.
/// - If the plan is strict, the first bad record or failing subject.
pub fn run(
    plan: &Plan<'_>,
    methods: &Methods<'_>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Summary> {
    plan.shard.check()?;
    plan.settings.iter().try_for_each(|setting| methods.check(setting))?;
    // The folder is checked first, because generating questions can take long.
    join(&plan.folder, &plan.manifest())?;
    let (mut results, torn) = Results::open(&plan.folder, plan.shard)?;
    let mut summary = Summary::default();
    let samples = load(plan, &mut summary, on_event)?;
    if let Some(torn) = &torn {
        on_event(Event::Dropped(torn));
    }
    let done = records(&plan.folder)?.into_iter().map(|record| (record.key(), record.question));
    let done: HashMap<_, _> = done.collect();
    let units = plan.units(&samples);
    units.iter().try_for_each(|unit| unit.check(&done))?;
    let open = |unit: &&Job<'_>| !done.contains_key(&unit.key());
    summary.before = units.iter().filter(|unit| !open(unit)).count();
    on_event(Event::Started { total: units.len(), done: summary.before });
    let mut groups = VecDeque::from(methods.groups(&plan.settings));
    while let Some(group) = groups.pop_front() {
        let in_group = |unit: &&Job<'_>| group.contains(&unit.place.2);
        let mut open: Vec<&Job<'_>> = units.iter().filter(in_group).filter(open).collect();
        if open.is_empty() {
            continue;
        }
        // A prompt is asked under all settings of the group before the next one.
        open.sort_by_key(|unit| unit.place);
        let settings = &plan.settings[group.clone()];
        let asked =
            |setting: &&Setting| open.iter().any(|unit| std::ptr::eq(unit.setting, *setting));
        settings.iter().filter(asked).for_each(|setting| on_event(Event::Opening(setting)));
        // One at a time: two models may not fit in memory.
        let mut subject = match methods.open_group(settings) {
            Ok(subject) => subject,
            // Only those settings of a group that cannot be opened fail.
            Err(_) if group.len() > 1 => {
                let middle = group.start + group.len() / 2;
                groups.push_front(middle..group.end);
                groups.push_front(group.start..middle);
                continue;
            }
            Err(error) if plan.strict => return Err(error),
            Err(error) => {
                summary.failed += open.len();
                on_event(Event::Failed(&error));
                continue;
            }
        };
        let started = Instant::now();
        let queue = (group.start, open.as_slice());
        let mut pending = Pending::new(plan, queue, &mut results, &mut summary, on_event);
        subject.answer_all(&mut pending);
        pending.end()?;
        summary.total += started.elapsed();
        settings.iter().filter(asked).for_each(|setting| on_event(Event::Finished(setting)));
    }
    Ok(summary)
}

/// A sample and the digest of its question.
struct LoadedSample {
    sample: Sample,
    question: String,
}

/// Loads each task's samples, up to the limit. The tasks generate or read theirs in parallel.
fn load(
    plan: &Plan<'_>,
    summary: &mut Summary,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Vec<Vec<LoadedSample>>> {
    let loaded: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            plan.tasks.iter().map(|task| scope.spawn(|| task.samples())).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join();
        threads.into_iter().map(join).collect()
    });
    let mut all = Vec::new();
    for (task, loaded) in plan.tasks.iter().zip(loaded) {
        let mut of_task = loaded.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        summary.skipped += of_task.skipped.len();
        of_task.skipped.iter().for_each(|error| on_event(Event::Skipped(error)));
        if plan.strict && !of_task.skipped.is_empty() {
            return Err(of_task.skipped.remove(0));
        }
        of_task.samples.truncate(plan.limits.samples.unwrap_or(usize::MAX));
        let asked = |sample: Sample| {
            let most = plan.max_new_tokens(&sample);
            let question = question_hash(&sample, most, task.stops_at_newline())?;
            Ok(LoadedSample { sample, question })
        };
        all.push(of_task.samples.into_iter().map(asked).collect::<Result<_>>()?);
    }
    Ok(all)
}

/// One sample under one setting.
struct Job<'a> {
    setting: &'a Setting,
    task: &'a dyn Task,
    sample: &'a Sample,
    digest: &'a str,
    /// Numbers of the task, the sample and the setting.
    place: (usize, usize, usize),
}

impl Plan<'_> {
    fn manifest(&self) -> Manifest {
        let settings: BTreeMap<_, _> =
            self.settings.iter().map(|setting| (setting.name.clone(), setting.clone())).collect();
        Manifest {
            versions: [env!("CARGO_PKG_VERSION").to_owned()].into(),
            seed: self.seed,
            limits: self.limits,
            settings,
            tasks: self.tasks.iter().map(|task| task.name().to_owned()).collect(),
            conditions: self.conditions.clone(),
        }
    }

    fn max_new_tokens(&self, sample: &Sample) -> usize {
        sample.max_new_tokens.min(self.limits.max_new_tokens.unwrap_or(usize::MAX))
    }

    /// Returns this process's part. Adjacent samples, tasks and settings go to consecutive shards:
    /// every shard gets some of the slow ones, and keeps its samples when their number grows.
    fn units<'a>(&'a self, samples: &'a [Vec<LoadedSample>]) -> Vec<Job<'a>> {
        let ours = |turn: usize| turn % self.shard.count == self.shard.index - 1;
        let mut all = Vec::new();
        for (s, setting) in self.settings.iter().enumerate() {
            for (t, (task, samples)) in self.tasks.iter().zip(samples).enumerate() {
                let dealt = samples.iter().enumerate().filter(|(i, _)| ours(s + t + i));
                all.extend(dealt.map(|(i, LoadedSample { sample, question })| Job {
                    setting,
                    task: task.as_ref(),
                    sample,
                    digest: question,
                    place: (t, i, s),
                }));
            }
        }
        all
    }
}

impl Job<'_> {
    fn key(&self) -> record::Key {
        (self.setting.name.clone(), self.task.name().to_owned(), self.sample.id.clone())
    }

    /// Checks that no existing result is for another question.
    fn check(&self, done: &HashMap<record::Key, Option<String>>) -> Result<()> {
        let Some(theirs) = done.get(&self.key()) else { return Ok(()) };
        if theirs.as_deref() == Some(self.digest) {
            return Ok(());
        }
        let name = format!("question of task {}, sample {}", self.task.name(), self.sample.id);
        let theirs = theirs.as_deref().unwrap_or("none, written by an older version");
        let expected = format!("the one that the folder has an answer to (SHA-256 {theirs})");
        Err(Error::setting(name, expected, format!("another (SHA-256 {})", self.digest)))
    }

    /// Returns the question for a subject whose settings begin at index `first`.
    fn question(&self, plan: &Plan<'_>, first: usize) -> Question<'_> {
        Question {
            sample: self.sample,
            max_new_tokens: plan.max_new_tokens(self.sample),
            stops_at_newline: self.task.stops_at_newline(),
            setting: self.place.2 - first,
        }
    }

    fn record(
        &self,
        plan: &Plan<'_>,
        answer: Result<Answer, SubjectError>,
        started: Instant,
    ) -> Result<Record> {
        let what = || format!("{}, {}, {}", self.setting.name, self.task.name(), self.sample.id);
        let answer = answer.map_err(|reason| Error::Subject { what: what(), reason })?;
        let score = self.task.score(self.sample, &answer.predictions)?;
        let per_second = answer.decode_steps as f64 / answer.decode.as_secs_f64();
        let record = Record {
            setting: self.setting.name.clone(),
            task: self.task.name().to_owned(),
            category: self.task.category(),
            sample: self.sample.id.clone(),
            group: self.sample.group.clone(),
            question: Some(self.digest.to_owned()),
            predictions: answer.predictions,
            score,
            prompt_tokens: answer.prompt_tokens,
            new_tokens: answer.new_tokens,
            kv_bytes: answer.kv_bytes,
            dense_bytes: answer.dense_bytes,
            seed: plan.seed,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            timings: Timings {
                first_token_seconds: answer.first_token.as_secs_f64(),
                // The speed of steps that several settings share is not that of one setting.
                decode_tokens_per_second: Some(per_second)
                    .filter(|speed| answer.decode_steps > 0 && speed.is_finite())
                    .filter(|_| answer.settings.is_none()),
                model_seconds: answer.model.as_secs_f64(),
                total_seconds: started.elapsed().as_secs_f64(),
                peak_resident_bytes: peak_memory::peak(),
                batch: answer.batch,
                settings: answer.settings,
            },
        };
        record.check()?;
        Ok(record)
    }
}
