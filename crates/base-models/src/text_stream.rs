//! Incremental decoding of tokens to text.

use crate::tokenizer::Tokenizer;
use longctx_core::Result;

const BROKEN: char = '\u{fffd}';
/// The largest number of pending tokens.
const MAX_PENDING: usize = 8;
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
    context: Vec<u32>,
    /// The pending tokens; the last one ends within a character.
    pending: Vec<u32>,
    /// The part of their text that has been returned.
    emitted: String,
}

impl<'a> TextStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, context: Vec::new(), pending: Vec::new(), emitted: String::new() }
    }

    /// Returns the text that `token` completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, token: u32) -> Result<String> {
        if self.tokenizer.is_silent(token) {
            return Ok(String::new());
        }
        self.pending.push(token);
        let text = self.text()?;
        let whole = text.trim_end_matches(BROKEN);
        let mut new = whole.strip_prefix(&self.emitted).unwrap_or_default().to_owned();
        if !text.is_empty() && whole == text && text.starts_with(&self.emitted) {
            self.context = std::mem::take(&mut self.pending);
            self.emitted.clear();
            return Ok(new);
        }
        self.emitted += &new;
        if self.pending.len() >= MAX_PENDING {
            new += &self.drop_pending(&text)?;
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
        let rest = text.strip_prefix(&self.emitted).unwrap_or_default().to_owned();
        *self = Self::new(self.tokenizer);
        Ok(rest)
    }

    /// Returns the text that the pending tokens add.
    fn text(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.context)?;
        let all = self.tokenizer.decode(&[self.context.as_slice(), &self.pending].concat())?;
        match all.strip_prefix(&before) {
            Some(new) => Ok(new.to_owned()),
            // An incomplete character of byte tokens also changes complete ones before it.
            None => self.tokenizer.decode(&self.pending),
        }
    }

    /// Drops the first pending tokens. Reached if each of many tokens ends within a character, or
    /// the text is invalid; their text is returned.
    fn drop_pending(&mut self, text: &str) -> Result<String> {
        let rest = text.strip_prefix(&self.emitted).unwrap_or(text);
        let last = self.pending.split_off(self.pending.len() - UNFINISHED - 1);
        let tail = self.tokenizer.decode(&last)?;
        match tail.strip_suffix(rest) {
            Some(emitted) => {
                self.context.clear();
                self.emitted = emitted.to_owned();
                self.pending = last;
                Ok(String::new())
            }
            None => {
                self.context = last[UNFINISHED..].to_vec();
                self.emitted.clear();
                self.pending.clear();
                Ok(rest.to_owned())
            }
        }
    }
}
