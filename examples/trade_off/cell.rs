//! One cell of the sweep: a policy, a store, and how much it may hold.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use half::f16;
use kv_quant::{Bits, Format, QuantStore};
use longctx_core::{
    AttentionShape, DenseCache, DenseStore, EvictionPolicy, KvCache, KvStore, LayerShape,
};
use token_drop::*;

use longctx_examples::heads::{Heads, RECENT, SINKS};

/// The newest queries that SnapKV and its kin observe; the question of the needle test is shorter.
const WINDOW: usize = 32;

/// Every policy by name; "dense" keeps everything.
pub const POLICIES: [&str; 19] = [
    "dense",
    "random",
    "recent",
    "streaming-llm",
    "k-norm",
    "key-diff",
    "lag-kv",
    "expected-attention",
    "tova",
    "h2o",
    "snap-kv",
    "wide-snap-kv",
    "pyramid-snap-kv",
    "ada-snap-kv",
    "chunk-snap-kv",
    "finch",
    "duo-attention",
    "quest",
    "infllm",
];

/// What keys and values are held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Store {
    F16,
    #[value(name = "kivi-4")]
    Kivi4,
    #[value(name = "kivi-2")]
    Kivi2,
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

    /// `None` where there is no such cache: retrieval holds everything, in f16 alone, and DuoAttention's streaming heads have a least size.
    pub fn new(
        policy: &str,
        store: Store,
        share: f64,
        equal: Equal,
        tokens: usize,
        heads: &Heads,
    ) -> Result<Option<Self>> {
        if matches!(policy, "quest" | "infllm") && (store != Store::F16 || equal == Equal::Bytes) {
            return Ok(None);
        }
        let budget = match equal {
            Equal::Tokens => (share * tokens as f64) as usize,
            Equal::Bytes => store.tokens_in(share, tokens)?,
        };
        let streaming = match policy {
            "duo-attention" => heads.split(budget, tokens)?,
            _ => Some(Vec::new()),
        };
        let cell = |streaming| Self { policy: policy.into(), store, share, budget, streaming };
        Ok(streaming.map(cell))
    }

    /// A cache for one layer.
    pub fn cache(&self, layer: &LayerShape) -> longctx_core::Result<Box<dyn KvCache>> {
        let shape = layer.attention;
        match self.store {
            Store::F16 => self.over(DenseStore::new(shape, DType::F16)?, layer),
            _ => self.over(self.store.packed(shape)?, layer),
        }
    }

    fn over<S: KvStore + 'static>(
        &self,
        store: S,
        layer: &LayerShape,
    ) -> longctx_core::Result<Box<dyn KvCache>> {
        let snap_kv = || SnapKv::new(WINDOW);
        let policy: Box<dyn EvictionPolicy> = match self.policy.as_str() {
            "dense" => return Ok(Box::new(DenseCache::new(layer.attention, DType::F16)?)),
            "streaming-llm" => return Ok(Box::new(StreamingLlm::new(4, self.budget - 4, store)?)),
            "quest" => return Ok(Box::new(Quest::<f16>::new(self.budget, layer.attention)?)),
            "infllm" => return self.inf_llm(layer),
            "random" => Box::new(Random::new(layer.layer as u64)),
            "k-norm" => Box::new(KNorm),
            "key-diff" => Box::new(KeyDiff),
            "lag-kv" => Box::new(LagKv::new(4, 64)?),
            "expected-attention" => Box::new(ExpectedAttention::default()),
            "tova" => Box::new(Tova::default()),
            "h2o" => Box::new(H2o::default()),
            "snap-kv" => Box::new(snap_kv()?),
            // As wide as two keys of 7 digits less one: a vote for the first digit reaches the last.
            "wide-snap-kv" => Box::new(snap_kv()?.with_kernel(13)?),
            "pyramid-snap-kv" => {
                Box::new(PyramidKv::new(snap_kv()?, layer.layer, layer.layers, 20.0)?)
            }
            "ada-snap-kv" => Box::new(AdaKv::new(snap_kv()?)),
            "chunk-snap-kv" => Box::new(ChunkKv::new(snap_kv()?, 20)?),
            "finch" => Box::new(Finch::new(16)?),
            "duo-attention" => {
                let streaming = self.streaming[layer.layer].clone();
                Box::new(DuoAttention::new(streaming, SINKS, RECENT)?)
            }
            _ => Box::new(Recent::default()),
        };
        // An answer is short: only policies that evict at every token evict during it.
        let step = policy.decode_step().filter(|&step| step == 1);
        let budget = match policy.bounds_heads() {
            true => Budget::Policy,
            false => Budget::Tokens(self.budget),
        };
        let cache = PolicyCache::new(store, policy, budget)?;
        Ok(Box::new(cache.with_decode_step(step)?))
    }

    /// The paper's shares of the budget, with blocks and chunks small enough for short prompts.
    fn inf_llm(&self, layer: &LayerShape) -> longctx_core::Result<Box<dyn KvCache>> {
        let block = 32;
        let init = (0.021 * self.budget as f64) as usize;
        let top_blocks = (0.324 * self.budget as f64) as usize / block;
        let sizes = InfLlmSettings {
            init,
            local: self.budget - init - top_blocks * block,
            block,
            top_blocks,
            resident_blocks: top_blocks,
            representatives: 4,
            chunk: 64,
        };
        Ok(Box::new(InfLlm::<f16>::new(sizes, layer.attention)?))
    }
}

impl Store {
    fn packed(self, shape: AttentionShape) -> longctx_core::Result<QuantStore> {
        let bits = if self == Store::Kivi2 { Bits::Two } else { Bits::Four };
        QuantStore::new(shape, Format::kivi(bits, bits, 32, 128)?)
    }

    /// How many tokens the store holds in a share of the bytes of `tokens` f16 ones: counted, on a head of 64 channels.
    fn tokens_in(self, share: f64, tokens: usize) -> Result<usize> {
        let shape = AttentionShape::new(1, 1, 64)?;
        let bytes = share * (tokens * 2 * 64 * size_of::<f16>()) as f64;
        let fits = |count: usize| -> Result<bool> {
            let x = Tensor::zeros((1, 1, count, 64), DType::F32, &Device::Cpu)?;
            let held = match self {
                Store::F16 => count * 2 * 64 * size_of::<f16>(),
                _ => {
                    let mut store = self.packed(shape)?;
                    store.append(&x, &x)?;
                    let held = store.footprint();
                    held.total() - held.slack
                }
            };
            Ok(held as f64 <= bytes)
        };
        let (mut most, mut least) = (tokens, 0);
        while least < most {
            let middle = (least + most).div_ceil(2);
            if fits(middle)? { least = middle } else { most = middle - 1 }
        }
        Ok(least)
    }

    pub fn name(self) -> &'static str {
        match self {
            Store::F16 => "f16",
            Store::Kivi4 => "kivi-4",
            Store::Kivi2 => "kivi-2",
        }
    }
}
