//! Variable tracking: a prompt assigns a value to a chain of variables and asks which variables
//! have it.

use super::fit::{self, Generate, LengthLimit, UpperBound, threefold};
use super::niah::NOISE;
use super::template::VARIABLES;
use super::{Prompt, Source};
use crate::Result;
use crate::python::random::{Random, RandomState};

const HOPS: usize = 4;
const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ";
/// The largest number of tokens of the example. The next constant is its value before replacement.
const EXAMPLE_TOKENS: usize = 500;
const EXAMPLE_VALUE: &str = "12345";

pub struct Variables {
    example: Option<String>,
    step: usize,
    random: Random,
    numbers: RandomState,
}

impl Variables {
    /// Generates the example first, from the same random stream.
    pub fn new(source: &Source, length: usize) -> Result<Self> {
        let (random, numbers) = (Random::new(source.seed), RandomState::new(source.seed));
        let mut variables = Self { example: None, step: 5, random, numbers };
        let tokens = EXAMPLE_TOKENS.saturating_sub(source.reserved);
        let room = LengthLimit { count: source.count.as_ref(), tokens, new_tokens: 0 };
        let example = fit::prompts(&mut variables, &room, 1)?.remove(0);
        let text = format!("{} {}\n", example.text(), example.answers.join(" "));
        let step = if length < 4096 { 5 } else { 10 };
        Ok(Self { example: Some(text), step, ..variables })
    }

    /// Returns the variables of a chain and its lines; `None` if two variables have the same name.
    fn chain(&mut self) -> Option<(Vec<String>, Vec<String>, String)> {
        let letters = if self.example.is_some() { 5 } else { 3 };
        let names: Vec<String> =
            (0..=HOPS).map(|_| self.random.letters(LETTERS, letters)).collect();
        let distinct =
            |names: &[String]| names.iter().collect::<std::collections::HashSet<_>>().len();
        let mut more = Vec::new();
        while distinct(&[names.as_slice(), &more].concat()) <= HOPS {
            more.push(self.random.letters(LETTERS, letters));
        }
        let mut value = || match self.example {
            Some(_) => self.numbers.randint(10_000, 99_999).to_string(),
            None => EXAMPLE_VALUE.to_owned(),
        };
        let own = value();
        // The original draws a value for the second, broken chain before it fails.
        if !more.is_empty() {
            value();
            return None;
        }
        let mut lines = vec![format!("VAR {} = {own}", names[0])];
        lines.extend(names.windows(2).map(|pair| format!("VAR {} = VAR {} ", pair[1], pair[0])));
        Some((names, lines, own))
    }
}

impl Generate for Variables {
    fn prompt(&mut self, _: usize, size: usize) -> Option<Prompt> {
        let (names, lines, value) = self.chain()?;
        let mut sentences = vec![NOISE.to_owned(); size];
        let mut places = self.random.sample(size, lines.len())?;
        places.sort_unstable();
        for (i, (place, line)) in places.into_iter().zip(lines).enumerate() {
            sentences.insert(place + i, line);
        }
        let context = sentences.join("\n").replace(". \n", ".\n");
        let count = (HOPS + 1).to_string();
        Some(VARIABLES.fill(&context, &[("num_v", &count), ("query", &value)], names))
    }

    /// Prepends the example, with its own names and value.
    fn with_example(&mut self, prompt: Prompt) -> Prompt {
        let Some(example) = &self.example else { return prompt };
        let mut text = example.clone();
        let words: Vec<&str> = example.split_whitespace().collect();
        for name in &words[words.len() - HOPS - 1..] {
            text = text.replace(name, &self.random.letters(LETTERS, name.len()));
        }
        let value = self.numbers.randint(10_000, 99_999).to_string();
        prompt.after(&(text.replace(EXAMPLE_VALUE, &value) + "\n"))
    }

    fn example(&self) -> &str {
        self.example.as_deref().unwrap_or("")
    }

    fn max_samples(&self) -> usize {
        usize::MAX
    }

    fn step(&self) -> usize {
        self.step
    }

    fn upper_bound(&self) -> UpperBound {
        UpperBound { size: self.step, of: threefold }
    }
}
