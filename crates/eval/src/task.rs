//! The task interface: questions for a model, and a score of its answers.

pub mod long_generation;
pub mod longbench;
mod longbench_v2;
mod needle;
pub mod ruler;
mod truncate;

pub use longbench_v2::LongBenchV2;
pub use needle::{CountTokens, Length, NeedleGrid};
pub use truncate::truncate_middle;

use std::ops::Range;

use crate::{Error, Result};

/// The paper's seven categories, and further ones.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Category {
    /// NarrativeQA, Qasper, MultiFieldQA.
    SingleDocQa,
    /// HotpotQA, 2WikiMQA, MuSiQue.
    MultiDocQa,
    /// GovReport, QMSum, MultiNews.
    Summarization,
    /// TREC, TriviaQA, SAMSum.
    FewShot,
    /// PassageRetrieval, PassageCount.
    Synthetic,
    /// LCC, RepoBench-P.
    Code,
    /// The needle test.
    Needle,
    /// RULER's 13 tasks.
    Ruler,
    /// LongBench-v2's questions with four choices.
    MultipleChoice,
    /// Tasks with long answers or many turns; not in the paper.
    LongGeneration,
}

/// One question, in one or several turns.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sample {
    /// Unique within its task, and the same in every run. A resumed run identifies answered samples
    /// by it.
    pub id: String,
    /// The text before each answer, one per turn, without chat template.
    pub turns: Vec<String>,
    /// The byte range of the long context in the first turn, which a prompt compressor may
    /// compress. `None`: every turn as a whole.
    pub context: Option<Range<usize>>,
    /// The question about the context, for question-aware compressors.
    pub question: Option<String>,
    /// The right answers from the task's data: alternatives for a task of one turn, otherwise one
    /// per turn.
    pub answers: Vec<String>,
    /// The classes of a classification task; empty for other tasks.
    pub classes: Vec<String>,
    /// The largest number of new tokens per turn.
    pub max_new_tokens: usize,
    /// Whether a chat model reads the turns with its template.
    pub chat: bool,
    /// The start of the answer to the last turn, after the chat template. The model continues it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_prefix: Option<String>,
    /// The group of the task in which the sample's score counts, such as its length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

/// The score of an answer; every number is from 0 to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Score {
    /// The task's metric.
    pub value: f64,
    /// A more tolerant metric, if the task has one: the needle test's partial match.
    pub partial: Option<f64>,
    /// The share that is right in each quarter of a long answer. It shows errors that accumulate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarters: Option<[f64; 4]>,
}

/// Questions of one kind, with their metric.
pub trait Task: Send + Sync {
    /// Returns the name for the command line and reports: "qasper", "needle", …
    fn name(&self) -> &str;

    /// Returns the category in which the task's score counts.
    fn category(&self) -> Category;

    /// Returns all questions, in a fixed order. They can be generated or read from a file.
    ///
    /// # Errors
    /// If the task's data cannot be read. Bad records are skipped and reported in
    /// [`Samples::skipped`], by file, line and field.
    fn samples(&self) -> Result<Samples>;

    /// Scores the predictions, one for each of the sample's turns.
    ///
    /// # Errors
    /// If the number of predictions is not that of the turns.
    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score>;

    /// Returns whether an answer ends at a newline, after at least one token.
    fn stops_at_newline(&self) -> bool {
        false
    }
}

/// A task's questions, and its invalid records.
#[derive(Debug, Default)]
pub struct Samples {
    /// The questions.
    pub samples: Vec<Sample>,
    /// The error of each skipped record: file, line and field.
    pub skipped: Vec<crate::Error>,
}

/// Checks that there is one prediction per turn.
fn check_turns(sample: &Sample, predictions: &[String]) -> Result<()> {
    if predictions.len() == sample.turns.len() {
        Ok(())
    } else {
        let name = format!("predictions of sample {}", sample.id);
        Err(Error::setting(name, sample.turns.len(), predictions.len()))
    }
}

/// Returns the prediction for a sample of one turn.
fn one_prediction<'a>(sample: &Sample, predictions: &'a [String]) -> Result<&'a str> {
    match predictions {
        [prediction] => Ok(prediction),
        _ => Err(Error::setting(
            format!("predictions of sample {}", sample.id),
            1,
            predictions.len(),
        )),
    }
}
