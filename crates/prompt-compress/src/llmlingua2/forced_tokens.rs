//! Tokens that are always kept, and their placeholders if the vocabulary lacks them.

use std::ops::Range;

/// Forced tokens.
#[derive(Debug)]
pub struct ForcedTokens {
    tokens: Vec<String>,
    /// Pairs of a forced token and its placeholder in the vocabulary.
    placeholders: Vec<(String, String)>,
}

impl ForcedTokens {
    pub fn new(tokens: Vec<String>, placeholders: Vec<(String, String)>) -> Self {
        Self { tokens, placeholders }
    }

    pub fn contains(&self, token: &str) -> bool {
        self.tokens.iter().any(|forced| forced == token)
    }

    pub fn is_placeholder(&self, token: &str) -> bool {
        self.placeholders.iter().any(|(_, placeholder)| placeholder == token)
    }

    /// Returns the placeholder of `token`, if there is one.
    pub fn placeholder(&self, token: &str) -> Option<&str> {
        self.placeholders.iter().find(|(forced, _)| forced == token).map(|(_, s)| s.as_str())
    }

    /// Returns whether any token has a placeholder.
    pub fn has_placeholders(&self) -> bool {
        !self.placeholders.is_empty()
    }

    /// Replaces placeholders by their forced tokens.
    pub fn restore(&self, text: &str) -> String {
        self.placeholders.iter().fold(text.to_owned(), |text, (token, s)| text.replace(s, token))
    }

    /// Replaces forced tokens by their placeholders.
    pub fn replace(&self, text: &str) -> MappedText {
        let whole = MappedText { text: text.to_owned(), origin: (0..=text.len()).collect() };
        self.placeholders.iter().fold(whole, |mapped, (token, s)| mapped.replace(token, s))
    }
}

/// A text after replacements, with the mapping of its bytes to the original.
#[derive(Debug)]
pub struct MappedText {
    pub text: String,
    /// The original offset of each byte and of the end. All bytes of a replacement map to its
    /// start.
    origin: Vec<usize>,
}

impl MappedText {
    /// Returns the original bytes of a range.
    pub fn source(&self, range: &Range<usize>) -> Range<usize> {
        self.origin[range.start]..self.origin[range.end]
    }

    fn replace(self, from: &str, to: &str) -> Self {
        let mut text = String::with_capacity(self.text.len());
        let mut origin = Vec::with_capacity(self.origin.len());
        let mut done = 0;
        for (at, _) in self.text.match_indices(from) {
            text.push_str(&self.text[done..at]);
            origin.extend_from_slice(&self.origin[done..at]);
            text.push_str(to);
            origin.extend(std::iter::repeat_n(self.origin[at], to.len()));
            done = at + from.len();
        }
        text.push_str(&self.text[done..]);
        origin.extend_from_slice(&self.origin[done..]);
        Self { text, origin }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacements_know_their_origin() {
        let pairs = vec![("\n".into(), "[NEW0]".into()), ("ab".into(), "[NEW3]".into())];
        let forced = ForcedTokens::new(vec!["\n".into(), "ab".into()], pairs);
        let mapped = forced.replace("x\nyab!");
        assert_eq!(mapped.text, "x[NEW0]y[NEW3]!");
        assert_eq!(mapped.source(&(1..7)), 1..2);
        assert_eq!(mapped.source(&(7..8)), 2..3);
        assert_eq!(mapped.source(&(8..14)), 3..5);
        assert_eq!(mapped.source(&(0..15)), 0..6);
        assert_eq!(forced.restore(&mapped.text), "x\nyab!");
    }
}
