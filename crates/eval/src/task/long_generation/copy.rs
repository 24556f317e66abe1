use super::{CITIES, NAMES, Parts, Size, THINGS, make, pick, quarters};
use crate::task::one_prediction;
use crate::{Category, Result, Sample, Samples, Score, Task};

/// Copies a list of words, four per item. The prompt and the answer have the same words, so that as
/// many tokens are written as were read.
///
/// Scored by the share of words that are right and at the right index. Words after the copy's end
/// do not count: a model may not know where to stop.
#[derive(Debug, Clone, Copy)]
pub struct Copy(pub Size);

impl Task for Copy {
    fn name(&self) -> &str {
        "copy"
    }

    fn category(&self) -> Category {
        Category::LongGeneration
    }

    fn samples(&self) -> Result<Samples> {
        let mut samples = make(self.0, |rng| {
            let known = [&THINGS[..], &CITIES, &NAMES].concat();
            let words: Vec<_> = (0..4 * self.0.items).map(|_| pick(rng, &known)).collect();
            let text = words.join(" ");
            let turn = format!("Copy this: {text}\nHere it is:");
            // The largest number of tokens of a word of this length, for tokenizers of English.
            let max_new_tokens = text.len() / 3 + 16;
            Parts { turns: vec![turn], answers: vec![text], max_new_tokens }
        })?;
        samples.samples.iter_mut().for_each(|sample| sample.chat = false);
        Ok(samples)
    }

    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score> {
        let prediction = one_prediction(sample, predictions)?;
        let answer = sample.answers.first().map_or("", String::as_str);
        let ours = prediction.split_whitespace().map(Some).chain(std::iter::repeat(None));
        let right: Vec<bool> = answer
            .split_whitespace()
            .zip(ours)
            .map(|(theirs, ours)| ours == Some(theirs))
            .collect();
        let count = right.iter().filter(|right| **right).count();
        let value = count as f64 / right.len().max(1) as f64;
        Ok(Score { value, partial: None, quarters: quarters(&right) })
    }

    fn stops_at_newline(&self) -> bool {
        true
    }
}
