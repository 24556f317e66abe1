//! LongBench (Bai et al., arXiv 2308.14508): 16 English tasks with the prompts and scores of the
//! paper's longctx_bench; and their 13 LongBench-E versions, with the same number of samples of
//! each length.

#[cfg(feature = "hub")]
mod hub;
mod record;
mod specs;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

#[cfg(feature = "hub")]
pub use self::hub::download;
use self::record::Record;
use self::specs::{SPECS, Spec};
use super::one_prediction;
use crate::{Category, Error, Result, Sample, Samples, Score, Task};

/// A task of LongBench, with the file of its records.
#[derive(Debug, Clone)]
pub struct LongBench {
    name: String,
    spec: &'static Spec,
    /// Whether samples are grouped by the number of words of their context (LongBench-E).
    by_length: bool,
    file: PathBuf,
}

/// LongBench's tasks without a LongBench-E version.
const NOT_IN_E: [&str; 3] = ["narrativeqa", "musique", "qmsum"];

/// Returns the names of the 16 tasks, which are also those of their files.
pub fn names() -> impl Iterator<Item = &'static str> {
    SPECS.iter().map(|spec| spec.name)
}

/// Returns the names of LongBench-E's 13 tasks, which are also those of their files: `qasper_e`, …
pub fn names_e() -> impl Iterator<Item = String> {
    names().filter(|name| !NOT_IN_E.contains(name)).map(|name| format!("{name}_e"))
}

/// Returns the task `name` of LongBench or LongBench-E, with its records in `folder/name.jsonl`.
///
/// # Errors
/// [`Error::Setting`] if there is no such task. The file is read when the samples are requested.
pub fn task(name: &str, folder: impl AsRef<Path>) -> Result<LongBench> {
    let known = || {
        format!(
            "one of {}, or {}",
            names().collect::<Vec<_>>().join(", "),
            names_e().collect::<Vec<_>>().join(", ")
        )
    };
    let plain = name.strip_suffix("_e").filter(|plain| !NOT_IN_E.contains(plain));
    let spec = SPECS.iter().find(|spec| spec.name == plain.unwrap_or(name));
    let spec = spec.ok_or_else(|| Error::setting("task", known(), name))?;
    let file = folder.as_ref().join(format!("{name}.jsonl"));
    Ok(LongBench { name: name.to_owned(), spec, by_length: plain.is_some(), file })
}

/// Returns all 16 tasks, with their records in the folder's files.
///
/// ```
/// use longctx_eval::longbench;
///
/// let tasks = longbench::tasks("data/longbench");
/// assert_eq!(tasks.len(), 16);
/// assert_eq!(tasks[1].name(), "qasper");
/// ```
pub fn tasks(folder: impl AsRef<Path>) -> Vec<Box<dyn Task>> {
    let file = |spec: &Spec| folder.as_ref().join(format!("{}.jsonl", spec.name));
    SPECS
        .iter()
        .map(|spec| {
            let (name, file) = (spec.name.to_owned(), file(spec));
            Box::new(LongBench { name, spec, by_length: false, file }) as Box<dyn Task>
        })
        .collect()
}

impl Task for LongBench {
    fn name(&self) -> &str {
        &self.name
    }

    fn category(&self) -> Category {
        self.spec.category
    }

    fn samples(&self) -> Result<Samples> {
        let bytes = fs::read(&self.file).map_err(Error::io(&self.file))?;
        let mut samples = Samples::default();
        for (i, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            match Record::parse(line).and_then(|record| self.sample(record, i + 1)) {
                Ok(sample) => samples.samples.push(sample),
                Err(fault) => samples.skipped.push(Error::Record {
                    path: self.file.clone(),
                    line: i + 1,
                    field: fault.field.to_owned(),
                    fault: fault.message,
                }),
            }
        }
        Ok(samples)
    }

    /// In few-shot tasks only the first line of a prediction counts.
    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score> {
        let mut prediction = one_prediction(sample, predictions)?;
        if self.spec.category == Category::FewShot {
            prediction = prediction.trim_start_matches('\n').split('\n').next().unwrap_or("");
        }
        let value = self.spec.metric.best(prediction, &sample.answers, &sample.classes);
        Ok(Score { value, ..Score::default() })
    }

    /// True for SAMSum, where a model would continue with further dialogues.
    fn stops_at_newline(&self) -> bool {
        self.spec.name == "samsum"
    }
}

impl LongBench {
    fn sample(&self, record: Record, line: usize) -> Result<Sample, record::SubjectError> {
        record.check(self.spec.metric)?;
        let group = if self.by_length { Some(bucket(record.length()?).to_owned()) } else { None };
        let (prompt, context) = render(self.spec.prompt, &record.context, &record.input);
        Ok(Sample {
            // Ids are not unique if a question occurs twice in a file; line numbers are.
            id: record.id.map_or_else(|| format!("line-{line}"), |id| format!("{line}-{id}")),
            turns: vec![prompt],
            context: Some(context),
            question: Some(record.input).filter(|input| !input.trim().is_empty()),
            answers: record.answers,
            classes: record.all_classes,
            max_new_tokens: self.spec.max_new_tokens,
            chat: !matches!(self.spec.category, Category::FewShot | Category::Code),
            group,
            ..Sample::default()
        })
    }
}

/// Returns the length group of LongBench-E, by words.
fn bucket(length: u64) -> &'static str {
    match length {
        ..4000 => "0-4k",
        4000..8000 => "4-8k",
        8000.. => "8k+",
    }
}

/// Fills in the fields and returns the byte range of the context. Braces within a field are not
/// replaced.
fn render(prompt: &str, context: &str, input: &str) -> (String, Range<usize>) {
    let (before, after) = prompt.split_once("{context}").unwrap_or((prompt, ""));
    let mut text = before.to_owned();
    let start = text.len();
    text += context;
    let place = start..text.len();
    text += &after.replace("{input}", input);
    (text, place)
}
