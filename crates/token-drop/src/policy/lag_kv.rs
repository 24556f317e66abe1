//! LagKV: Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are
//! Important", arXiv 2504.04704.

use crate::{Budget, EvictionPolicy, HeadView, LayerView, Needs, PolicyCache, Protected, Settings};
use longctx_core::{AttentionShape, Error, KvStore, LayerSpec, Result};

/// Keeps the tokens whose keys and values spread the most over the range of those that follow a lag
/// later. No attention is looked at.
///
/// What follows the sinks is cut into partitions as long as the lag; each is scored against the
/// next, and tokens compete within their partition. The last whole partition and what is left over
/// have no successor and stay, as far as the budget goes. Texts shorter than two partitions keep
/// their newest tokens.
#[derive(Debug, Clone, Copy)]
pub struct LagKv {
    sinks: usize,
    lag: usize,
}

impl LagKv {
    /// With `sinks` first tokens that stay (4 in kvpress) and partitions of `lag` tokens (128 in
    /// kvpress).
    ///
    /// # Errors
    /// [`Error::Setting`] if the lag is 0.
    pub fn new(sinks: usize, lag: usize) -> Result<Self> {
        if lag == 0 {
            return Err(Error::setting("lag", "at least 1 token", 0));
        }
        Ok(Self { sinks, lag })
    }

    fn score_head(&self, head: &HeadView<'_>, shape: &AttentionShape) -> Vec<f32> {
        let len = head.positions.len();
        if len < self.sinks + 2 * self.lag {
            let after = len.saturating_sub(self.sinks);
            let newer = (0..after).map(|i| i as f32 / after as f32);
            return std::iter::repeat_n(1.0, len - after).chain(newer).collect();
        }
        let mut scores = vec![1.0; len];
        let scored = (len - self.sinks) / self.lag - 1;
        for start in (0..scored).map(|i| self.sinks + i * self.lag) {
            let spread = |x: &[f32], d: usize| {
                let part = |start: usize| &x[start * d..(start + self.lag) * d];
                softmax(relative_spread(part(start), part(start + self.lag), d))
            };
            let (keys, values) =
                (spread(&head.keys, shape.head_dim), spread(&head.values, shape.value_dim));
            let both: Vec<_> = keys.iter().zip(&values).map(|(k, v)| k + v).collect();
            let mut order: Vec<_> = (0..self.lag).collect();
            order.sort_by(|&a, &b| both[a].total_cmp(&both[b]));
            for (rank, i) in order.into_iter().enumerate() {
                scores[start + i] = rank as f32 / self.lag as f32;
            }
        }
        scores
    }
}

impl EvictionPolicy for LagKv {
    fn needs(&self) -> Needs {
        Needs { keys: true, values: true, ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Vec<Vec<f32>>> {
        let of_head = |head: &HeadView<'_>| self.score_head(head, &view.spec.shape);
        Ok(view.heads.iter().map(of_head).collect())
    }
}

impl<S: KvStore> PolicyCache<S, LagKv> {
    /// LagKV, whose sinks stay.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn lag_kv(spec: LayerSpec, store: S, policy: LagKv, budget: Budget) -> Result<Self> {
        let protected = Protected::sinks(policy.sinks);
        Self::with_settings(spec, store, policy, Settings { protected, ..Settings::new(budget) })
    }
}

/// For each row, the standard deviation over channels after each is scaled to the range that it has
/// in the reference rows.
fn relative_spread(rows: &[f32], reference: &[f32], d: usize) -> Vec<f32> {
    let (mut low, mut high) = (vec![f32::INFINITY; d], vec![f32::NEG_INFINITY; d]);
    for row in reference.chunks_exact(d) {
        low.iter_mut().zip(row).for_each(|(low, &x)| *low = low.min(x));
        high.iter_mut().zip(row).for_each(|(high, &x)| *high = high.max(x));
    }
    let spread = |row: &[f32]| {
        let scaled: Vec<_> = (0..d).map(|c| scaled(row[c], low[c], high[c])).collect();
        let mean = scaled.iter().sum::<f32>() / d as f32;
        let squares: f32 = scaled.iter().map(|x| (x - mean).powi(2)).sum();
        (squares / (d - 1) as f32).sqrt()
    };
    rows.chunks_exact(d).map(spread).collect()
}

/// Where x lies in a range; 0 in a range of no width.
fn scaled(x: f32, low: f32, high: f32) -> f32 {
    if high > low { (x - low) / (high - low) } else { 0.0 }
}

fn softmax(mut x: Vec<f32>) -> Vec<f32> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
    x
}

#[cfg(test)]
mod tests {
    use super::relative_spread;

    #[test]
    fn spreads_are_relative_to_the_reference_and_a_constant_channel_does_not_count() {
        let reference = [0.0, 7.0, 1.0, 2.0, 7.0, 5.0];
        // Scaled: (0, 0, 1) and (0.5, 0, 0.5).
        let spread = relative_spread(&[0.0, 9.0, 5.0, 1.0, 1.0, 3.0], &reference, 3);
        assert!((spread[0] - (1.0f32 / 3.0).sqrt()).abs() < 1e-6);
        assert!((spread[1] - (1.0f32 / 12.0).sqrt()).abs() < 1e-6);
    }
}
