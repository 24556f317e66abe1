//! Truncation of the middle.

use crate::units::words;
use longctx_core::{Compressed, Prompt, PromptCompressor, Rate, Result};

/// Keeps the first and the last words, half of the budget each, and drops the middle.
///
/// LongBench (arXiv 2308.14508), and later arXiv 2407.01527, truncate inputs that do not fit the
/// model in this way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TruncateMiddle;

impl PromptCompressor for TruncateMiddle {
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed> {
        let words = words(prompt.text);
        let kept = rate.apply(words.len());
        let (head, tail) = (kept.div_ceil(2), kept / 2);
        let ends = words[..head].iter().chain(&words[words.len() - tail..]);
        Compressed::copy(prompt.text, ends.cloned())
    }
}
