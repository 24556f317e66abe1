//! Text that grows with each token.

use crate::tokenizer::Tokenizer;
use longctx_core::Result;

const BROKEN: char = '\u{fffd}';
/// The most tokens held back at a time.
const MOST_HELD: usize = 8;
/// Tokens that an unfinished character may span: it has at most three bytes.
const UNFINISHED: usize = 3;

/// Turns tokens into text one at a time, in constant time each.
///
/// The pieces joined are [`Tokenizer::decode`] of all tokens, as long as these make whole
/// characters.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The tokens of the last whole characters. They are decoded again in front of the next ones: a
    /// token's text depends on whether something stands before it.
    before: Vec<u32>,
    /// The tokens since then, of which the last ends within a character.
    held: Vec<u32>,
    /// The part of their text that has been given out.
    given: String,
}

impl<'a> TextStream<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, before: Vec::new(), held: Vec::new(), given: String::new() }
    }

    /// The text that `token` completes; empty while a character is unfinished.
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

    /// The text of what is still held back, with U+FFFD for an unfinished character. The stream
    /// then begins anew.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.text()?;
        let rest = text.strip_prefix(&self.given).unwrap_or_default().to_owned();
        *self = Self::new(self.tokenizer);
        Ok(rest)
    }

    /// What the tokens held back add to the text before them.
    fn text(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.before)?;
        let all = self.tokenizer.decode(&[self.before.as_slice(), &self.held].concat())?;
        match all.strip_prefix(&before) {
            Some(new) => Ok(new.to_owned()),
            // An unfinished character made of byte tokens spoils whole ones in front of it.
            None => self.tokenizer.decode(&self.held),
        }
    }

    /// Forgets the first tokens held back: each of many ends within a character, or the text is
    /// broken and given out.
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
