//! DuoAttention: Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv 2410.10819.

use longctx_core::{Error, EvictionPolicy, Held, Needs, Protected, Result};

/// Keeps everything in retrieval heads, and sinks and the newest tokens in streaming heads. Its cache takes
/// [`Budget::Policy`](crate::Budget::Policy) and no other.
#[derive(Debug, Clone)]
pub struct DuoAttention {
    streaming: Vec<bool>,
    sinks: usize,
    recent: usize,
}

impl DuoAttention {
    /// `streaming` says which of the layer's kv heads stream; these keep `sinks` first and `recent` newest tokens (128 and 256 in kvpress).
    ///
    /// # Errors
    /// [`Error::Setting`] if `recent` is 0 or there are no heads.
    pub fn new(streaming: Vec<bool>, sinks: usize, recent: usize) -> Result<Self> {
        if recent == 0 {
            return Err(Error::setting("recent", "at least 1 token", 0));
        }
        if streaming.is_empty() {
            return Err(Error::setting("streaming", "one answer per kv head", "none"));
        }
        Ok(Self { streaming, sinks, recent })
    }

    /// Which heads stream, per layer, if `share` of the model's kv heads do: those of the lowest scores. A head's score is its learnt
    /// gate, as the published attention patterns give it, or any other measure of how far back it looks.
    ///
    /// # Errors
    /// [`Error::Setting`] unless `share` lies in 0..=1.
    pub fn split(scores: &[Vec<f32>], share: f64) -> Result<Vec<Vec<bool>>> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::setting("share", "a number from 0 to 1", share));
        }
        let heads = |(layer, scores): (usize, &Vec<f32>)| {
            (0..scores.len()).map(move |head| (layer, head)).collect::<Vec<_>>()
        };
        let mut order: Vec<_> = scores.iter().enumerate().flat_map(heads).collect();
        order.sort_by(|a, b| scores[a.0][a.1].total_cmp(&scores[b.0][b.1]));
        let count = (share * order.len() as f64).round_ties_even() as usize;
        let mut streaming: Vec<_> = scores.iter().map(|layer| vec![false; layer.len()]).collect();
        order[..count].iter().for_each(|&(layer, head)| streaming[layer][head] = true);
        Ok(streaming)
    }
}

impl EvictionPolicy for DuoAttention {
    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn score(&self, held: &Held<'_>) -> Result<Vec<Vec<f32>>> {
        if held.shape.kv_heads != self.streaming.len() {
            let (expected, got) = (held.shape.kv_heads, self.streaming.len());
            return Err(Error::mismatch("heads of DuoAttention", expected, got));
        }
        let of_head = |positions: &[u32]| positions.iter().map(|&p| p as f32).collect();
        Ok(held.heads.iter().map(|head| of_head(head.positions)).collect())
    }

    fn protects(&self, _: usize) -> Protected {
        Protected { sinks: self.sinks, recent: self.recent }
    }

    fn budgets(&self, _: f64, _: usize, heads: usize) -> Vec<usize> {
        let budget = |streaming| if streaming { self.sinks + self.recent } else { usize::MAX };
        self.streaming.iter().copied().cycle().take(heads).map(budget).collect()
    }

    fn bounds_heads(&self) -> bool {
        true
    }

    /// At 1 the streaming heads hold no more and no less than the published code's.
    fn decode_step(&self) -> Option<usize> {
        Some(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_scores_stream() {
        let scores = vec![vec![0.9, 0.1], vec![0.2, 0.8]];
        let split = DuoAttention::split(&scores, 0.5).unwrap();
        assert_eq!(split, [[false, true], [true, false]]);
        assert_eq!(DuoAttention::split(&scores, 0.0).unwrap(), [[false; 2]; 2]);
        assert!(DuoAttention::split(&scores, 1.5).is_err());
    }
}
