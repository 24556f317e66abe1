//! Fits the haystack to a length.

use super::Prompt;
use crate::{Error, Result};

/// The largest number of attempts to generate a sample that fits. The original has no limit.
const TRIES: usize = 1000;

/// The length limit of prompts.
pub struct LengthLimit<'a> {
    pub count: &'a dyn Fn(&str) -> Result<usize>,
    /// Tokens of prompt and answer.
    pub tokens: usize,
    /// Tokens of the answer.
    pub new_tokens: usize,
}

impl LengthLimit<'_> {
    pub fn error(&self) -> Error {
        let expected = "enough tokens for the task's shortest prompt and its answer";
        Error::setting("length of RULER's prompts", expected, self.tokens)
    }
}

/// Generates the prompts of a task, in the order of the original's random draws.
pub trait Generate {
    /// Returns the prompt of a sample with a haystack of `size`; `None` if there is none of this
    /// size.
    fn prompt(&mut self, sample: usize, size: usize) -> Option<Prompt>;

    /// Prepends the example to a prompt, if the task has one.
    fn with_example(&mut self, prompt: Prompt) -> Prompt;

    /// Returns the example's text.
    fn example(&self) -> &str;

    /// Returns the number of different samples.
    fn max_samples(&self) -> usize;

    /// Returns the smallest haystack size, which is also the decrement if a sample does not fit.
    fn step(&self) -> usize;

    /// Returns a haystack size that is certainly too large for `tokens`, and the size from which it
    /// is estimated.
    fn upper_bound(&self) -> UpperBound;
}

/// The upper bound of the search, estimated from the tokens of a prompt of `size`.
pub struct UpperBound {
    pub size: usize,
    pub of: fn(tokens: f64, per_unit: f64) -> usize,
}

/// Returns three times the size that fits if tokens are proportional to the haystack.
pub fn threefold(tokens: f64, per_unit: f64) -> usize {
    ((tokens / per_unit) * 3.0) as usize
}

/// Returns `samples` prompts, or all if there are fewer.
pub fn prompts(
    make: &mut dyn Generate,
    room: &LengthLimit<'_>,
    samples: usize,
) -> Result<Vec<Prompt>> {
    let size = largest(make, room)?;
    let count = samples.min(make.max_samples());
    (0..count).map(|sample| one(make, room, sample, size)).collect()
}

/// Finds the largest haystack whose prompt fits, by bisection.
fn largest(make: &mut dyn Generate, room: &LengthLimit<'_>) -> Result<usize> {
    let example = (room.count)(make.example())?;
    let (step, UpperBound { size, of }) = (make.step(), make.upper_bound());
    let mut tokens = |size| match make.prompt(0, size) {
        Some(prompt) => (room.count)(&prompt.text()),
        None => Err(room.error()),
    };
    let per_unit = tokens(size)? as f64 / size as f64;
    let (mut low, mut high) = (step, of(room.tokens as f64, per_unit).max(2 * step));
    let mut best = step;
    while low <= high {
        let middle = usize::midpoint(low, high);
        if tokens(middle)? + example + room.new_tokens <= room.tokens {
            best = middle;
            low = middle + 1;
        } else {
            high = middle - 1;
        }
    }
    Ok(best)
}

fn one(
    make: &mut dyn Generate,
    room: &LengthLimit<'_>,
    sample: usize,
    size: usize,
) -> Result<Prompt> {
    let (step, mut size) = (make.step(), size);
    for _ in 0..TRIES {
        let prompt = make.prompt(sample, size);
        let smaller = match &prompt {
            _ if size > step => size - step,
            // The decrement went below the smallest size. The original repeats this forever.
            None => step,
            Some(_) => size,
        };
        if let Some(prompt) = prompt {
            let prompt = make.with_example(prompt);
            if (room.count)(&prompt.text())? + room.new_tokens <= room.tokens {
                return Ok(prompt);
            }
        }
        size = smaller;
    }
    Err(room.error())
}
