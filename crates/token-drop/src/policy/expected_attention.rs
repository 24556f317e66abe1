//! Expected Attention: Devoto et al., "Expected Attention: KV Cache Compression by Estimating
//! Attention from Future Queries Distribution", arXiv 2510.00636.

use crate::{
    Budget, EvictionPolicy, Group, HeadView, LayerView, Needs, PolicyCache, Protected, Settings,
};
use candle_core::{D, DType, Device, Tensor};
use longctx_core::{AttentionShape, KvStore, LayerSpec, Result, Rope};

/// Positions ahead over which the rotary embedding is averaged.
const FUTURE: usize = 512;
/// Queries that are remembered while decoding, if the cache evicts then.
const REMEMBERED: usize = 128;

/// Keeps what queries to come are expected to attend to, weighed with the norm of the values.
///
/// Queries are taken for normally distributed, with the mean and covariance of those seen, before
/// the rotary embedding; the embedding is averaged over the 512 positions ahead. The expected
/// exp(q·k) of a key k is then exp(μ·k + kᵀΣk/2).
#[derive(Debug, Clone, Copy)]
pub struct ExpectedAttention {
    sinks: usize,
    group: Group,
}

impl Default for ExpectedAttention {
    /// 4 sinks, as kvpress has them.
    fn default() -> Self {
        Self::new(4)
    }
}

impl ExpectedAttention {
    /// The first `sinks` tokens stay, and their queries, which are often outliers, don't count.
    pub fn new(sinks: usize) -> Self {
        Self { sinks, group: Group::Mean }
    }

    /// How the expected attention of a group's query heads is joined; by default by its mean.
    #[must_use]
    pub fn with_group(mut self, group: Group) -> Self {
        self.group = group;
        self
    }

    fn score_head(
        &self,
        head: &HeadView<'_>,
        queries: &[Queries],
        shape: &AttentionShape,
    ) -> Result<Vec<f32>> {
        let (d, scale) = (shape.head_dim, f64::from(shape.scale));
        let (_, keys) = head.keys.split_at((self.sinks * d).min(head.keys.len()));
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let keys = Tensor::from_slice(keys, (keys.len() / d, d), &Device::Cpu)?;
        let of_query_head = |q: &Queries| -> Result<Vec<f32>> {
            let mean = Tensor::from_slice(&q.mean, (d, 1), &Device::Cpu)?;
            let covariance = Tensor::from_slice(&q.covariance, (d, d), &Device::Cpu)?;
            let first = (keys.matmul(&mean)?.squeeze(1)? * scale)?;
            let second = (keys.matmul(&covariance)? * &keys)?.sum(1)?;
            let logits = (first + (second * (scale * scale / 2.0))?)?;
            Ok(candle_nn::ops::softmax(&logits, D::Minus1)?.to_vec1()?)
        };
        let expected: Vec<_> = queries.iter().map(of_query_head).collect::<Result<_>>()?;
        let norm = |value: &[f32]| value.iter().map(|x| x * x).sum::<f32>().sqrt();
        let norms = head.values.chunks_exact(shape.value_dim).skip(self.sinks).map(norm);
        Ok(self.group.join(&expected).into_iter().zip(norms).map(|(e, norm)| e * norm).collect())
    }
}

impl EvictionPolicy for ExpectedAttention {
    fn needs(&self) -> Needs {
        Needs { keys: true, values: true, queries: Some(REMEMBERED), ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Vec<f32>>> {
        let Some(q) = view.queries else { return Ok(Vec::new()) };
        let (tokens, heads, _) = q.dims3()?;
        let first = view.seen - tokens;
        let skip = self.sinks.saturating_sub(first).min(tokens - 1);
        let q = q.narrow(0, skip, tokens - skip)?.to_device(&Device::Cpu)?;
        let rope = view.spec.rope_for("Expected Attention")?;
        let rotation = mean_rotation(rope, view.seen);
        let of_head = |head| Queries::of(&q.narrow(1, head, 1)?.squeeze(1)?, &rotation);
        let queries: Vec<_> = (0..heads).map(of_head).collect::<Result<_>>()?;
        let shape = &view.spec.shape;
        let groups = view.heads.iter().zip(queries.chunks(shape.group()));
        let scores: Vec<_> = groups
            .map(|(head, queries)| self.score_head(head, queries, shape))
            .collect::<Result<_>>()?;
        let most = scores.iter().flatten().copied().fold(0.0, f32::max) + 1.0;
        let with_sinks = |(head, own): (&HeadView<'_>, Vec<f32>)| {
            let sinks = head.positions.len() - own.len();
            std::iter::repeat_n(most, sinks).chain(own).collect()
        };
        Ok(view.heads.iter().zip(scores).map(with_sinks).collect())
    }
}

impl<S: KvStore> PolicyCache<S, ExpectedAttention> {
    /// Expected Attention as published: sinks and decoded tokens stay.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn expected_attention(
        spec: LayerSpec,
        store: S,
        policy: ExpectedAttention,
        budget: Budget,
    ) -> Result<Self> {
        let settings = Settings {
            protected: Protected::sinks(policy.sinks),
            decode_step: None,
            ..Settings::new(budget)
        };
        Self::with_settings(spec, store, policy, settings)
    }
}

/// The distribution of one head's queries, rotated to the positions ahead.
struct Queries {
    mean: Vec<f32>,
    /// Row-major, symmetric.
    covariance: Vec<f32>,
}

impl Queries {
    /// Of queries `[tokens, head_dim]`.
    fn of(q: &Tensor, rotation: &[(f32, f32)]) -> Result<Self> {
        let q = q.to_dtype(DType::F32)?.contiguous()?;
        let tokens = q.dim(0)? as f64;
        let mean = q.mean(0)?;
        let centred = q.broadcast_sub(&mean)?;
        let covariance = (centred.t()?.matmul(&centred)? / tokens)?;
        let mut mean = mean.to_vec1()?;
        turn(&mut mean, rotation);
        // R C Rᵀ: C's rows turned, then, C being symmetric, the rows of the transpose.
        let d = mean.len();
        let mut rows = covariance.flatten_all()?.to_vec1()?;
        rows.chunks_exact_mut(d).for_each(|row| turn(row, rotation));
        let mut covariance: Vec<f32> = (0..d * d).map(|i| rows[i % d * d + i / d]).collect();
        covariance.chunks_exact_mut(d).for_each(|row| turn(row, rotation));
        Ok(Self { mean, covariance })
    }
}

/// The mean cosine and sine of each rotated pair of channels over the positions ahead.
fn mean_rotation(rope: &Rope, next: usize) -> Vec<(f32, f32)> {
    let mean = |f: fn(f64) -> f64, frequency: f64| {
        let ahead = next..next + FUTURE;
        (ahead.map(|p| f(p as f64 * frequency)).sum::<f64>() / FUTURE as f64) as f32
    };
    rope.frequencies().iter().map(|&w| (mean(f64::cos, w), mean(f64::sin, w))).collect()
}

/// Turns pairs of channels i and i + pairs; further channels stay.
fn turn(x: &mut [f32], rotation: &[(f32, f32)]) {
    let half = rotation.len();
    for (i, &(cos, sin)) in rotation.iter().enumerate() {
        let (a, b) = (x[i], x[i + half]);
        (x[i], x[i + half]) = (a * cos - b * sin, b * cos + a * sin);
    }
}
