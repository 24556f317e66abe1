//! Merges sub-word tokens to words and selects words.

use std::ops::Range;

use super::forced_tokens::ForcedTokens;
use super::vocabulary::{Vocabulary, span};
use super::windows::Token;
use super::{Settings, WordProbability};
use crate::percentile::{Number, percentile};
use crate::tokens::cl100k_tokens;

/// A word of a window.
#[derive(Debug)]
pub struct Word {
    /// The tokenizer's text of the word, with its marks and with forced tokens restored.
    pub text: String,
    /// The keep probability; 1 if the word is forced.
    pub probability: Number,
    /// The keep probability without forcing, which ranks whole contexts.
    pub unforced_probability: f32,
    /// Its bytes in the original; empty if it has none.
    pub source: Range<usize>,
    /// Its number of tokens in the unit of the rate.
    pub tokens: usize,
}

/// Merges the tokens of a window, with their keep probabilities, into words.
pub fn merge(
    vocabulary: &Vocabulary,
    forced: &ForcedTokens,
    settings: &Settings,
    tokens: &[Token],
    probabilities: &[f32],
) -> Vec<Word> {
    let mut words: Vec<WordBuilder> = Vec::new();
    for (token, &probability) in tokens.iter().zip(probabilities) {
        if vocabulary.is_special(&token.text) {
            continue;
        }
        let plain = vocabulary.without_marks(&token.text);
        let digit = settings.force_digits && has_digit(&token.text);
        match words.last_mut() {
            Some(word) if !vocabulary.begins_word(&token.text, forced) => {
                word.text.push_str(plain);
                word.push(probability, digit, token);
            }
            _ => {
                let force = digit || forced.contains(plain) || forced.is_placeholder(plain);
                let mut word =
                    WordBuilder { text: forced.restore(&token.text), ..WordBuilder::default() };
                word.push(probability, force, token);
                words.push(word);
            }
        }
    }
    words.into_iter().map(|word| word.finish(settings.word_probability)).collect()
}

/// Returns whether a token contains a decimal digit of any script.
fn has_digit(token: &str) -> bool {
    static DIGIT: std::sync::LazyLock<Option<regex::Regex>> =
        std::sync::LazyLock::new(|| regex::Regex::new(r"\d").ok());
    DIGIT.as_ref().is_some_and(|digit| digit.is_match(token))
}

/// A word under construction from its tokens.
#[derive(Default)]
struct WordBuilder {
    text: String,
    probabilities: Vec<f32>,
    forced: Vec<bool>,
    sources: Vec<Range<usize>>,
}

impl WordBuilder {
    fn push(&mut self, probability: f32, forced: bool, token: &Token) {
        self.probabilities.push(probability);
        self.forced.push(forced);
        if !token.source.is_empty() {
            self.sources.push(token.source.clone());
        }
    }

    fn finish(self, how: WordProbability) -> Word {
        let count = match how {
            WordProbability::Mean => self.probabilities.len(),
            WordProbability::First => 1,
        };
        let mean = |values: &mut dyn Iterator<Item = f32>| values.sum::<f32>() / count as f32;
        // As in the package, `unforced_probability` uses the probability of the first token
        // for all tokens; `with_force` does not.
        let unforced_probability = mean(&mut std::iter::repeat_n(self.probabilities[0], count));
        let of_tokens = self.probabilities.iter().zip(&self.forced);
        let with_force = mean(&mut of_tokens.take(count).map(|(&p, &f)| if f { 1.0 } else { p }));
        let probability = match self.forced[..count].iter().all(|&forced| forced) {
            true => Number::F64(1.0),
            false => Number::F32(with_force),
        };
        let tokens = cl100k_tokens(&self.text);
        let source = span(self.sources).unwrap_or(0..0);
        Word { text: self.text, probability, unforced_probability, source, tokens }
    }
}

/// Returns which words of a window are kept if the share `reduce` of its tokens is dropped.
pub fn select(
    words: &[Word],
    forced: &ForcedTokens,
    drop_consecutive: bool,
    reduce: f64,
) -> Vec<bool> {
    let mut probabilities: Vec<Number> = words.iter().map(|word| word.probability).collect();
    if drop_consecutive {
        drop_repeated(words, forced, &mut probabilities, (100.0 * reduce) as u32);
    }
    let weighted: Vec<Number> = words
        .iter()
        .zip(&probabilities)
        .flat_map(|(word, &probability)| std::iter::repeat_n(probability, word.tokens))
        .collect();
    let Some(threshold) = percentile(&weighted, (100.0 * reduce + 1.0) as u32) else {
        return vec![false; words.len()];
    };
    let mut last_kept: Option<&str> = None;
    let mut stays = Vec::with_capacity(words.len());
    for (word, probability) in words.iter().zip(&probabilities) {
        let probability = probability.get();
        let above = probability > threshold || (threshold == 1.0 && probability == threshold);
        let repeats = last_kept == Some(word.text.as_str());
        let kept = above && !(drop_consecutive && repeats && forced.contains(&word.text));
        if kept {
            last_kept = Some(&word.text);
        }
        stays.push(kept);
    }
    stays
}

/// Removes the probability of a forced word if the same word precedes it and no word that is likely
/// to be kept lies between.
fn drop_repeated(words: &[Word], forced: &ForcedTokens, probabilities: &mut [Number], q: u32) {
    let Some(threshold) = percentile(probabilities, q) else { return };
    let mut between = false;
    let mut previous: Option<&str> = None;
    for (word, probability) in words.iter().zip(probabilities) {
        if forced.contains(&word.text) {
            if between {
                between = false;
            } else if previous == Some(word.text.as_str()) {
                *probability = Number::F64(0.0);
            }
            previous = Some(&word.text);
        } else {
            between |= probability.get() > threshold;
        }
    }
}
