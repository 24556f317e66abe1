//! Small layers, inputs and caches.
#![allow(dead_code)]

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use longctx_core::{
    AttentionShape, Batch, DenseStore, KvCache, KvStore, LayerSpec, Mask, Result, Rope,
    RopeScaling, SeqId, Step,
};
use token_drop::*;

pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const DIM: usize = 32;

pub fn shape() -> AttentionShape {
    AttentionShape::new(HEADS, KV_HEADS, DIM).unwrap()
}

pub fn rope(dim: usize) -> Arc<Rope> {
    Arc::new(Rope::new(dim, dim, 10_000.0, RopeScaling::None).unwrap())
}

pub fn spec() -> LayerSpec {
    LayerSpec::new(shape()).with_rope(rope(DIM))
}

pub fn store(dtype: DType) -> DenseStore {
    DenseStore::new(shape(), dtype).unwrap()
}

/// Converts a fixture's tensor `[1, heads, tokens, channels]` to `[tokens, heads, channels]`.
pub fn rows(x: &Tensor) -> Tensor {
    x.squeeze(0).unwrap().transpose(0, 1).unwrap().contiguous().unwrap()
}

pub fn fixture(name: &str) -> std::collections::HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// Queries, keys and values of a call, before the rotary embedding.
#[derive(Clone, Debug)]
pub struct Input {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl Input {
    pub fn random(tokens: usize) -> Self {
        let x = |heads| Tensor::randn(0f32, 1., (tokens, heads, DIM), &Device::Cpu).unwrap();
        Self { q: x(HEADS), k: x(KV_HEADS), v: x(KV_HEADS) }
    }

    /// Creates numbers that depend only on the seed.
    pub fn seeded(seed: u64, tokens: usize) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut number = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((x ^ (x >> 31)) >> 40) as f32 / (1 << 23) as f32 * 1.7 - 1.7
        };
        let mut x = |heads| {
            let data: Vec<f32> = (0..tokens * heads * DIM).map(|_| number()).collect();
            Tensor::from_vec(data, (tokens, heads, DIM), &Device::Cpu).unwrap()
        };
        Self { q: x(HEADS), k: x(KV_HEADS), v: x(KV_HEADS) }
    }

    fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self { q: f(&self.q), k: f(&self.k), v: f(&self.v) }
    }

    pub fn narrow(&self, start: usize, len: usize) -> Self {
        self.map(|x| x.narrow(0, start, len).unwrap())
    }

    pub fn cat(parts: &[Self]) -> Self {
        let cat = |of: fn(&Self) -> &Tensor| {
            Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0).unwrap()
        };
        Self { q: cat(|p| &p.q), k: cat(|p| &p.k), v: cat(|p| &p.v) }
    }

    /// Returns the input with queries and keys rotated at positions from `first` on.
    pub fn rotated(&self, first: usize) -> Self {
        let positions: Vec<i64> = (first as i64..).take(self.tokens()).collect();
        let turn = |x: &Tensor| rope(DIM).apply(x, &positions).unwrap();
        Self { q: turn(&self.q), k: turn(&self.k), v: self.v.clone() }
    }

    pub fn tokens(&self) -> usize {
        self.q.dim(0).unwrap()
    }

    pub fn feed(&self, cache: &mut impl KvCache, seq: SeqId) -> Result<Tensor> {
        self.step(&Batch::single(seq, self.tokens()).unwrap(), |step| cache.attend(step))
    }

    pub fn step<R>(&self, batch: &Batch, f: impl FnOnce(&Step<'_>) -> R) -> R {
        f(&Step { batch, q: &self.q, k: &self.k, v: &self.v })
    }
}

/// Feeds a sequence's text in calls of the given sizes.
pub fn feed_all(
    cache: &mut impl KvCache,
    seq: SeqId,
    text: &Input,
    calls: &[usize],
) -> Vec<Tensor> {
    let mut start = 0;
    let mut outs = Vec::new();
    for &count in calls {
        outs.push(text.narrow(start, count).feed(cache, seq).unwrap());
        start += count;
    }
    outs
}

/// Feeds several sequences in one call and returns the output of each.
pub fn feed_batch(cache: &mut impl KvCache, parts: &[(SeqId, Input)]) -> Result<Vec<Tensor>> {
    let seqs: Vec<_> = parts.iter().map(|(seq, input)| (*seq, input.tokens())).collect();
    let all = Input::cat(&parts.iter().map(|(_, input)| input.clone()).collect::<Vec<_>>());
    let batch = Batch::new(&seqs)?;
    let out = all.step(&batch, |step| cache.attend(step))?;
    let part = |tokens: std::ops::Range<usize>| out.narrow(0, tokens.start, tokens.len()).unwrap();
    Ok(batch.iter().map(|(_, tokens)| part(tokens)).collect())
}

pub fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    difference.max(0).unwrap().to_scalar().unwrap()
}

pub fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Returns the attention of the last token of `text` over the tokens at `positions`, one list per
/// kv head, computed from the text itself. With `contiguous`, keys and the query are rotated as if
/// there were no other tokens.
pub fn attention_over(text: &Input, positions: &[Vec<u32>], contiguous: bool) -> Tensor {
    let last = text.tokens() - 1;
    let one = AttentionShape::new(HEADS / KV_HEADS, 1, DIM).unwrap();
    let outs: Vec<_> = (0..KV_HEADS)
        .map(|head| {
            let kept = positions[head].len();
            let places: Vec<i64> = match contiguous {
                true => (0..kept as i64).collect(),
                false => positions[head].iter().map(|&p| p.into()).collect(),
            };
            let at = Tensor::new(&*positions[head], &Device::Cpu).unwrap();
            let of = |x: &Tensor| {
                let x = x.narrow(1, head, 1).unwrap().contiguous().unwrap();
                x.index_select(&at, 0).unwrap()
            };
            let q = text.q.narrow(0, last, 1).unwrap();
            let q = q.narrow(1, head * one.heads, one.heads).unwrap();
            let q = rope(DIM).apply(&q, &places[kept - 1..]).unwrap();
            let k = rope(DIM).apply(&of(&text.k), &places).unwrap();
            let mut plain = DenseStore::new(one, DType::F32).unwrap();
            plain.append(&Batch::single(0, kept).unwrap(), &k, &of(&text.v)).unwrap();
            plain.attend(&Batch::single(0, 1).unwrap(), &q, Mask::Full).unwrap().out
        })
        .collect();
    Tensor::cat(&outs, 1).unwrap()
}

pub type Any<S> = PolicyCache<S, Box<dyn EvictionPolicy>>;
/// A cache over a store, within a budget.
pub type Make<S> = fn(LayerSpec, S, Budget) -> Result<Any<S>>;

/// Returns every method of `PolicyCache`, with settings that fit budgets from 12 tokens on.
pub fn methods<S: KvStore + 'static>() -> Vec<(&'static str, Make<S>)> {
    fn snap_kv<S: KvStore>(spec: LayerSpec, s: S, b: Budget) -> Result<PolicyCache<S, SnapKv>> {
        PolicyCache::snap_kv(spec, s, SnapKv::new(8)?, b)
    }
    vec![
        ("random", |spec, s, b| Ok(PolicyCache::new(spec, s, Random::new(7), b)?.boxed())),
        ("recent", |spec, s, b| Ok(PolicyCache::recent(spec, s, 0, b)?.boxed())),
        ("recent with sinks", |spec, s, b| Ok(PolicyCache::recent(spec, s, 4, b)?.boxed())),
        ("k-norm", |spec, s, b| Ok(PolicyCache::new(spec, s, KNorm, b)?.boxed())),
        ("snap-kv", |spec, s, b| Ok(snap_kv(spec, s, b)?.boxed())),
        ("snap-kv while decoding", |spec, s, b| {
            Ok(snap_kv(spec, s, b)?.with_decode_step(Some(4))?.boxed())
        }),
        ("tova", |spec, s, b| Ok(PolicyCache::tova(spec, s, Tova::default(), b)?.boxed())),
        ("h2o", |spec, s, b| Ok(PolicyCache::h2o(spec, s, H2o::default(), b)?.boxed())),
        ("key-diff", |spec, s, b| Ok(PolicyCache::new(spec, s, KeyDiff, b)?.boxed())),
        ("lag-kv", |spec, s, b| Ok(PolicyCache::lag_kv(spec, s, LagKv::new(2, 8)?, b)?.boxed())),
        ("expected attention", |spec, s, b| {
            Ok(PolicyCache::expected_attention(spec, s, ExpectedAttention::new(2), b)?.boxed())
        }),
        ("finch", |spec, s, b| Ok(PolicyCache::finch(spec, s, Finch::new(6)?, b)?.boxed())),
        ("ada snap-kv", |spec, s, b| {
            Ok(snap_kv(spec, s, b)?.with_head_budgets(HeadBudgets::ADA_KV)?.boxed())
        }),
        ("ada h2o", |spec, s, b| {
            let h2o = PolicyCache::h2o(spec, s, H2o::default(), b)?;
            Ok(h2o.with_head_budgets(HeadBudgets::ADA_KV)?.boxed())
        }),
        ("chunk h2o", |spec, s, b| {
            let h2o = PolicyCache::h2o(spec, s, H2o::default(), b)?;
            Ok(h2o.with_granularity(Granularity::Chunk(4))?.boxed())
        }),
        ("rerotated k-norm", |spec, s, b| {
            Ok(PolicyCache::new(spec, s, KNorm, b)?.with_rerotation()?.boxed())
        }),
        ("pyramid k-norm", |spec, s, b| {
            let pyramid = LayerBudgets::Pyramid { beta: 3.0 };
            Ok(PolicyCache::new(spec.at(3, 4), s, KNorm, b)?.with_layer_budgets(pyramid)?.boxed())
        }),
        ("duo", |spec, s, _| {
            let heads = DuoAttention::new(vec![true; KV_HEADS], 4, 8)?;
            Ok(PolicyCache::duo_attention(spec, s, &heads)?.boxed())
        }),
    ]
}

pub const SIZES: InfLlmSettings = InfLlmSettings {
    init: 2,
    local: 12,
    block: 4,
    top_blocks: 2,
    resident_blocks: 2,
    representatives: 2,
    chunk: 8,
};

/// Returns every cache of the crate, small, over the stores that `store` makes.
pub fn caches<S: KvStore + 'static>(
    store: impl Fn() -> S,
) -> Vec<(&'static str, Box<dyn KvCache>)> {
    let budget = || Budget::Tokens(20);
    let of_policy = |(name, make): (&'static str, Make<S>)| {
        (name, Box::new(make(spec(), store(), budget()).unwrap()) as Box<dyn KvCache>)
    };
    let streaming = || StreamingLlm::new(spec(), store(), 3, 17).unwrap();
    let inf_llm = || InfLlm::new(spec(), store(), store(), SIZES).unwrap();
    let others: [(_, Box<dyn KvCache>); 5] = [
        ("streaming-llm", Box::new(streaming())),
        ("streaming-llm by steps", Box::new(streaming().with_step(5).unwrap())),
        ("quest", Box::new(Quest::with_page_size(spec(), store(), 16, 4).unwrap())),
        ("inf-llm", Box::new(inf_llm())),
        ("inf-llm, exact prompts", Box::new(inf_llm().with_exact_prompt())),
    ];
    methods().into_iter().map(of_policy).chain(others).collect()
}

/// The number of cases of a property test: `few`, or `many` if LONGCTX_SLOW is set.
pub fn cases(few: u32, many: u32) -> u32 {
    if std::env::var_os("LONGCTX_SLOW").is_some() { many } else { few }
}
