//! Expected Attention: Devoto et al., "Expected Attention: KV Cache Compression by Estimating
//! Attention from Future Queries Distribution", arXiv 2510.00636.

use super::window::{equal_scores, max_plus_one};
use crate::{
    Budget, EvictionPolicy, GroupReduction, LayerView, Needs, PolicyCache, Protected, Settings,
};
use candle_core::{D, DType, Tensor};
use longctx_core::{Error, KvStore, LayerSpec, Result, Rope};

/// Number of future positions over which the rotary embedding is averaged.
const FUTURE_POSITIONS: usize = 512;
/// Queries that are kept during decoding, if the cache evicts then.
const NUM_QUERIES: usize = 128;

/// Keeps the entries that future queries are expected to attend to, weighted with the norm of the
/// values.
///
/// Queries before the rotary embedding are modelled as normally distributed, with the mean and
/// covariance of the seen queries. The embedding is averaged over the next 512 positions. The
/// expected exp(q·k) of a key k is then exp(μ·k + kᵀΣk/2).
#[derive(Debug, Clone, Copy)]
pub struct ExpectedAttention {
    sinks: usize,
    group: GroupReduction,
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
        Self { sinks, group: GroupReduction::Mean }
    }

    /// Sets how the expected attention of a group's query heads is reduced; the mean by default.
    #[must_use]
    pub fn with_group_reduction(mut self, group: GroupReduction) -> Self {
        self.group = group;
        self
    }

    /// Returns the scores of all entries except the sinks; `None` if there are no others.
    fn score_others(&self, view: &LayerView<'_>, queries: &Queries) -> Result<Option<Tensor>> {
        let scale = f64::from(view.spec.shape.scale);
        let Some(others) = view.entries.checked_sub(self.sinks).filter(|others| *others > 0) else {
            return Ok(None);
        };
        let keys = view.keys()?.narrow(1, self.sinks, others)?.contiguous()?;
        let first = (queries.mean.matmul(&keys.transpose(1, 2)?.contiguous()?)? * scale)?;
        let second = (0..view.spec.shape.heads_per_kv()).map(|i| -> Result<Tensor> {
            let covariance = queries.covariance.narrow(1, i, 1)?.squeeze(1)?.contiguous()?;
            Ok((keys.matmul(&covariance)? * &keys)?.sum(2)?)
        });
        let second = Tensor::stack(&second.collect::<Result<Vec<_>>>()?, 1)?;
        let logits = (first + (second * (scale * scale / 2.0))?)?;
        let expected = candle_nn::ops::softmax(&logits, D::Minus1)?;
        let values = view.values()?.narrow(1, self.sinks, others)?;
        Ok(Some((self.group.reduce(&expected)? * values.sqr()?.sum(2)?.sqrt()?)?))
    }
}

impl EvictionPolicy for ExpectedAttention {
    fn needs(&self) -> Needs {
        Needs { keys: true, values: true, queries: Some(NUM_QUERIES), ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        let missing = || Error::mismatch("queries of a view", "some", "none");
        let q = view.queries.ok_or_else(missing)?;
        let (tokens, _, d) = q.dims3()?;
        let first = view.seen - tokens;
        let skip = self.sinks.saturating_sub(first).min(tokens - 1);
        let rope = view.spec.require_rope("Expected Attention")?;
        let rotation = mean_rotation(rope, view.seen, d);
        let rotation = Tensor::from_vec(rotation, (d, d), q.device())?;
        let group = view.spec.shape.heads_per_kv();
        let q = q.narrow(0, skip, tokens - skip)?;
        let q = q.narrow(1, view.kv_heads.start * group, view.kv_heads.len() * group)?;
        let queries = Queries::of(&q, &rotation, group)?;
        let Some(scores) = self.score_others(view, &queries)? else {
            return equal_scores(view, view.keys()?);
        };
        match view.entries - scores.dim(1)? {
            0 => Ok(scores),
            sinks => Ok(Tensor::cat(&[&max_plus_one(&scores, sinks)?, &scores], 1)?),
        }
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
    /// `[kv_heads, group, head_dim]`.
    mean: Tensor,
    /// `[kv_heads, group, head_dim, head_dim]`, symmetric.
    covariance: Tensor,
}

impl Queries {
    /// Estimates the distribution of queries `[tokens, heads, head_dim]`, of which `group` share a
    /// kv head. `rotation` is `[head_dim, head_dim]`, on their device.
    fn of(q: &Tensor, rotation: &Tensor, group: usize) -> Result<Self> {
        let q = q.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous()?;
        let (heads, tokens, d) = q.dims3()?;
        let mean = q.mean(1)?;
        let centred = q.broadcast_sub(&mean.unsqueeze(1)?)?;
        let covariance =
            (centred.transpose(1, 2)?.contiguous()?.matmul(&centred)? / tokens as f64)?;
        let all = rotation.unsqueeze(0)?.expand((heads, d, d))?.contiguous()?;
        let rotated = all.matmul(&covariance)?.matmul(&all.transpose(1, 2)?.contiguous()?)?;
        Ok(Self {
            mean: mean.matmul(&rotation.t()?)?.reshape(((), group, d))?,
            covariance: rotated.reshape(((), group, d, d))?,
        })
    }
}

/// Returns the mean rotation over the future positions, `[head_dim, head_dim]`. It rotates the
/// channel pairs (i, i + pairs); further channels are unchanged.
fn mean_rotation(rope: &Rope, next: usize, d: usize) -> Vec<f32> {
    let mean = |f: fn(f64) -> f64, frequency: f64| {
        let ahead = next..next + FUTURE_POSITIONS;
        (ahead.map(|p| f(p as f64 * frequency)).sum::<f64>() / FUTURE_POSITIONS as f64) as f32
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
