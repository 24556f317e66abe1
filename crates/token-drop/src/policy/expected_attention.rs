//! Expected Attention: Devoto et al., "Expected Attention: KV Cache Compression by Estimating
//! Attention from Future Queries Distribution", arXiv 2510.00636.

use super::window::{above, cat};
use crate::{
    Budget, EvictionPolicy, Group, HeadView, LayerView, Needs, PolicyCache, Protected, Settings,
};
use candle_core::{D, DType, Tensor};
use longctx_core::{AttentionShape, KvStore, LayerSpec, Result, Rope};

/// Number of future positions over which the rotary embedding is averaged.
const FUTURE: usize = 512;
/// Queries that are kept during decoding, if the cache evicts then.
const REMEMBERED: usize = 128;

/// Keeps the entries that future queries are expected to attend to, weighted with the norm of the
/// values.
///
/// Queries before the rotary embedding are modelled as normally distributed, with the mean and
/// covariance of the seen queries. The embedding is averaged over the next 512 positions. The
/// expected exp(q·k) of a key k is then exp(μ·k + kᵀΣk/2).
#[derive(Debug, Clone, Copy)]
pub struct ExpectedAttention {
    sinks: usize,
    group: Group,
}

impl Default for ExpectedAttention {
    /// 4 sinks, as in kvpress.
    fn default() -> Self {
        Self::new(4)
    }
}

impl ExpectedAttention {
    /// Creates the policy. The first `sinks` tokens are kept, and their queries, which are often
    /// outliers, are excluded from the statistics.
    pub fn new(sinks: usize) -> Self {
        Self { sinks, group: Group::Mean }
    }

    /// Sets how the expected attention of a group's query heads is reduced; the mean by default.
    #[must_use]
    pub fn with_group(mut self, group: Group) -> Self {
        self.group = group;
        self
    }

    /// Returns the scores of a head's entries, without the sinks.
    fn score_head(
        &self,
        head: &HeadView<'_>,
        queries: &Queries,
        shape: &AttentionShape,
    ) -> Result<Tensor> {
        let (keys, scale) = (head.keys()?, f64::from(shape.scale));
        let sinks = self.sinks.min(keys.dim(0)?);
        let keys = keys.narrow(0, sinks, keys.dim(0)? - sinks)?;
        if keys.dim(0)? == 0 {
            return Ok(keys.flatten_all()?);
        }
        let group = queries.mean.dim(0)?;
        let first = (queries.mean.matmul(&keys.t()?)? * scale)?;
        let second = (0..group).map(|i| -> Result<Tensor> {
            Ok((keys.matmul(&queries.covariance.get(i)?)? * &keys)?.sum(1)?)
        });
        let second = Tensor::stack(&second.collect::<Result<Vec<_>>>()?, 0)?;
        let logits = (first + (second * (scale * scale / 2.0))?)?;
        let expected = candle_nn::ops::softmax(&logits, D::Minus1)?;
        let values = head.values()?.narrow(0, sinks, keys.dim(0)?)?;
        Ok((self.group.join(&expected)? * values.sqr()?.sum(1)?.sqrt()?)?)
    }
}

impl EvictionPolicy for ExpectedAttention {
    fn needs(&self) -> Needs {
        Needs { keys: true, values: true, queries: Some(REMEMBERED), ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Tensor>> {
        let Some(q) = view.queries else { return Ok(Vec::new()) };
        let (tokens, _, d) = q.dims3()?;
        let first = view.seen - tokens;
        let skip = self.sinks.saturating_sub(first).min(tokens - 1);
        let rope = view.spec.rope_for("Expected Attention")?;
        let rotation = mean_rotation(rope, view.seen, d);
        let rotation = Tensor::from_vec(rotation, (d, d), q.device())?;
        let queries = Queries::of(&q.narrow(0, skip, tokens - skip)?, &rotation)?;
        let (shape, group) = (&view.spec.shape, view.spec.shape.group());
        let score = |(i, head): (usize, &HeadView<'_>)| {
            self.score_head(head, &queries.narrow(i * group, group)?, shape)
        };
        let scores = view.heads.iter().enumerate().map(score).collect::<Result<Vec<_>>>()?;
        let most = above(&scores)?;
        let with_sinks = |(head, own): (&HeadView<'_>, Tensor)| {
            let sinks = head.positions.len() - own.elem_count();
            if sinks == 0 {
                return Ok(own);
            }
            let most = most.to_device(own.device())?;
            cat(&[&most.broadcast_as(sinks)?.contiguous()?, &own])
        };
        view.heads.iter().zip(scores).map(with_sinks).collect()
    }
}

impl<S: KvStore> PolicyCache<S, ExpectedAttention> {
    /// Expected Attention as published: sinks and decoded tokens are kept.
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

/// The distribution of some heads' queries, rotated to future positions.
struct Queries {
    /// `[heads, head_dim]`.
    mean: Tensor,
    /// `[heads, head_dim, head_dim]`, symmetric.
    covariance: Tensor,
}

impl Queries {
    /// Estimates the distribution of queries `[tokens, heads, head_dim]`. `rotation` is `[head_dim,
    /// head_dim]`, on their device.
    fn of(q: &Tensor, rotation: &Tensor) -> Result<Self> {
        let q = q.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous()?;
        let (heads, tokens, d) = q.dims3()?;
        let mean = q.mean(1)?;
        let centred = q.broadcast_sub(&mean.unsqueeze(1)?)?;
        let covariance =
            (centred.transpose(1, 2)?.contiguous()?.matmul(&centred)? / tokens as f64)?;
        let all = rotation.unsqueeze(0)?.expand((heads, d, d))?.contiguous()?;
        let turned = all.matmul(&covariance)?.matmul(&all.transpose(1, 2)?.contiguous()?)?;
        Ok(Self { mean: mean.matmul(&rotation.t()?)?, covariance: turned })
    }

    /// Returns the distribution of `count` heads starting at `first`.
    fn narrow(&self, first: usize, count: usize) -> Result<Self> {
        let of = |x: &Tensor| x.narrow(0, first, count)?.contiguous();
        Ok(Self { mean: of(&self.mean)?, covariance: of(&self.covariance)? })
    }
}

/// Returns the mean rotation over the future positions, `[head_dim, head_dim]`. It rotates the
/// channel pairs (i, i + pairs); further channels are unchanged.
fn mean_rotation(rope: &Rope, next: usize, d: usize) -> Vec<f32> {
    let mean = |f: fn(f64) -> f64, frequency: f64| {
        let ahead = next..next + FUTURE;
        (ahead.map(|p| f(p as f64 * frequency)).sum::<f64>() / FUTURE as f64) as f32
    };
    let mut rotation: Vec<f32> = (0..d * d).map(|i| f32::from(u8::from(i % d == i / d))).collect();
    let half = rope.frequencies().len();
    for (i, &frequency) in rope.frequencies().iter().enumerate() {
        let (cos, sin) = (mean(f64::cos, frequency), mean(f64::sin, frequency));
        (rotation[i * d + i], rotation[i * d + i + half]) = (cos, -sin);
        (rotation[(i + half) * d + i], rotation[(i + half) * d + i + half]) = (sin, cos);
    }
    rotation
}
