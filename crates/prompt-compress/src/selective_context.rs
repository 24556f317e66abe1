//! Selective-Context: drops the text that a causal model predicts well.
//!
//! Li et al., *Compressing Context to Enhance Inference Efficiency of Large Language Models*, arXiv
//! 2310.06201. The authors' units are noun phrases, sentences or tokens; here they are words, with
//! the white space before them, or sentences. A token that is a single space is not counted, as in
//! the authors' Python package `selective-context` 0.1.4.

use std::ops::Range;

use crate::loss::{LossModel, encode};
use crate::units::sentences;
use longctx_core::{CausalLm, Compressed, Error, Prompt, PromptCompressor, Rate, Result};
use tokenizers::Tokenizer;

/// The unit that is kept or dropped as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unit {
    /// A word, with the white space before it.
    Word,
    /// A sentence.
    Sentence,
}

/// A compressor that measures the self-information of each unit of a text with a causal model.
#[derive(Debug)]
pub struct SelectiveContext<M> {
    loss_model: LossModel<M>,
    tokenizer: Tokenizer,
    /// The token fed before a text.
    bos: u32,
    unit: Unit,
    split: Split,
    /// Whether each sentence is read separately.
    by_sentence: bool,
}

/// Splits a text into consecutive ranges that cover it.
type Split = fn(&str) -> Vec<Range<usize>>;

impl<M: CausalLm> SelectiveContext<M> {
    /// Creates a compressor from a model, its tokenizer and the token that the model expects before
    /// a text. Each token is conditioned on the text before it, within the model's context.
    /// Sentences follow the Unicode rules.
    pub fn new(model: M, tokenizer: Tokenizer, bos: u32, unit: Unit) -> Self {
        let split = sentences;
        Self { loss_model: LossModel::new(model), tokenizer, bos, unit, split, by_sentence: false }
    }

    /// Reads each sentence separately, as the authors' program does, so that earlier sentences are
    /// not part of the context. `split` returns the sentences, consecutive ranges that cover the
    /// text.
    pub fn sentence_by_sentence(self, split: fn(&str) -> Vec<Range<usize>>) -> Self {
        Self { split, by_sentence: true, ..self }
    }

    /// Returns the mean self-information of each unit, in nats per token; NaN if no token begins in
    /// it.
    fn information(&mut self, text: &str, units: &[Range<usize>]) -> Result<Vec<f64>> {
        let mut sums = vec![(0.0, 0usize); units.len()];
        let read = self.loss_model.context_length().saturating_sub(1);
        if read == 0 {
            return Err(Error::setting("context length", "at least 2 tokens", read + 1));
        }
        let whole = std::iter::once(0..text.len()).collect();
        for part in if self.by_sentence { (self.split)(text) } else { whole } {
            // Sentences are read without the surrounding white space.
            let part = if self.by_sentence { trimmed(text, part)? } else { part };
            let tokens = encode(&self.tokenizer, &text[part.clone()], false)?;
            for (ids, offsets) in tokens.ids.chunks(read).zip(tokens.offsets.chunks(read)) {
                let ids = [&[self.bos], ids].concat();
                for (loss, offset) in self.loss_model.losses(&ids, 0)?.into_iter().zip(offsets) {
                    let start = part.start + offset.start;
                    if text.get(start..part.start + offset.end) == Some(" ") {
                        continue;
                    }
                    let unit = units.partition_point(|unit| unit.start <= start);
                    let sum = &mut sums[unit.saturating_sub(1)];
                    *sum = (sum.0 + f64::from(loss), sum.1 + 1);
                }
            }
        }
        Ok(sums.into_iter().map(|(sum, count)| sum / count as f64).collect())
    }
}

impl<M: CausalLm> PromptCompressor for SelectiveContext<M> {
    /// Keeps the units above the percentile of self-information that the rate sets. Ignores the
    /// question.
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed> {
        let units = match self.unit {
            Unit::Word => spaced_words(prompt.text),
            Unit::Sentence => (self.split)(prompt.text),
        };
        let information = self.information(prompt.text, &units)?;
        let mut known: Vec<f64> = information.iter().copied().filter(|x| !x.is_nan()).collect();
        known.sort_by(f64::total_cmp);
        let threshold = quantile(&known, 1.0 - rate.get());
        let stays = |information: f64| information >= threshold || rate == Rate::ONE;
        let kept = units.into_iter().zip(information).filter(|&(_, x)| stays(x));
        Compressed::copy(prompt.text, kept.map(|(unit, _)| unit))
    }
}

/// Returns the range without white space at its ends.
fn trimmed(text: &str, range: Range<usize>) -> Result<Range<usize>> {
    let Some(part) = text.get(range.clone()) else {
        let expected = format!("character boundaries within {} bytes", text.len());
        return Err(Error::mismatch("sentence", expected, format!("{range:?}")));
    };
    let start = range.start + part.len() - part.trim_start().len();
    Ok(start..start + part.trim().len())
}

/// Returns the `q`th quantile of sorted numbers, by linear interpolation.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NEG_INFINITY };
    let at = last as f64 * q;
    let (a, b) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    a + (b - a) * at.fract()
}

/// Returns words with the white space before them; trailing white space belongs to the last word.
fn spaced_words(text: &str) -> Vec<Range<usize>> {
    let mut words: Vec<Range<usize>> = Vec::new();
    let mut in_word = false;
    for (at, c) in text.char_indices() {
        let space = c.is_whitespace();
        if words.is_empty() || (space && in_word) {
            words.push(at..at);
        }
        in_word = !space;
        if let Some(last) = words.last_mut() {
            last.end = at + c.len_utf8();
        }
    }
    // Only white space follows the last word.
    if words.len() > 1 && !in_word {
        let end = words.pop().map(|space| space.end);
        if let (Some(last), Some(end)) = (words.last_mut(), end) {
            last.end = end;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_tile_the_text() {
        let cut = |text: &'static str| {
            spaced_words(text).into_iter().map(|r| &text[r]).collect::<Vec<_>>()
        };
        assert_eq!(cut(" a  b\nc \n"), [" a", "  b", "\nc \n"]);
        assert_eq!(cut(" \n"), [" \n"]);
        assert!(cut("").is_empty());
    }
}
