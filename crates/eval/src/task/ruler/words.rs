//! Common words and frequent words extraction.

use std::collections::BTreeSet;
use std::fs;

use super::fit::{Generate, LengthLimit, UpperBound};
use super::niah::{ADJECTIVES, NOUNS};
use super::template::{COMMON_WORDS, FREQUENT_WORDS};
use super::{Prompt, Source};
use crate::python::random::Random;
use crate::{Error, Result};

const VERBS: &str = include_str!("../../../data/wonderwords/verblist.txt");

/// Number of requested words.
const COMMON: usize = 10;

/// Prompts that ask for the most common words of a numbered list.
pub struct CommonWords {
    words: Vec<String>,
    /// A larger list, for more words than in the first.
    more: Vec<String>,
    short: bool,
    seed: u32,
    random: Random,
}

impl CommonWords {
    pub fn new(source: &Source, length: usize) -> Result<Self> {
        let lists = [NOUNS, ADJECTIVES, VERBS].into_iter().flat_map(str::lines).map(str::trim_end);
        let distinct: BTreeSet<&str> = lists.collect();
        let mut words: Vec<String> = distinct.into_iter().map(str::to_owned).collect();
        Random::new(source.seed).shuffle(&mut words);
        let more = source.folder.as_ref().map(|folder| folder.join("english_words.json"));
        let more = match more.filter(|path| path.exists()) {
            Some(path) => {
                let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
                let list: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text)
                    .map_err(|e| Error::setting(path.display().to_string(), "a JSON object", e))?;
                list.values().filter_map(|word| word.as_str().map(str::to_owned)).collect()
            }
            None => Vec::new(),
        };
        let (short, seed) = (length < 4096, source.seed);
        Ok(Self { words, more, short, seed, random: Random::new(seed) })
    }

    /// Returns a list of `count` distinct words and the common ones among them.
    fn list(
        &mut self,
        count: usize,
        common: usize,
        others: usize,
    ) -> Option<(String, Vec<String>)> {
        let from = if count <= self.words.len() { &self.words } else { &self.more };
        let drawn = self.random.sample(from.len(), count)?;
        let (asked, rest) = drawn.split_at_checked(COMMON).unwrap_or((&drawn, &[]));
        let mut list = [asked.repeat(common), rest.repeat(others)].concat();
        Random::new(self.seed).shuffle(&mut list);
        let numbered =
            list.iter().enumerate().map(|(i, &word)| format!("{}. {}", i + 1, from[word]));
        let text = numbered.collect::<Vec<_>>().join(" ");
        Some((text, asked.iter().map(|&word| from[word].clone()).collect()))
    }
}

impl Generate for CommonWords {
    fn prompt(&mut self, _: usize, size: usize) -> Option<Prompt> {
        let (example, asked) =
            if self.short { ((20, 3, 1), (6, 1)) } else { ((40, 10, 3), (30, 3)) };
        let (context, answers) = self.list(example.0, example.1, example.2)?;
        let example = COMMON_WORDS.fill(&context, &[], answers);
        let numbered = example.answers.iter().enumerate();
        let answers: Vec<_> = numbered.map(|(i, word)| format!("{}. {word}", i + 1)).collect();
        let example = format!("{} {}\n", example.text(), answers.join(" "));
        let (context, answers) = self.list(size, asked.0, asked.1)?;
        Some(COMMON_WORDS.fill(&context, &[], answers).after(&example))
    }

    /// The example is already part of each prompt.
    fn with_example(&mut self, prompt: Prompt) -> Prompt {
        prompt
    }

    fn example(&self) -> &str {
        ""
    }

    fn max_samples(&self) -> usize {
        usize::MAX
    }

    fn step(&self) -> usize {
        10
    }

    fn upper_bound(&self) -> UpperBound {
        // Floor division of floats, as in Python.
        let of = |tokens: f64, per_word: f64| {
            2 * ((tokens - tokens % per_word) / per_word).round() as usize
        };
        UpperBound { size: 4096, of }
    }
}

/// Letters per coded word.
const LETTERS: usize = 6;
/// Riemann's zeta function at 2, the exponent of the words' distribution.
const ZETA_2: f64 = 1.644_934_066_848_226_4;

/// Returns prompts that ask for the three most frequent coded words.
pub fn frequent_words(source: &Source, room: &LengthLimit<'_>) -> Result<Vec<Prompt>> {
    let tokens = room.tokens.saturating_sub(room.new_tokens);
    let mut coded = Coded {
        vocabulary: tokens / 50,
        step: tokens / 32,
        tokens,
        seed: source.seed,
        random: Random::new(source.seed),
    };
    // The three requested words and the noise word.
    if coded.vocabulary < 4 {
        return Err(room.error());
    }
    let count = coded.longest(room)?;
    (0..source.samples).map(|_| coded.prompt(room, count)).collect()
}

struct Coded {
    vocabulary: usize,
    step: usize,
    tokens: usize,
    seed: u32,
    random: Random,
}

impl Coded {
    fn words(&mut self) -> Vec<String> {
        let mut word = || self.random.letters(b"abcdefghijklmnopqrstuvwxyz", LETTERS);
        let mut distinct: BTreeSet<String> = (0..self.vocabulary).map(|_| word()).collect();
        while distinct.len() < self.vocabulary {
            distinct.insert(word());
        }
        let mut words: Vec<String> = distinct.into_iter().collect();
        Random::new(self.seed).shuffle(&mut words);
        words[0] = "...".into();
        words
    }

    /// Returns a text of `count` words, each with the frequency of its rank.
    fn text(&self, words: &[String], count: usize) -> Prompt {
        let times = |rank: usize| (count as f64 * (rank as f64).powf(-2.0) / ZETA_2) as usize;
        let mut drawn: Vec<&str> = Vec::with_capacity(count);
        for (i, word) in words.iter().enumerate() {
            drawn.extend(std::iter::repeat_n(word.as_str(), times(i + 1)));
        }
        Random::new(self.seed).shuffle(&mut drawn);
        FREQUENT_WORDS.fill(&drawn.join(" "), &[], words[1..4].to_vec())
    }

    /// Finds the largest number of words that fits, in steps.
    fn longest(&mut self, room: &LengthLimit<'_>) -> Result<usize> {
        let words = self.words();
        let mut count = self.tokens / LETTERS;
        while (room.count)(&self.text(&words, count).text())? < self.tokens {
            count += self.step;
        }
        count.checked_sub(self.step).ok_or_else(|| room.error())
    }

    fn prompt(&mut self, room: &LengthLimit<'_>, mut count: usize) -> Result<Prompt> {
        let words = self.words();
        loop {
            let prompt = self.text(&words, count);
            if (room.count)(&prompt.text())? <= self.tokens {
                return Ok(prompt);
            }
            count = count.checked_sub(self.step).ok_or_else(|| room.error())?;
        }
    }
}
