//! The needle test as a task: a grid of lengths and depths.

use std::sync::Arc;

use super::one_prediction;
use crate::haystack::MAX_WORDS;
use crate::needle::{self, MAX_NEW_TOKENS, MultiNeedle, Needle, PAPER_WORDS, spaced};
use crate::{Category, Error, Haystack, Result, Sample, Samples, Score, Task};

/// The largest number of samples of a grid.
const MOST_SAMPLES: usize = 1_000_000;

/// Counts a text's tokens.
pub type CountTokens = Arc<dyn Fn(&str) -> Result<usize> + Send + Sync>;

/// The unit of a grid's lengths.
#[derive(Clone)]
#[non_exhaustive]
pub enum Length {
    /// Words of background, as in the paper.
    Words,
    /// At most this many tokens of the whole prompt.
    Tokens(CountTokens),
}

impl Length {
    fn name(&self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Tokens(_) => "tokens",
        }
    }
}

/// Needles at every length and depth of a grid.
///
/// ```
/// use longctx_eval::{Haystack, NeedleGrid, Task};
///
/// let grid = NeedleGrid { lengths: vec![600], ..NeedleGrid::paper(Haystack::generated(0), 7) };
/// let samples = grid.samples()?.samples;
/// assert_eq!(samples.len(), 10 * 3);
/// assert_eq!(samples[4].id, "600-words-0.111-1");
/// assert_eq!(grid.score(&samples[4], &samples[4].answers)?.value, 1.0);
/// # Ok::<(), longctx_eval::Error>(())
/// ```
#[derive(Clone)]
pub struct NeedleGrid {
    /// The task's name.
    pub name: String,
    /// The background text.
    pub haystack: Haystack,
    /// The lengths, in [`unit`](Self::unit)s.
    pub lengths: Vec<usize>,
    /// The unit of the lengths.
    pub unit: Length,
    /// The depths, each from 0 to 1.
    pub depths: Vec<f64>,
    /// Digits per key.
    pub digits: usize,
    /// Keys at each point of the grid.
    pub repeats: usize,
    /// Wrong keys in addition to each key, 23 at most. 0: the text has one key.
    pub distractors: usize,
    /// Seed of the keys.
    pub seed: u64,
}

impl NeedleGrid {
    /// Returns the paper's grid: 10 lengths from 512 to 20,480 words, 10 depths, 3 keys, of 7 or of
    /// 64 digits.
    pub fn paper(haystack: Haystack, digits: usize) -> Self {
        let (from, to) = PAPER_WORDS;
        Self {
            name: if digits == 7 { "needle".to_owned() } else { format!("needle-{digits}") },
            haystack,
            lengths: spaced(from as f64, to as f64, 10).into_iter().map(|x| x as usize).collect(),
            unit: Length::Words,
            depths: spaced(0.0, 1.0, 10),
            digits,
            repeats: 3,
            distractors: 0,
            seed: 0,
        }
    }

    fn sample(&self, length: usize, depth: f64, repeat: usize) -> Result<Sample> {
        // The key depends only on length and depth, so every grid has the same key there.
        let place = [length, (depth * 1000.0).round() as usize, repeat];
        let seed =
            place.iter().fold(self.seed, |sum, &x| sum.wrapping_mul(0x1_0000_01b3) ^ x as u64);
        let one = Needle { depth, digits: self.digits, seed };
        let many = MultiNeedle { needle: one, distractors: self.distractors };
        let needle::Sample { prompt, answer } = match (&self.unit, self.distractors) {
            (Length::Words, 0) => one.in_words(&self.haystack, length)?,
            (Length::Words, _) => many.in_words(&self.haystack, length)?,
            (Length::Tokens(count), 0) => {
                one.in_tokens(&self.haystack, length, |text| count(text))?
            }
            (Length::Tokens(count), _) => {
                many.in_tokens(&self.haystack, length, |text| count(text))?
            }
        };
        Ok(Sample {
            id: format!("{length}-{}-{depth:.3}-{repeat}", self.unit.name()),
            turns: vec![prompt],
            context: None,
            question: None,
            answers: vec![answer],
            classes: Vec::new(),
            max_new_tokens: MAX_NEW_TOKENS,
            chat: false,
            ..Sample::default()
        })
    }
}

impl Task for NeedleGrid {
    fn name(&self) -> &str {
        &self.name
    }

    fn category(&self) -> Category {
        Category::Needle
    }

    fn samples(&self) -> Result<Samples> {
        let sizes = [self.lengths.len(), self.depths.len(), self.repeats];
        let count = sizes.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
        if count.is_none_or(|count| count > MOST_SAMPLES) {
            let expected = format!("at most {MOST_SAMPLES} samples");
            return Err(Error::setting(
                "lengths x depths x repeats",
                expected,
                format!("{sizes:?}"),
            ));
        }
        if let Some(&length) = self.lengths.iter().find(|&&length| length > MAX_WORDS) {
            let expected = format!("at most {MAX_WORDS} {}", self.unit.name());
            return Err(Error::setting("length", expected, length));
        }
        let mut samples = Vec::new();
        for &length in &self.lengths {
            for &depth in &self.depths {
                for repeat in 0..self.repeats {
                    samples.push(self.sample(length, depth, repeat)?);
                }
            }
        }
        Ok(Samples { samples, skipped: Vec::new() })
    }

    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score> {
        let prediction = one_prediction(sample, predictions)?;
        let scores = sample.answers.iter().map(|answer| needle::score(prediction, answer));
        let best = scores.fold((0.0, 0.0), |(exact, partial), score| {
            (f64::max(exact, score.exact), f64::max(partial, score.partial))
        });
        Ok(Score { value: best.0, partial: Some(best.1), quarters: None })
    }
}
