//! What decides which entries stay, or are read.

use candle_core::DType;
use longctx_core::{DenseStore, Error, KvCache, KvStore, LayerSpec, Result};
use token_drop::{Budget, InfLlm, InfLlmSettings, Quest, StreamingLlm};

use super::{Compress, Eviction};

/// How much of a sequence stays or is read, in each kv head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Size {
    /// This share of the prompt's tokens.
    Share(f64),
    /// So many tokens.
    Tokens(usize),
}

/// A policy by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Scores decide.
    Eviction(Eviction),
    /// Attention sinks and the newest tokens, at positions within the cache.
    StreamingLlm,
    /// Everything stays; the nearest blocks are read.
    InfLlm,
    /// Everything stays; the pages with the highest bounds are read.
    Quest,
}

impl Policy {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        let own = [Self::StreamingLlm, Self::InfLlm, Self::Quest];
        Eviction::ALL.into_iter().map(Self::Eviction).chain(own)
    }

    /// The policy of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|policy| policy.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eviction(policy) => policy.name(),
            Self::StreamingLlm => "streaming-llm",
            Self::InfLlm => "infllm",
            Self::Quest => "quest",
        }
    }

    /// A cache for one layer over `store`; InfLLM's local window lies in f16. `step`: tokens that
    /// StreamingLLM drops at a time; a packed store's group spares it from packing all groups anew. `compress`: the tokens that an eviction policy is
    /// applied to.
    ///
    /// # Errors
    /// If the size or the layer does not fit the policy.
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

/// The shares of arXiv 2407.01527, with blocks and chunks small enough for short prompts.
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
