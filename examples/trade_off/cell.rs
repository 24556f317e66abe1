//! One cell of the sweep: a policy, a store, and how much it may hold.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use half::f16;
use kv_quant::{Format, QuantStore};
use longctx_core::{AttentionShape, Batch, DenseCache, DenseStore, KvCache, KvStore, LayerSpec};
use longctx_examples::heads::Heads;
use longctx_examples::methods::{Compress, Policy, Size, Store, duo_attention, windowed};
use token_drop::{Budget, EvictionPolicy, PolicyCache};

/// Every policy by name; "dense" keeps everything.
pub fn policies() -> impl Iterator<Item = &'static str> {
    ["dense", "duo-attention"].into_iter().chain(Policy::all().map(Policy::name))
}

/// What a share of the dense cache is a share of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Equal {
    /// Stores of fewer bits hold more tokens.
    Bytes,
    /// All stores hold the same tokens.
    Tokens,
}

#[derive(Debug, Clone)]
pub struct Cell {
    pub policy: String,
    pub store: Store,
    pub share: f64,
    /// Tokens per kv head.
    pub budget: usize,
    /// Which kv heads stream, per layer, under DuoAttention.
    streaming: Vec<Vec<bool>>,
}

impl Cell {
    pub fn dense() -> Self {
        let (policy, streaming) = ("dense".into(), Vec::new());
        Self { policy, store: Store::F16, share: 1.0, budget: usize::MAX, streaming }
    }

    /// `None` where there is no such cache: retrieval holds everything, whatever it reads, and
    /// DuoAttention's streaming heads have a least size.
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

    /// A cache for one layer. A policy evicts in layers without a sliding window; windows are held
    /// whole, in the same store.
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
            Some(policy) => policy.cache(spec, store, Size::Tokens(self.budget), 1, Compress::default()),
            None => Err(longctx_core::Error::setting("policy", "a known one", &self.policy)),
        }
    }
}

/// An answer is short: only policies that evict at every token evict during it.
fn brief<S: KvStore + 'static, P: EvictionPolicy + 'static>(
    cache: PolicyCache<S, P>,
) -> longctx_core::Result<Box<dyn KvCache>> {
    let step = cache.settings().decode_step.filter(|&step| step == 1);
    Ok(Box::new(cache.with_decode_step(step)?))
}

/// How many tokens a store holds in a share of the bytes of `tokens` f16 ones: counted, on a head
/// of 64 channels.
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
