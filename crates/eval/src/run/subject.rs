//! The interface of an evaluated system.

use std::time::Duration;

use crate::{Forced, Sample};

/// Any error of a subject.
pub type Fault = Box<dyn std::error::Error + Send + Sync>;

/// A sample with its limits.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The turns, and whether a chat model reads them in its template.
    pub sample: &'a Sample,
    /// The largest number of new tokens per turn.
    pub max_new_tokens: usize,
    /// Whether an answer ends at a newline, after at least one token.
    pub stops_at_newline: bool,
}

/// A subject's predictions and their cost.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// The predictions, one per turn.
    pub predictions: Vec<String>,
    /// Tokens of all turns as the model read them: truncated, compressed, and formatted with the
    /// template.
    pub prompt_tokens: usize,
    /// Tokens written.
    pub new_tokens: usize,
    /// Bytes that the method holds at the end, without memory allocated for future tokens; `None`
    /// if unknown.
    pub kv_bytes: Option<usize>,
    /// Bytes that a dense f16 cache would hold for the same text; `None` if there is no such cache.
    pub dense_bytes: Option<usize>,
    /// Time from the first turn's text to its first logits.
    pub first_token: Duration,
    /// Time of all decode steps.
    pub decode: Duration,
    /// Number of decode steps.
    pub decode_steps: usize,
    /// Time within the model and the prompt compressor. The rest of a run's time belongs to the
    /// harness.
    pub model: Duration,
}

/// An evaluated system: a model with a method of holding its context.
pub trait Subject {
    /// Answers all turns of a sample, independently of earlier samples.
    ///
    /// # Errors
    /// Errors of the model. The run continues with the next sample unless it is strict.
    fn answer(&mut self, question: &Question<'_>) -> Result<Answer, Fault>;

    /// Returns the best number of samples per call.
    fn batch(&self) -> usize {
        1
    }

    /// Answers several samples, each like [`answer`](Self::answer), in one batch where that is
    /// faster. The results are in the order of the questions.
    fn answer_all(&mut self, questions: &[Question<'_>]) -> Vec<Result<Answer, Fault>> {
        questions.iter().map(|question| self.answer(question)).collect()
    }

    /// Reads `prompt` and then `text`, token by token, and returns the logits for each token of
    /// `text`.
    ///
    /// # Errors
    /// Errors of the model. The default implementation returns an error, for subjects without
    /// logits.
    fn teacher_forced(&mut self, prompt: &str, text: &str) -> Result<Forced, Fault> {
        let _ = (prompt, text);
        Err("this subject tells no logits".into())
    }
}
