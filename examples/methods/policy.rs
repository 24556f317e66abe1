//! Policies of eviction and retrieval by name.

use candle_core::DType;
use longctx_core::{DenseStore, Error, KvCache, KvStore, LayerSpec, Result};
use token_drop::{Budget, InfLlm, InfLlmSettings, Quest, StreamingLlm};

use super::{Compress, Eviction};

/// The number of entries to keep or to read per kv head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Size {
    /// A share of the prompt's tokens.
    Share(f64),
    /// A number of tokens.
    Tokens(usize),
}

/// A policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Keeps the entries with the highest scores.
    Eviction(Eviction),
    /// Keeps attention sinks and the newest tokens, at positions within the cache.
    StreamingLlm,
    /// Keeps all entries and reads the most similar blocks.
    InfLlm,
    /// Keeps all entries and reads the pages with the highest upper bounds of scores.
    Quest,
}

impl Policy {
    /// Returns all policies.
    pub fn all() -> impl Iterator<Item = Self> {
        let own = [Self::StreamingLlm, Self::InfLlm, Self::Quest];
        Eviction::ALL.into_iter().map(Self::Eviction).chain(own)
    }

    /// Returns the policy with a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|policy| policy.name() == name)
    }

    /// Returns the name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eviction(policy) => policy.name(),
            Self::StreamingLlm => "streaming-llm",
            Self::InfLlm => "infllm",
            Self::Quest => "quest",
        }
    }

    /// Creates a cache for one layer over `store`. InfLLM's local window is in f16. `step` is the
    /// number of tokens that StreamingLLM evicts at a time; the group size of a packed store avoids
    /// packing all groups again. `compress` are the tokens that an eviction policy is applied to.
    ///
    /// # Errors
    /// If the policy does not support the size or the layer.
    pub fn cache<S: KvStore + 'static>(
        self,
        spec: LayerSpec,
        store: S,
        size: Size,
        step: usize,
        compress: Compress,
    ) -> Result<Box<dyn KvCache>> {
        if compress != Compress::Published && !matches!(self, Self::Eviction(_)) {
            let name = format!("tokens that {} compresses", self.name());
            return Err(Error::setting(name, "those of its publication", format!("{compress:?}")));
        }
        Ok(match (self, size) {
            (Self::Eviction(policy), Size::Share(share)) => {
                Box::new(compress.evicting(policy.cache(spec, store, Budget::Ratio(share))?)?)
            }
            (Self::Eviction(policy), Size::Tokens(tokens)) => {
                Box::new(compress.evicting(policy.cache(spec, store, Budget::Tokens(tokens))?)?)
            }
            (Self::StreamingLlm, Size::Share(share)) => {
                Box::new(StreamingLlm::with_ratio(spec, store, share)?.with_step(step)?)
            }
            (Self::StreamingLlm, Size::Tokens(tokens)) => {
                let window = tokens.saturating_sub(4);
                Box::new(StreamingLlm::new(spec, store, 4, window)?.with_step(step)?)
            }
            (Self::InfLlm, size) => {
                let window = DenseStore::new(spec.shape, DType::F16)?;
                match size {
                    Size::Share(share) => Box::new(InfLlm::with_ratio(spec, store, window, share)?),
                    Size::Tokens(tokens) => {
                        Box::new(InfLlm::new(spec, store, window, inf_llm_settings(tokens))?)
                    }
                }
            }
            (Self::Quest, Size::Tokens(tokens)) => Box::new(Quest::new(spec, store, tokens)?),
            (Self::Quest, Size::Share(share)) => {
                let got = format!("a share of the prompt, {share}");
                return Err(Error::setting("budget of quest", "a number of tokens", got));
            }
        })
    }
}

/// Returns InfLLM's settings with the ratios of arXiv 2407.01527, and with blocks and chunks small
/// enough for short prompts.
fn inf_llm_settings(tokens: usize) -> InfLlmSettings {
    let block = 32;
    let init = (0.021 * tokens as f64) as usize;
    let top_blocks = (0.324 * tokens as f64) as usize / block;
    InfLlmSettings {
        init,
        local: tokens - init - top_blocks * block,
        block,
        top_blocks,
        resident_blocks: top_blocks,
        representatives: 4,
        chunk: 64,
    }
}
