//! What a task is: questions put to a model, and a score for what it answers.

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

/// The paper's seven categories, and what goes beyond them.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
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
    /// Tasks whose answers are long or come in many turns; not of the paper.
    LongGeneration,
}

/// One question put to a model, in one turn or in several.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sample {
    /// Unique within its task, and the same in every run: a resumed run knows by it what is done.
    pub id: String,
    /// What the model reads before each of its answers: one text, or one a turn. No chat template is applied yet.
    pub turns: Vec<String>,
    /// Where the first turn holds its long context, in bytes: what a prompt compressor may shorten. `None`: every turn as a whole.
    pub context: Option<Range<usize>>,
    /// What is asked of the context, for compressors that look at it.
    pub question: Option<String>,
    /// What would be right, in the words of the task's data: alternatives for a task of one turn, else one a turn.
    pub answers: Vec<String>,
    /// The classes that a classification task chooses from; empty elsewhere.
    pub classes: Vec<String>,
    /// The most tokens that the model may write in a turn.
    pub max_new_tokens: usize,
    /// Whether a chat model reads the turns in its template.
    pub chat: bool,
    /// How the answer to the last turn begins, after a chat template; the model goes on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_prefix: Option<String>,
    /// The part of the task that the sample's score counts in, such as its length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

/// How good an answer is; every number from 0 to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Score {
    /// The task's metric.
    pub value: f64,
    /// A more forgiving one, where the task has it: the needle test's partial match.
    pub partial: Option<f64>,
    /// The shares right in the first to the last quarter of a long answer: errors that build up show here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quarters: Option<[f64; 4]>,
}

/// Questions of one kind, with their metric.
pub trait Task: Send + Sync {
    /// The name on the command line and in reports: "qasper", "needle", …
    fn name(&self) -> &str;

    /// The category that the task's score counts in.
    fn category(&self) -> Category;

    /// All questions, in an order that never changes. A question's text can be made here or be read from a file.
    ///
    /// # Errors
    /// If the task's data can't be read; bad records are left out and told in [`Samples::skipped`], by file, line and field.
    fn samples(&self) -> Result<Samples>;

    /// Scores what the model wrote, one prediction for each of the sample's turns.
    ///
    /// # Errors
    /// If there are more or fewer predictions than turns.
    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score>;

    /// Whether a model's answer ends at a newline, once it has a token.
    fn stops_at_newline(&self) -> bool {
        false
    }
}

/// A task's questions, and the records that could not be made into one.
#[derive(Debug, Default)]
pub struct Samples {
    /// The questions.
    pub samples: Vec<Sample>,
    /// What is wrong with each record left out: file, line and field.
    pub skipped: Vec<crate::Error>,
}

/// Checks that there is one prediction a turn.
fn check_turns(sample: &Sample, predictions: &[String]) -> Result<()> {
    if predictions.len() == sample.turns.len() {
        Ok(())
    } else {
        let name = format!("predictions of sample {}", sample.id);
        Err(Error::setting(name, sample.turns.len(), predictions.len()))
    }
}

/// The prediction for a sample of one turn.
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
