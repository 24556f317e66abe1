use crate::budget::check_ratio;
use crate::prompt::Prompt;
use longctx_core::{Error, Result};

/// Sizes of InfLLM's memory, in tokens unless stated otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InfLlmSettings {
    /// First tokens, which every query sees.
    pub init: usize,
    /// The local window: a query sees itself and the `local - 1` tokens before it at their true
    /// distances.
    pub local: usize,
    /// Tokens per block.
    pub block: usize,
    /// Blocks that a chunk of queries retrieves.
    pub top_blocks: usize,
    /// The largest number of resident blocks.
    pub resident_blocks: usize,
    /// Tokens whose mean key represents a block.
    pub representatives: usize,
    /// Queries that share one retrieval.
    pub chunk: usize,
}

impl Default for InfLlmSettings {
    /// The sizes of the published code for Mistral-7B.
    fn default() -> Self {
        Self {
            init: 128,
            local: 4096,
            block: 128,
            top_blocks: 16,
            resident_blocks: 32,
            representatives: 4,
            chunk: 512,
        }
    }
}

impl InfLlmSettings {
    /// Returns sizes for a share `ratio` of a prompt: 2.1% of the share are first tokens, 32.4%
    /// retrieved blocks of 128, the rest the local window, which is at least one chunk of 512.
    /// These are the numbers of henryzhongsc/longctx_bench for passkey retrieval and LongBench.
    ///
    /// # Errors
    /// [`Error::Setting`] unless `ratio` lies between 0 and 1.
    pub fn of_prompt(ratio: f64, prompt: usize) -> Result<Self> {
        check_ratio(ratio)?;
        let usual = Self::default();
        let all = (ratio * prompt as f64) as usize;
        let init = (all as f64 * 0.021) as usize;
        let top_blocks = (all as f64 * 0.324) as usize / usual.block;
        let local = all.saturating_sub(init + top_blocks * usual.block).max(usual.chunk);
        Ok(Self { init, local, top_blocks, resident_blocks: top_blocks, ..usual })
    }

    /// Checks that the sizes are consistent.
    ///
    /// # Errors
    /// [`Error::Setting`] naming the invalid size.
    pub fn check(&self) -> Result<()> {
        let at_least_one = |name: &str, value: usize| match value {
            0 => Err(Error::setting(name, "at least 1", 0)),
            _ => Ok(()),
        };
        at_least_one("local window", self.local)?;
        at_least_one("block", self.block)?;
        at_least_one("representatives", self.representatives)?;
        at_least_one("chunk", self.chunk)?;
        if self.chunk > self.local {
            let expected = format!("at most the local window of {}", self.local);
            return Err(Error::setting("chunk", expected, self.chunk));
        }
        if self.representatives > self.block {
            let expected = format!("at most the block's {} tokens", self.block);
            return Err(Error::setting("representatives", expected, self.representatives));
        }
        if self.resident_blocks < self.top_blocks {
            let expected = format!("at least the {} retrieved blocks", self.top_blocks);
            return Err(Error::setting("resident blocks", expected, self.resident_blocks));
        }
        Ok(())
    }
}

/// Fixed sizes, or sizes that are a ratio of each prompt.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Sizes {
    Fixed(InfLlmSettings),
    Ratio(f64),
}

impl Sizes {
    pub fn of(self, prompt: Prompt) -> Result<InfLlmSettings> {
        match self {
            Sizes::Fixed(sizes) => Ok(sizes),
            Sizes::Ratio(ratio) => InfLlmSettings::of_prompt(ratio, prompt.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_split_as_in_the_paper() {
        let of = |ratio, prompt| InfLlmSettings::of_prompt(ratio, prompt).unwrap();
        // 2000 tokens: 42 first, 648 for 5 blocks of 128, the rest local.
        let s = of(0.25, 8000);
        assert_eq!((s.init, s.top_blocks, s.resident_blocks, s.local), (42, 5, 5, 1318));
        // A small budget still has a window of one chunk.
        let s = of(0.25, 1000);
        assert_eq!((s.init, s.top_blocks, s.local), (5, 0, 512));
        assert!(InfLlmSettings::of_prompt(1.0, 10).is_err());
    }

    #[test]
    fn sizes_that_do_not_fit_are_named() {
        let message = |change: fn(&mut InfLlmSettings)| {
            let mut settings = InfLlmSettings::default();
            change(&mut settings);
            settings.check().expect_err("an error").to_string()
        };
        assert!(message(|s| s.local = 0).contains("local window"));
        assert!(message(|s| s.chunk = 5000).contains("chunk"));
        assert!(message(|s| s.representatives = 129).contains("representatives"));
        assert!(message(|s| s.resident_blocks = 15).contains("resident blocks"));
        assert!(InfLlmSettings::default().check().is_ok());
    }
}
