//! One cell of the sweep: a policy, a store and a budget.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use half::f16;
use kv_quant::{Format, QuantStore};
use longctx_core::{AttentionShape, Batch, DenseCache, DenseStore, KvCache, KvStore, LayerSpec};
use longctx_examples::heads::Heads;
use longctx_examples::methods::{Compress, Policy, Size, Store, duo_attention, windowed};
use token_drop::{Budget, EvictionPolicy, PolicyCache};

/// Returns the names of all policies; "dense" keeps everything.
pub fn policies() -> impl Iterator<Item = &'static str> {
    ["dense", "duo-attention"].into_iter().chain(Policy::all().map(Policy::name))
}

/// The unit of a share of the dense cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Equal {
    /// Bytes: stores with fewer bits hold more tokens.
    Bytes,
    /// Tokens: all stores hold the same number of tokens.
    Tokens,
}

#[derive(Debug, Clone)]
pub struct Cell {
    pub policy: String,
    pub store: Store,
    pub share: f64,
    /// Tokens per kv head.
    pub budget: usize,
    /// DuoAttention's streaming kv heads, per layer.
    streaming: Vec<Vec<bool>>,
}

impl Cell {
    pub fn dense() -> Self {
        let (policy, streaming) = ("dense".into(), Vec::new());
        Self { policy, store: Store::F16, share: 1.0, budget: usize::MAX, streaming }
    }

    /// Creates a cell; `None` if such a cache does not exist. Retrieval always holds everything,
    /// and DuoAttention's streaming heads have a minimum size.
    pub fn new(
        policy: &str,
        store: Store,
        share: f64,
        equal: Equal,
        tokens: usize,
        heads: &Heads,
    ) -> Result<Option<Self>> {
        if matches!(policy, "quest" | "infllm") && equal == Equal::Bytes {
            return Ok(None);
        }
        let budget = match equal {
            Equal::Tokens => (share * tokens as f64) as usize,
            Equal::Bytes => tokens_in(store, share, tokens)?,
        };
        let streaming = match policy {
            "duo-attention" => heads.split(budget, tokens)?,
            _ => Some(Vec::new()),
        };
        let cell = |streaming| Self { policy: policy.into(), store, share, budget, streaming };
        Ok(streaming.map(cell))
    }

    /// Creates a cache for one layer. A policy evicts in layers without a sliding window; other
    /// layers hold their whole window, in the same store.
    pub fn cache(&self, spec: &LayerSpec) -> longctx_core::Result<Box<dyn KvCache>> {
        if spec.shape.window.is_some() {
            return windowed(spec, self.store.format()?, None);
        }
        match self.store.format()? {
            None => self.over(DenseStore::new(spec.shape, DType::F16)?, spec.clone()),
            Some(format) => self.over(QuantStore::new(spec.shape, format)?, spec.clone()),
        }
    }

    fn over<S: KvStore + 'static>(
        &self,
        store: S,
        spec: LayerSpec,
    ) -> longctx_core::Result<Box<dyn KvCache>> {
        match self.policy.as_str() {
            "dense" => return Ok(Box::new(DenseCache::new(spec, DType::F16)?)),
            "duo-attention" => return brief(duo_attention(spec, store, &self.streaming)?),
            _ => {}
        }
        match Policy::named(&self.policy) {
            Some(Policy::Eviction(policy)) => {
                brief(policy.cache(spec, store, Budget::Tokens(self.budget))?)
            }
            Some(policy) => {
                policy.cache(spec, store, Size::Tokens(self.budget), 1, Compress::default())
            }
            None => Err(longctx_core::Error::setting("policy", "a known one", &self.policy)),
        }
    }
}

/// Answers are short, so only policies that evict at every token evict during an answer.
fn brief<S: KvStore + 'static, P: EvictionPolicy + 'static>(
    cache: PolicyCache<S, P>,
) -> longctx_core::Result<Box<dyn KvCache>> {
    let step = cache.settings().decode_step.filter(|&step| step == 1);
    Ok(Box::new(cache.with_decode_step(step)?))
}

/// Returns the number of tokens that a store holds in a share of the bytes of `tokens` f16 tokens.
/// The bytes are counted on a head of 64 channels.
fn tokens_in(store: Store, share: f64, tokens: usize) -> Result<usize> {
    let dense = |count: usize| count * 2 * 64 * size_of::<f16>();
    let bytes = share * dense(tokens) as f64;
    let held = |count: usize| match store.format()? {
        None => Ok(dense(count)),
        Some(format) => packed_bytes(format, count),
    };
    let (mut most, mut least) = (tokens, 0);
    while least < most {
        let middle = (least + most).div_ceil(2);
        if held(middle)? as f64 <= bytes { least = middle } else { most = middle - 1 }
    }
    Ok(least)
}

fn packed_bytes(format: Format, tokens: usize) -> Result<usize> {
    let mut store = QuantStore::new(AttentionShape::new(1, 1, 64)?, format)?;
    let x = Tensor::zeros((tokens, 1, 64), DType::F32, &Device::Cpu)?;
    store.append(&Batch::single(0, tokens)?, &x, &x)?;
    let held = store.footprint();
    Ok(held.total() - held.slack)
}
