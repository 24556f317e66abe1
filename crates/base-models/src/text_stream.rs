//! Incremental decoding of tokens to text.

use crate::tokenizer::Tokenizer;
use longctx_core::Result;

const BROKEN: char = '\u{fffd}';
/// The largest number of pending tokens.
const MOST_HELD: usize = 8;
/// Tokens that an incomplete character may span: it has at most three bytes.
const UNFINISHED: usize = 3;

/// Decodes tokens one at a time, in constant time each.
///
/// The concatenated pieces equal [`Tokenizer::decode`] of all tokens, if these form whole
/// characters.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the last complete characters. They are decoded again before the next ones,
    /// because the text of a token may depend on the tokens before it.
    before: Vec<u32>,
    /// The pending tokens; the last one ends within a character.
    held: Vec<u32>,
    /// The part of their text that has been returned.
    given: String,
}

impl<'a> TextStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, before: Vec::new(), held: Vec::new(), given: String::new() }
    }

    /// Returns the text that `token` completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<String> {
        if self.tokenizer.is_silent(token) {
            return Ok(String::new());
        }
        self.held.push(token);
        let text = self.text()?;
        let whole = text.trim_end_matches(BROKEN);
        let mut new = whole.strip_prefix(&self.given).unwrap_or_default().to_owned();
        if !text.is_empty() && whole == text && text.starts_with(&self.given) {
            self.before = std::mem::take(&mut self.held);
            self.given.clear();
            return Ok(new);
        }
        self.given += &new;
        if self.held.len() >= MOST_HELD {
            new += &self.shorten(&text)?;
        }
        Ok(new)
    }

    /// Returns the text of the pending tokens, with U+FFFD for an incomplete character, and resets
    /// the stream.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.text()?;
        let rest = text.strip_prefix(&self.given).unwrap_or_default().to_owned();
        *self = Self::new(self.tokenizer);
        Ok(rest)
    }

    /// Returns the text that the pending tokens add.
    fn text(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.before)?;
        let all = self.tokenizer.decode(&[self.before.as_slice(), &self.held].concat())?;
        match all.strip_prefix(&before) {
            Some(new) => Ok(new.to_owned()),
            // An incomplete character of byte tokens also changes complete ones before it.
            None => self.tokenizer.decode(&self.held),
        }
    }

    /// Drops the first pending tokens. Reached if each of many tokens ends within a character, or
    /// the text is invalid; their text is returned.
    fn shorten(&mut self, text: &str) -> Result<String> {
        let rest = text.strip_prefix(&self.given).unwrap_or(text);
        let last = self.held.split_off(self.held.len() - UNFINISHED - 1);
        let tail = self.tokenizer.decode(&last)?;
        match tail.strip_suffix(rest) {
            Some(given) => {
                self.before.clear();
                self.given = given.to_owned();
                self.held = last;
                Ok(String::new())
            }
            None => {
                self.before = last[UNFINISHED..].to_vec();
                self.given.clear();
                self.held.clear();
                Ok(rest.to_owned())
            }
        }
    }
}
