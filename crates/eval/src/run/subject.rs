//! What is evaluated, seen from outside.

use std::time::Duration;

use crate::{Forced, Sample};

/// What went wrong in a subject: any error.
pub type Fault = Box<dyn std::error::Error + Send + Sync>;

/// A sample as it is put to a subject.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The turns, and whether a chat model reads them in its template.
    pub sample: &'a Sample,
    /// The most tokens to write in a turn.
    pub max_new_tokens: usize,
    /// An answer ends at a newline, once it has a token.
    pub stops_at_newline: bool,
}

/// What a subject wrote, and what it cost.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// One a turn.
    pub predictions: Vec<String>,
    /// Tokens of all turns as the model read them: cut, compressed, in their template.
    pub prompt_tokens: usize,
    /// Tokens written.
    pub new_tokens: usize,
    /// Bytes that the method holds at the end, without room allocated for tokens still to come; `None` if it can't tell.
    pub kv_bytes: Option<usize>,
    /// Bytes that a dense f16 cache would hold for the same text; `None` if there is no such cache.
    pub dense_bytes: Option<usize>,
    /// From the first turn's text to its first logits.
    pub first_token: Duration,
    /// All steps of one token.
    pub decode: Duration,
    /// How many of them.
    pub decode_steps: usize,
    /// Within the model and the prompt compressor: the rest of a run's time is the harness's.
    pub model: Duration,
}

/// What answers samples: a model with its way to remember.
pub trait Subject {
    /// Answers all turns of a sample, remembering nothing of earlier samples.
    ///
    /// # Errors
    /// Whatever the model reports; the run goes on with the next sample unless it is strict.
    fn answer(&mut self, question: &Question<'_>) -> Result<Answer, Fault>;

    /// How many samples it answers best at once.
    fn batch(&self) -> usize {
        1
    }

    /// Answers samples, each as [`answer`](Self::answer) does; together, where that is faster. The results are in the order of the
    /// questions.
    fn answer_all(&mut self, questions: &[Question<'_>]) -> Vec<Result<Answer, Fault>> {
        questions.iter().map(|question| self.answer(question)).collect()
    }

    /// Reads `prompt` and then `text`, token by token. What it thought of each token of `text`.
    ///
    /// # Errors
    /// Whatever the model reports. Subjects that know no logits keep the default, which says so.
    fn teacher_forced(&mut self, prompt: &str, text: &str) -> Result<Forced, Fault> {
        let _ = (prompt, text);
        Err("this subject tells no logits".into())
    }
}
