//! Needle-in-a-haystack tasks: eight of the 13.

use std::sync::{Arc, LazyLock};

use super::fit::{Generate, UpperBound, threefold};
use super::template::{NIAH, NIAH_ONE};
use super::{Prompt, Source};
use crate::punkt;
use crate::python::{self, random::Random};

/// The settings of a task.
#[derive(Debug, Clone, Copy)]
pub struct Niah {
    haystack: Hay,
    key: Kind,
    value: Kind,
    keys: usize,
    values: usize,
    queries: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Hay {
    /// Five sentences, repeated.
    Noise,
    Essays,
    /// Needles that the prompt does not ask for.
    Needles,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Words,
    Numbers,
    Uuids,
}

pub const SINGLE_1: Niah = Niah {
    haystack: Hay::Noise,
    key: Kind::Words,
    value: Kind::Numbers,
    keys: 1,
    values: 1,
    queries: 1,
};
pub const SINGLE_2: Niah = Niah { haystack: Hay::Essays, ..SINGLE_1 };
pub const SINGLE_3: Niah = Niah { value: Kind::Uuids, ..SINGLE_2 };
pub const MULTIKEY_1: Niah = Niah { keys: 4, ..SINGLE_2 };
pub const MULTIKEY_2: Niah = Niah { haystack: Hay::Needles, ..SINGLE_1 };
pub const MULTIKEY_3: Niah = Niah { key: Kind::Uuids, value: Kind::Uuids, ..MULTIKEY_2 };
pub const MULTIVALUE: Niah = Niah { values: 4, ..SINGLE_2 };
pub const MULTIQUERY: Niah = Niah { keys: 4, queries: 4, ..SINGLE_2 };

pub const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// Depths of needles in essays: 40 values in percent.
const DEPTHS: usize = 40;

fn depth(number: usize) -> f64 {
    (100.0 / (DEPTHS - 1) as f64 * number as f64).round_ties_even() / 100.0
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Words => "words",
            Self::Numbers => "numbers",
            Self::Uuids => "uuids",
        }
    }

    fn draw(self, random: &mut Random) -> String {
        match self {
            Self::Words => PAIRS.get(random.below(PAIRS.len())),
            Self::Numbers => (1_000_000 + random.below(9_000_000)).to_string(),
            Self::Uuids => uuid(random.bits_128()),
        }
    }
}

/// Formats a version 4 UUID.
fn uuid(bits: u128) -> String {
    let bits = bits & !(0xf000 << 64) & !(0xc000 << 48) | 4 << 76 | 0x8000 << 48;
    let hex = format!("{bits:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

impl Niah {
    pub fn generator(self, source: &Source, length: usize) -> Generator {
        let essays = match self.haystack {
            Hay::Essays => essay_words(&source.essays.text()),
            _ => Vec::new(),
        };
        let step = match self.haystack {
            Hay::Essays => 500,
            _ if length < 4096 => 5,
            _ => 25,
        };
        Generator { niah: self, essays, step, seed: source.seed, random: Random::new(source.seed) }
    }
}

/// Returns the words, separated by single spaces.
fn essay_words(text: &str) -> Vec<Arc<str>> {
    let mut words: Vec<Arc<str>> = python::split(text).map(Arc::from).collect();
    // White space at an end is an empty word in the original.
    if text.starts_with(python::is_space) {
        words.insert(0, "".into());
    }
    if text.ends_with(python::is_space) {
        words.push("".into());
    }
    words
}

pub struct Generator {
    niah: Niah,
    essays: Vec<Arc<str>>,
    step: usize,
    seed: u32,
    random: Random,
}

impl Generator {
    fn needle(&self, key: &str, value: &str) -> String {
        format!("One of the special magic {} for {key} is: {value}.", self.niah.value.name())
    }

    fn context(&mut self, mut needles: Vec<String>, size: usize) -> Option<String> {
        Random::new(self.seed).shuffle(&mut needles);
        let mut sentences = match self.niah.haystack {
            Hay::Essays => return self.essay(&needles, size),
            Hay::Noise => vec![NOISE.to_owned(); size],
            Hay::Needles => (0..size)
                .map(|_| {
                    let key = self.niah.key.draw(&mut self.random);
                    let value = self.niah.value.draw(&mut self.random);
                    self.needle(&key, &value)
                })
                .collect(),
        };
        let mut places = self.random.sample(size, needles.len())?;
        places.sort_unstable_by(|a, b| b.cmp(a));
        places.into_iter().zip(needles).for_each(|(place, needle)| sentences.insert(place, needle));
        Some(sentences.join("\n"))
    }

    fn essay(&mut self, needles: &[String], size: usize) -> Option<String> {
        let words = self.essays.iter().cycle().take(size);
        let text = words.map(AsRef::as_ref).collect::<Vec<&str>>().join(" ");
        let sentences = punkt::sentences(python::strip(&text));
        let drawn = self.random.sample(DEPTHS, needles.len())?;
        let place = |number: usize| (sentences.len() as f64 * depth(number)) as usize;
        let mut places: Vec<usize> = drawn.into_iter().map(place).collect();
        places.sort_unstable();
        let mut parts = Vec::new();
        let mut from = 0;
        for (&to, needle) in places.iter().zip(needles) {
            parts.push(sentences[from..to].join(" "));
            parts.push(needle.clone());
            from = to;
        }
        parts.push(sentences[from..].join(" "));
        Some(parts.join(" "))
    }
}

impl Generate for Generator {
    fn prompt(&mut self, _: usize, size: usize) -> Option<Prompt> {
        let Niah { key, value, keys: key_count, values: value_count, queries, .. } = self.niah;
        let (mut keys, mut values, mut needles) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..key_count {
            let key = key.draw(&mut self.random);
            let own: Vec<_> = (0..value_count).map(|_| value.draw(&mut self.random)).collect();
            needles.extend(own.iter().map(|value| self.needle(&key, value)));
            keys.push(key);
            values.push(own);
        }
        let context = self.context(needles, size)?;
        let asked = self.random.sample(key_count, queries)?;
        let answers: Vec<String> = asked.iter().flat_map(|&i| values[i].clone()).collect();
        let names: Vec<&str> = asked.iter().map(|&i| keys[i].as_str()).collect();
        let query = match names.as_slice() {
            [one] => (*one).to_owned(),
            [first @ .., last] => first.join(", ") + ", and " + last,
            [] => String::new(),
        };
        let one = answers.len() == 1;
        let kind = value.name();
        let kind = if one { kind.trim_end_matches('s') } else { kind };
        let template = if one { NIAH_ONE } else { NIAH };
        Some(template.fill(&context, &[("type_needle_v", kind), ("query", &query)], answers))
    }

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
        self.step
    }

    fn upper_bound(&self) -> UpperBound {
        UpperBound { size: self.step, of: threefold }
    }
}

pub const NOUNS: &str = include_str!("../../../data/wonderwords/nounlist.txt");
pub const ADJECTIVES: &str = include_str!("../../../data/wonderwords/adjectivelist.txt");

static PAIRS: LazyLock<Pairs> = LazyLock::new(|| Pairs::new(&sorted(ADJECTIVES), sorted(NOUNS)));

/// Returns the distinct words of a list with one word per line, sorted.
fn sorted(list: &'static str) -> Vec<&'static str> {
    let mut words: Vec<_> = list.lines().map(str::trim_end).collect();
    words.sort_unstable();
    words.dedup();
    words
}

/// All combinations "adjective-noun", sorted, some 6 million, without storing all of them.
struct Pairs {
    nouns: Vec<&'static str>,
    /// Runs of pairs, each with the number of pairs before it.
    runs: Vec<(usize, Run)>,
    len: usize,
}

enum Run {
    /// One adjective with all nouns.
    One(String),
    /// Adjectives of which one is the prefix of another before a hyphen: their pairs interleave.
    Mixed(Vec<String>),
}

impl Pairs {
    fn new(adjectives: &[&'static str], nouns: Vec<&'static str>) -> Self {
        let mut starts: Vec<String> = adjectives.iter().map(|word| format!("{word}-")).collect();
        starts.sort_unstable();
        let (mut runs, mut len) = (Vec::new(), 0);
        let mut rest = starts.as_slice();
        while let Some(first) = rest.first() {
            let count = rest.iter().take_while(|start| start.starts_with(first.as_str())).count();
            let (own, others) = rest.split_at(count);
            rest = others;
            let run = if count == 1 {
                Run::One(first.clone())
            } else {
                let with = |start: &String| {
                    let start = start.clone();
                    nouns.iter().map(move |noun| start.clone() + noun)
                };
                let mut mixed: Vec<String> = own.iter().flat_map(with).collect();
                mixed.sort_unstable();
                mixed.dedup();
                Run::Mixed(mixed)
            };
            let size = match &run {
                Run::One(_) => nouns.len(),
                Run::Mixed(mixed) => mixed.len(),
            };
            runs.push((len, run));
            len += size;
        }
        Self { nouns, runs, len }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn get(&self, i: usize) -> String {
        let run = self.runs.partition_point(|(before, _)| *before <= i) - 1;
        let (before, run) = &self.runs[run];
        match run {
            Run::One(start) => start.clone() + self.nouns[i - before],
            Run::Mixed(mixed) => mixed[i - before].clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_those_of_a_sorted_list() {
        let adjectives = ["x", "ad hoc", "x-rated", "be", "a"];
        let nouns = ["ray", "rated-r", "box", "s'more"];
        let mut all: Vec<String> = adjectives
            .iter()
            .flat_map(|adjective| nouns.iter().map(move |noun| format!("{adjective}-{noun}")))
            .collect();
        all.sort_unstable();
        all.dedup();
        let mut in_order = nouns.to_vec();
        in_order.sort_unstable();
        let pairs = Pairs::new(&adjectives, in_order);
        assert_eq!((0..pairs.len()).map(|i| pairs.get(i)).collect::<Vec<_>>(), all);
    }
}
