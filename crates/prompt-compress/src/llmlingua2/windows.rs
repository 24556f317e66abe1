//! Splits a text into windows for the encoder, with the source of every token.

use std::ops::Range;

use super::encoder::{EncoderInput, WINDOW};
use super::forced_tokens::ForcedTokens;
use super::vocabulary::{Vocabulary, span};
use longctx_core::Result;

/// A run of the text's tokens, decoded to text.
#[derive(Debug)]
pub struct Window {
    /// The text, with placeholders for forced tokens.
    pub text: String,
    /// The parts of the text: byte ranges in it, each with its bytes in the original.
    pub parts: Vec<(Range<usize>, Range<usize>)>,
}

/// An input token of the encoder.
#[derive(Debug)]
pub struct Token {
    pub text: String,
    /// Its bytes in the original; empty if it has none.
    pub source: Range<usize>,
}

/// Splits `text` into windows. Each is as long as possible, but ends at the last of `ends` in it.
///
/// As in the package, a window may have one token more than fits beside its first and last special
/// token; its last token is then dropped.
pub fn split(
    vocabulary: &Vocabulary,
    forced: &ForcedTokens,
    ends: &[String],
    text: &str,
) -> Result<Vec<Window>> {
    let mapped = forced.replace(text);
    let encoding = vocabulary.encode(&mapped.text)?;
    let (tokens, offsets) = (encoding.get_tokens(), encoding.get_offsets());
    let is_end = |token: &String| {
        ends.iter().any(|end| end == token || forced.placeholder(end) == Some(token.as_str()))
    };
    let mut windows = Vec::new();
    let mut start = 0;
    while start < tokens.len() {
        let full = start + WINDOW - 2;
        let last = match full < tokens.len() {
            true => (start + 1..=full).rev().find(|&i| is_end(&tokens[i])).unwrap_or(full),
            false => tokens.len() - 1,
        };
        let decoded = vocabulary.decode(tokens[start..=last].to_vec())?;
        let mut window = Window { text: String::new(), parts: Vec::new() };
        for (part, &(from, to)) in decoded.iter().zip(&offsets[start..=last]) {
            let at = window.text.len();
            window.text.push_str(part);
            window.parts.push((at..window.text.len(), mapped.source(&(from..to))));
        }
        windows.push(window);
        start = last + 1;
    }
    Ok(windows)
}

impl Window {
    /// Returns the window's encoder input, with the special tokens at both ends, and its tokens.
    pub fn encoder_input(
        &self,
        vocabulary: &Vocabulary,
        positions: impl Fn(&[u32]) -> Vec<u32>,
    ) -> Result<(EncoderInput, Vec<Token>)> {
        let encoding = vocabulary.encode(&self.text)?;
        let (first, last) = vocabulary.special_ids;
        let mut tokens = vec![Token { text: vocabulary.token(first), source: 0..0 }];
        let mut ids = vec![first];
        for (&id, &(from, to)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            ids.push(id);
            tokens.push(Token { text: vocabulary.token(id), source: self.source(from..to) });
        }
        ids.push(last);
        tokens.push(Token { text: vocabulary.token(last), source: 0..0 });
        ids.truncate(WINDOW);
        tokens.truncate(WINDOW);
        let positions = positions(&ids);
        let seen: Vec<bool> = tokens.iter().map(|t| !vocabulary.is_masked(&t.text)).collect();
        let only_seen = |all: Vec<u32>| {
            all.into_iter().zip(&seen).filter(|(_, seen)| **seen).map(|(x, _)| x).collect()
        };
        let input = EncoderInput { ids: only_seen(ids), positions: only_seen(positions) };
        let mut kept = seen.iter();
        tokens.retain(|_| *kept.next().unwrap_or(&true));
        Ok((input, tokens))
    }

    /// Returns the bytes of the original for a range of the window's text.
    fn source(&self, range: Range<usize>) -> Range<usize> {
        let first = self.parts.partition_point(|(at, _)| at.end <= range.start);
        let behind = self.parts[first..].iter().take_while(|(at, _)| at.start < range.end);
        let behind = behind.map(|(_, source)| source.clone()).filter(|source| !source.is_empty());
        span(behind).unwrap_or(0..0)
    }
}
