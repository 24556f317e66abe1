//! Small layers and inputs.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use longctx_core::{
    AttentionShape, DenseStore, EvictionPolicy, KvCache, Rope, RopeScaling, Step, Visible,
    attention,
};
use token_drop::*;

pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const DIM: usize = 32;

pub fn shape() -> AttentionShape {
    AttentionShape::new(HEADS, KV_HEADS, DIM).unwrap()
}

pub fn rope() -> Rope {
    Rope::new(DIM, DIM, 10_000.0, RopeScaling::None).unwrap()
}

pub fn store(dtype: DType) -> DenseStore {
    DenseStore::new(shape(), dtype).unwrap()
}

/// Queries, keys and values of a call, before the rotary embedding.
#[derive(Clone)]
pub struct Input {
    pub q: Tensor,
    pub k: Tensor,
    pub v: Tensor,
}

impl Input {
    pub fn random(batch: usize, tokens: usize) -> Self {
        let x = |heads| Tensor::randn(0f32, 1., (batch, heads, tokens, DIM), &Device::Cpu).unwrap();
        Self { q: x(HEADS), k: x(KV_HEADS), v: x(KV_HEADS) }
    }

    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Self {
        let cut = |x: &Tensor| x.narrow(dim, start, len).unwrap().contiguous().unwrap();
        Self { q: cut(&self.q), k: cut(&self.k), v: cut(&self.v) }
    }

    pub fn batch(&self, entry: usize) -> Self {
        self.narrow(0, entry, 1)
    }

    pub fn tokens(&self) -> usize {
        self.q.dim(2).unwrap()
    }

    pub fn feed(&self, cache: &mut impl KvCache) -> longctx_core::Result<Tensor> {
        let (shape, rope) = (shape(), rope());
        cache.attend(&Step { q: &self.q, k: &self.k, v: &self.v, shape: &shape, rope: &rope })
    }
}

/// Feeds a text in calls of the given sizes.
pub fn feed_all(cache: &mut impl KvCache, text: &Input, calls: &[usize]) -> Vec<Tensor> {
    let mut start = 0;
    let mut outs = Vec::new();
    for &count in calls {
        outs.push(text.narrow(2, start, count).feed(cache).unwrap());
        start += count;
    }
    outs
}

pub fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

pub fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Attention of the last token of `text` (batch 1) over the tokens at `positions`, one list per kv head, computed from the text itself.
/// `contiguous`: with keys and the query rotated as if there were no other tokens.
pub fn attention_over(text: &Input, positions: &[Vec<u32>], contiguous: bool) -> Tensor {
    let last = text.tokens() - 1;
    let one = AttentionShape::new(HEADS / KV_HEADS, 1, DIM).unwrap();
    let outs: Vec<_> = (0..KV_HEADS)
        .map(|head| {
            let kept = positions[head].len() as i64;
            let places: Vec<i64> = match contiguous {
                true => (0..kept).collect(),
                false => positions[head].iter().map(|&p| p.into()).collect(),
            };
            let q = text.q.narrow(2, last, 1).unwrap();
            let q = q.narrow(1, head * one.heads, one.heads).unwrap();
            let at = Tensor::new(&*positions[head], &Device::Cpu).unwrap();
            let of = |x: &Tensor| {
                x.narrow(1, head, 1).unwrap().contiguous().unwrap().index_select(&at, 2).unwrap()
            };
            let q = rope().apply_at(&q, &places[kept as usize - 1..]).unwrap();
            let k = rope().apply_at(&of(&text.k), &places).unwrap();
            attention::attend(&q, &k, &of(&text.v), &one, Visible::All).unwrap().out
        })
        .collect();
    Tensor::cat(&outs, 1).unwrap()
}

/// So many tokens, unless the policy bounds its heads itself.
pub fn budget(policy: &impl EvictionPolicy, tokens: usize) -> Budget {
    if policy.bounds_heads() { Budget::Policy } else { Budget::Tokens(tokens) }
}

/// Every policy of the crate, with settings that fit budgets from 12 on.
pub fn policies() -> Vec<(&'static str, Box<dyn EvictionPolicy>)> {
    vec![
        ("random", Box::new(Random::new(7))),
        ("recent", Box::new(Recent::default())),
        ("recent with sinks", Box::new(Recent::with_sinks(4))),
        ("k-norm", Box::new(KNorm)),
        ("snap-kv", Box::new(SnapKv::new(8).unwrap())),
        ("tova", Box::new(Tova::default())),
        ("h2o", Box::new(H2o::default())),
        ("key-diff", Box::new(KeyDiff)),
        ("lag-kv", Box::new(LagKv::new(2, 8).unwrap())),
        ("expected attention", Box::new(ExpectedAttention::new(2))),
        ("finch", Box::new(Finch::new(6).unwrap())),
        ("ada snap-kv", Box::new(AdaKv::new(SnapKv::new(8).unwrap()))),
        ("ada h2o", Box::new(AdaKv::new(H2o::default()))),
        ("chunk h2o", Box::new(ChunkKv::new(H2o::default(), 4).unwrap())),
        ("rerotated k-norm", Box::new(Rerotated::new(KNorm))),
        ("pyramid k-norm", Box::new(PyramidKv::new(KNorm, 3, 4, 3.0).unwrap())),
        ("duo", Box::new(DuoAttention::new(vec![true; KV_HEADS], 4, 8).unwrap())),
    ]
}
