//! As much haystack as a length has room for.

use super::Prompt;
use crate::{Error, Result};

/// How often a sample is drawn anew that does not fit; the original never gives up.
const TRIES: usize = 1000;

/// What prompts have to fit into.
pub struct Room<'a> {
    pub count: &'a dyn Fn(&str) -> Result<usize>,
    /// Of prompt and answer.
    pub tokens: usize,
    /// Of the answer.
    pub new_tokens: usize,
}

impl Room<'_> {
    pub fn error(&self) -> Error {
        let expected = "enough tokens for the task's shortest prompt and its answer";
        Error::setting("length of RULER's prompts", expected, self.tokens)
    }
}

/// Makes prompts of a task, in the order of the original's random draws.
pub trait Generate {
    /// The prompt for a sample, with so much haystack; `None` where there is none of this size.
    fn prompt(&mut self, sample: usize, size: usize) -> Option<Prompt>;

    /// Puts the example before a prompt, if the task has one.
    fn with_example(&mut self, prompt: Prompt) -> Prompt;

    /// The example's text.
    fn example(&self) -> &str;

    /// How many different samples there are.
    fn most_samples(&self) -> usize;

    /// The least haystack, and how much less is tried if a sample does not fit.
    fn step(&self) -> usize;

    /// How much haystack is certainly too much for `tokens`, and the size that tells.
    fn bound(&self) -> Bound;
}

/// How the search's upper end is estimated, from the tokens of a prompt of `size`.
pub struct Bound {
    pub size: usize,
    pub of: fn(tokens: f64, per_unit: f64) -> usize,
}

/// Three times what the room holds if tokens grow with the haystack.
pub fn threefold(tokens: f64, per_unit: f64) -> usize {
    ((tokens / per_unit) * 3.0) as usize
}

/// `samples` prompts, or as many as there are.
pub fn prompts(make: &mut dyn Generate, room: &Room<'_>, samples: usize) -> Result<Vec<Prompt>> {
    let size = largest(make, room)?;
    let count = samples.min(make.most_samples());
    (0..count).map(|sample| one(make, room, sample, size)).collect()
}

/// The most haystack whose prompt fits, by bisection.
fn largest(make: &mut dyn Generate, room: &Room<'_>) -> Result<usize> {
    let example = (room.count)(make.example())?;
    let (step, Bound { size, of }) = (make.step(), make.bound());
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

fn one(make: &mut dyn Generate, room: &Room<'_>, sample: usize, size: usize) -> Result<Prompt> {
    let (step, mut size) = (make.step(), size);
    for _ in 0..TRIES {
        if let Some(prompt) = make.prompt(sample, size) {
            let prompt = make.with_example(prompt);
            if (room.count)(&prompt.text())? + room.new_tokens <= room.tokens {
                return Ok(prompt);
            }
        }
        if size > step {
            size = size.saturating_sub(step);
        }
    }
    Err(room.error())
}
