//! How long a sequence's prompt is: what a budget that is a ratio of it goes by.

/// The prompt of one sequence, as far as it is known.
///
/// The engine can tell its length. Otherwise it grows as it comes: calls of several tokens belong to
/// the prompt, and calls of one token are decoded tokens; but as long as no call of several tokens
/// has come, calls of one token count as the prompt.
#[derive(Debug, Clone, Copy, Default)]
pub struct Prompt {
    expected: Option<usize>,
    tokens: usize,
    /// Whether a call of several tokens has come.
    chunked: bool,
}

impl Prompt {
    /// A prompt of this length, or one that grows as it comes.
    pub fn new(expected: Option<usize>) -> Self {
        Self { expected, ..Self::default() }
    }

    /// After a call of `tokens` tokens, with which `seen` have come.
    #[must_use]
    pub fn grown(self, tokens: usize, seen: usize) -> Self {
        let chunked = self.chunked || tokens > 1;
        let grows = tokens > 1 || !self.chunked;
        Self { tokens: if grows { seen } else { self.tokens }, chunked, ..self }
    }

    /// After all tokens but the first `len` were taken back.
    #[must_use]
    pub fn truncated(self, len: usize) -> Self {
        Self { tokens: self.tokens.min(len), chunked: self.chunked && len > 0, ..self }
    }

    /// Tokens of the prompt.
    pub fn len(&self) -> usize {
        self.expected.unwrap_or(self.tokens)
    }

    /// Whether a call of `tokens` tokens after the first `seen` brings a prompt, and not what is
    /// decoded.
    pub fn brings(&self, tokens: usize, seen: usize) -> bool {
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
        let (told, untold) = (Prompt::new(Some(50)), Prompt::new(None));
        assert!(told.brings(1, 49) && !told.brings(3, 50));
        assert!(untold.brings(3, 50) && untold.brings(1, 0) && !untold.brings(1, 1));
    }
}
