//! The length of a sequence's prompt, which a budget that is a ratio depends on.

/// The known part of one sequence's prompt.
///
/// The engine can declare the prompt's length. Otherwise it grows with the calls: calls of several
/// tokens belong to the prompt, and calls of one token are decoding. Single-token calls before the
/// first call of several tokens count as the prompt.
#[derive(Debug, Clone, Copy, Default)]
pub struct Prompt {
    expected: Option<usize>,
    tokens: usize,
    /// Whether there was a call of several tokens.
    chunked: bool,
}

impl Prompt {
    /// Creates a prompt of a declared length, or one that grows.
    pub fn new(expected: Option<usize>) -> Self {
        Self { expected, ..Self::default() }
    }

    /// Returns the prompt after a call of `tokens` tokens, when `seen` tokens in total have been
    /// fed.
    #[must_use]
    pub fn grown(self, tokens: usize, seen: usize) -> Self {
        let chunked = self.chunked || tokens > 1;
        let grows = tokens > 1 || !self.chunked;
        Self { tokens: if grows { seen } else { self.tokens }, chunked, ..self }
    }

    /// Returns the prompt after truncation to the first `len` tokens.
    #[must_use]
    pub fn truncated(self, len: usize) -> Self {
        Self { tokens: self.tokens.min(len), chunked: self.chunked && len > 0, ..self }
    }

    /// Returns the number of the prompt's tokens.
    pub fn len(&self) -> usize {
        self.expected.unwrap_or(self.tokens)
    }

    /// Returns whether a call of `tokens` tokens after the first `seen` belongs to the prompt, and
    /// not to decoding.
    pub fn contains_call(&self, tokens: usize, seen: usize) -> bool {
        seen == 0 || self.expected.map_or(tokens > 1, |expected| seen < expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lens(expected: Option<usize>, calls: &[usize]) -> Vec<usize> {
        let (mut prompt, mut seen) = (Prompt::new(expected), 0);
        let mut after = |&tokens: &usize| {
            seen += tokens;
            prompt = prompt.grown(tokens, seen);
            prompt.len()
        };
        calls.iter().map(&mut after).collect()
    }

    #[test]
    fn chunks_and_leading_tokens_are_the_prompt() {
        assert_eq!(lens(None, &[40, 60, 1, 1, 5, 1]), [40, 100, 100, 100, 107, 107]);
        assert_eq!(lens(None, &[1, 1, 1, 1]), [1, 2, 3, 4]);
        assert_eq!(lens(None, &[1, 1, 9, 1]), [1, 2, 11, 11]);
        assert_eq!(lens(Some(50), &[1, 9, 60, 1]), [50; 4]);
        let (declared, undeclared) = (Prompt::new(Some(50)), Prompt::new(None));
        assert!(declared.contains_call(1, 49) && !declared.contains_call(3, 50));
        assert!(
            undeclared.contains_call(3, 50)
                && undeclared.contains_call(1, 0)
                && !undeclared.contains_call(1, 1)
        );
    }
}
