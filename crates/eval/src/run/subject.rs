//! The interface of an evaluated system.

use std::time::Duration;

use crate::{Sample, TeacherForced};

/// Any error of a subject.
pub type SubjectError = Box<dyn std::error::Error + Send + Sync>;

/// A sample with its limits.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The turns, and whether a chat model reads them in its template.
    pub sample: &'a Sample,
    /// The largest number of new tokens per turn.
    pub max_new_tokens: usize,
    /// Whether an answer ends at a newline, after at least one token.
    pub stops_at_newline: bool,
    /// Number of the setting among those that the subject was opened for.
    pub setting: usize,
}

/// A subject's predictions and their cost.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// The predictions, one per turn.
    pub predictions: Vec<String>,
    /// Tokens of all turns as the model read them: truncated, compressed, and formatted with the
    /// template; without the answers between them.
    pub prompt_tokens: usize,
    /// Tokens written.
    pub new_tokens: usize,
    /// Bytes that the method holds at the end, without memory allocated for future tokens; `None`
    /// if unknown.
    pub kv_bytes: Option<usize>,
    /// Bytes that a dense f16 cache would hold for the same text; `None` if there is no such cache.
    pub dense_bytes: Option<usize>,
    /// Time from the first turn's text to its first token.
    pub first_token: Duration,
    /// Time of all decode steps; in a batch, an even share of each step.
    pub decode: Duration,
    /// Number of decode steps.
    pub decode_steps: usize,
    /// Time within the model and the prompt compressor, with an even share of a batch's steps. The
    /// rest of a run's time belongs to the harness.
    pub model: Duration,
    /// Largest number of sequences in a decode step; `None` without batching.
    pub batch: Option<usize>,
    /// Number of settings that shared the prefill and the decode steps; `None` if the times belong
    /// to the sample's setting.
    pub settings: Option<usize>,
}

/// The samples of a run that have no result yet.
pub trait Queue<'a> {
    /// Returns the next sample and its number; `None` if there are no more.
    fn next(&mut self) -> Option<(usize, Question<'a>)>;

    /// Reports the answer to the sample with this number. Answers may come in any order.
    fn answered(&mut self, number: usize, answer: Result<Answer, SubjectError>);
}

/// A part of a text for teacher forcing.
#[derive(Debug, Clone, Copy)]
pub struct Passage<'a> {
    /// Read at once, and compressed by methods that compress prompts.
    pub prompt: &'a str,
    /// Read one token at a time.
    pub text: &'a str,
}

/// An evaluated system: a model with a method of holding its context.
pub trait Subject {
    /// Answers all turns of a sample, independently of earlier samples.
    ///
    /// # Errors
    /// Errors of the model. The run continues with the next sample unless it is strict.
    fn answer(&mut self, question: &Question<'_>) -> Result<Answer, SubjectError>;

    /// Answers all samples of a queue, each like [`answer`](Self::answer). A subject that batches
    /// takes the next sample when a place in the batch is free.
    fn answer_all<'a>(&mut self, queue: &mut dyn Queue<'a>) {
        while let Some((number, question)) = queue.next() {
            queue.answered(number, self.answer(&question));
        }
    }

    /// Reads each passage's prompt and then its text, token by token, and returns the logits for
    /// each token of the text. The passages are read side by side.
    ///
    /// # Errors
    /// Errors of the model. The default implementation returns an error, for subjects without
    /// logits.
    fn teacher_forced(
        &mut self,
        passages: &[Passage<'_>],
    ) -> Result<Vec<TeacherForced>, SubjectError> {
        let _ = passages;
        Err("this subject does not return logits".into())
    }
}
