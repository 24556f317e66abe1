//! Random words.

use crate::units::words;
use longctx_core::{Compressed, Prompt, PromptCompressor, Rate, Result};
use rand::{SeedableRng, rngs::StdRng, seq::index};

/// Keeps random words in text order: the weakest baseline.
///
/// The same seed and text give the same words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RandomDrop {
    /// Seed of the random numbers.
    pub seed: u64,
}

impl PromptCompressor for RandomDrop {
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed> {
        let words = words(prompt.text);
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut kept = index::sample(&mut rng, words.len(), rate.apply(words.len())).into_vec();
        kept.sort_unstable();
        Compressed::copy(prompt.text, kept.into_iter().map(|i| words[i].clone()))
    }
}
