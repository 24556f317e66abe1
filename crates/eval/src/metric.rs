//! LongBench's metrics, equal to the original Python (`metrics.py` of LongBench and of
//! longctx_bench) to the last digit.

mod classification;
mod code;
mod number;
mod qa_f1;
mod rouge;
mod sequence_matcher;

pub use classification::classification;
pub use code::code_similarity;
pub use number::{count, retrieval, retrieved};
pub use qa_f1::qa_f1;
pub use rouge::rouge_l;
pub use sequence_matcher::ratio;

/// A metric that compares a prediction with a right answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Metric {
    /// [`qa_f1`].
    QaF1,
    /// [`rouge_l`].
    RougeL,
    /// [`classification`].
    Classification,
    /// [`retrieval`].
    Retrieval,
    /// [`count`].
    Count,
    /// [`code_similarity`].
    CodeSimilarity,
}

impl Metric {
    /// Returns the score of `prediction` against one right answer, from 0 to 1. `classes` are those
    /// of a classification task; other metrics ignore them.
    ///
    /// ```
    /// use longctx_eval::metric::Metric;
    ///
    /// assert_eq!(Metric::QaF1.score("The capital is Paris.", "Paris", &[]), 0.5);
    /// ```
    pub fn score(self, prediction: &str, answer: &str, classes: &[String]) -> f64 {
        match self {
            Self::QaF1 => qa_f1(prediction, answer),
            Self::RougeL => rouge_l(prediction, answer),
            Self::Classification => classification(prediction, answer, classes),
            Self::Retrieval => retrieval(prediction, answer),
            Self::Count => count(prediction, answer),
            Self::CodeSimilarity => code_similarity(prediction, answer),
        }
    }

    /// Returns the best score over all right answers; 0 if there are none.
    pub fn best(self, prediction: &str, answers: &[String], classes: &[String]) -> f64 {
        answers.iter().map(|answer| self.score(prediction, answer, classes)).fold(0.0, f64::max)
    }
}
