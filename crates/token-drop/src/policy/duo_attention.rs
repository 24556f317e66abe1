//! DuoAttention: Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval
//! and Streaming Heads", arXiv 2410.10819.

use crate::{Budget, PolicyCache, Protected, Recent, Settings};
use longctx_core::{Error, KvStore, LayerSpec, Result};

/// The split of a layer's kv heads into retrieval heads, which keep everything, and streaming
/// heads, which keep sinks and the newest tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DuoAttention {
    streaming: Vec<bool>,
    sinks: usize,
    recent: usize,
}

impl DuoAttention {
    /// Creates a split. `streaming` marks the streaming heads among the layer's kv heads. They keep
    /// the first `sinks` and the newest `recent` tokens (128 and 256 in kvpress).
    ///
    /// # Errors
    /// [`Error::Setting`] if `recent` is 0 or there are no heads.
    pub fn new(streaming: Vec<bool>, sinks: usize, recent: usize) -> Result<Self> {
        if recent == 0 {
            return Err(Error::setting("recent", "at least 1 token", 0));
        }
        if streaming.is_empty() {
            return Err(Error::setting("streaming", "one flag per kv head", "none"));
        }
        Ok(Self { streaming, sinks, recent })
    }

    /// Returns the streaming heads of each layer if a `share` of the model's kv heads stream: those
    /// with the lowest scores. The score of a head is its learned gate in the published attention
    /// patterns, or another measure of how far back it attends.
    ///
    /// # Errors
    /// [`Error::Setting`] unless `share` is in 0..=1.
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

    /// Returns the budget of each head.
    pub fn budget(&self) -> Budget {
        let of_head =
            |&streaming: &bool| streaming.then_some(self.sinks.saturating_add(self.recent));
        Budget::Heads(self.streaming.iter().map(of_head).collect())
    }
}

impl<S: KvStore> PolicyCache<S, Recent> {
    /// DuoAttention as published. A streaming head evicts one entry at every decoded token, as in
    /// the published code, so it holds the same number of entries.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn duo_attention(spec: LayerSpec, store: S, heads: &DuoAttention) -> Result<Self> {
        let settings = Settings {
            protected: Protected { sinks: heads.sinks, recent: heads.recent, recent_share: 0.0 },
            decode_step: Some(1),
            ..Settings::new(heads.budget())
        };
        Self::with_settings(spec, store, Recent, settings)
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
