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
    /// Tokens of all turns as the model read them: cut, compressed, in their template; without the
    /// answers between them.
    pub prompt_tokens: usize,
    /// Tokens written.
    pub new_tokens: usize,
    /// Bytes that the method holds at the end, without room allocated for tokens still to come; `None` if it can't tell.
    pub kv_bytes: Option<usize>,
    /// Bytes that a dense f16 cache would hold for the same text; `None` if there is no such cache.
    pub dense_bytes: Option<usize>,
    /// From the first turn's text to its first token.
    pub first_token: Duration,
    /// All steps of one token; in a batch, this sequence's even share of each step.
    pub decode: Duration,
    /// How many of them.
    pub decode_steps: usize,
    /// Within the model and the prompt compressor, with even shares of a batch's steps: the rest of
    /// a run's time is the harness's.
    pub model: Duration,
    /// The most sequences that share a step; `None`: times are the sample's own.
    pub batch: Option<usize>,
}

/// Samples that wait for an answer, and the place for their answers.
pub trait Queue<'a> {
    /// The next sample, with its number; `None` if there are no more.
    fn next(&mut self) -> Option<(usize, Question<'a>)>;

    /// Hands in the answer to the sample of this number. Answers come in any order.
    fn answered(&mut self, number: usize, answer: Result<Answer, Fault>);
}

/// What answers samples: a model with its way to remember.
pub trait Subject {
    /// Answers all turns of a sample, remembering nothing of earlier samples.
    ///
    /// # Errors
    /// Whatever the model reports; the run goes on with the next sample unless it is strict.
    fn answer(&mut self, question: &Question<'_>) -> Result<Answer, Fault>;

    /// Answers all samples of a queue, each as [`answer`](Self::answer) does. A subject that answers
    /// several side by side takes the next one when it has room for it.
    fn answer_all<'a>(&mut self, queue: &mut dyn Queue<'a>) {
        while let Some((number, question)) = queue.next() {
            queue.answered(number, self.answer(&question));
        }
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
