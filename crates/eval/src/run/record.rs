//! One line of a run's results.

use crate::agreement::ratio;
use crate::{Category, Error, Result, Score};

/// A subject's answer to one sample: one JSON line.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// The setting's name.
    pub setting: String,
    /// The task's name.
    pub task: String,
    /// The task's category.
    pub category: Category,
    /// The sample's id.
    pub sample: String,
    /// The group of the task that the sample belongs to, such as its length.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// SHA-256 of the question: the turns, the right answers and the limits. `None` in results of
    /// older versions.
    #[serde(default)]
    pub question: Option<String>,
    /// The predictions, one per turn.
    pub predictions: Vec<String>,
    /// The score of the predictions.
    pub score: Score,
    /// Tokens read, over all turns, without the answers between them.
    pub prompt_tokens: usize,
    /// Tokens written.
    pub new_tokens: usize,
    /// Bytes held at the end.
    pub kv_bytes: Option<usize>,
    /// Bytes that a dense f16 cache would hold for the same text.
    pub dense_bytes: Option<usize>,
    /// The run's seed.
    pub seed: u64,
    /// The version of `longctx-eval`.
    pub version: String,
    /// Values that differ from run to run, in one field so that comparisons can exclude them.
    pub timings: Timings,
}

/// Times and memory of one sample.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Timings {
    /// Time from the first turn's text to its first token.
    pub first_token_seconds: f64,
    /// Decoding speed; `None` if at most one token was written. In a batch, the time of a step is
    /// divided evenly among its sequences, so that this is the throughput of the batch.
    pub decode_tokens_per_second: Option<f64>,
    /// Time within the model and the prompt compressor, with an even share of a batch's steps.
    pub model_seconds: f64,
    /// Time from the sample's text to its score, including the other samples of a batch.
    pub total_seconds: f64,
    /// The process's peak memory during the sample, including weights; `None` if the system does
    /// not report it.
    pub peak_resident_bytes: Option<u64>,
    /// Largest number of sequences in a decode step; `None` without batching.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Number of settings that shared the prefill and the decode steps, so that
    /// `first_token_seconds` belongs to all of them; `None` if they were not shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<usize>,
}

impl Record {
    /// Returns dense bytes divided by bytes held.
    pub fn ratio(&self) -> Option<f64> {
        ratio(self.dense_bytes, self.kv_bytes)
    }

    /// Checks that every number is in its valid range.
    pub(crate) fn check(&self) -> Result<()> {
        let share = |x: f64| (0.0..=1.0).contains(&x);
        let time = |x: f64| (0.0..=f64::MAX).contains(&x);
        let Timings { first_token_seconds, model_seconds, total_seconds, .. } = self.timings;
        let speed = self.timings.decode_tokens_per_second.unwrap_or(0.0);
        for (name, value, fits, expected) in [
            ("score.value", self.score.value, share(self.score.value), "a share from 0 to 1"),
            (
                "score.partial",
                self.score.partial.unwrap_or(0.0),
                share(self.score.partial.unwrap_or(0.0)),
                "a share from 0 to 1",
            ),
            ("first_token_seconds", first_token_seconds, time(first_token_seconds), "a time"),
            ("model_seconds", model_seconds, time(model_seconds), "a time"),
            ("total_seconds", total_seconds, time(total_seconds), "a time"),
            ("decode_tokens_per_second", speed, time(speed), "a speed"),
        ] {
            if !fits {
                let name = format!("{name} of {}, {}, {}", self.setting, self.task, self.sample);
                return Err(Error::setting(name, expected, value));
            }
        }
        Ok(())
    }

    /// Returns the key of this line, unique in a run.
    pub(crate) fn key(&self) -> Key {
        (self.setting.clone(), self.task.clone(), self.sample.clone())
    }
}

/// Setting, task and sample.
pub(crate) type Key = (String, String, String);
