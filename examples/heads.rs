//! DuoAttention's scores of kv heads, which select its streaming heads. Published scores are a gate
//! per head, trained by gradient descent. For models without them, such as SmolLM2, the scores are
//! measured as attention to a few needles.

use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use base_models::Pretrained;
use candle_core::{DType, Tensor};
use longctx_core::{Batch, CausalLm, DenseStore, LayerSpec, Logits};
use longctx_eval::Haystack;
use longctx_eval::needle::{Needle, Sample};
use token_drop::{
    Budget, DuoAttention, EvictionPolicy, LayerView, Needs, ObservedQueries, PolicyCache, Settings,
};

/// Number of sinks of a streaming head.
pub const SINKS: usize = 16;
/// Number of newest tokens that a streaming head keeps.
pub const RECENT: usize = 64;

/// A score per layer and kv head: its attention to tokens that a streaming head evicts.
#[derive(Default)]
pub struct Heads {
    scores: Vec<Vec<f32>>,
}

impl Heads {
    /// Measures scores while the model generates the keys of three prompts of 1,000 tokens. Texts
    /// and keys differ from those of the needle tests, which evaluate the scores.
    ///
    /// The score of a query head is the share of its attention outside the sinks and the window,
    /// averaged over generated tokens and prompts. The score of a kv head is the largest score of
    /// its query heads.
    pub fn measure(llm: &Pretrained) -> Result<Self> {
        let sums = Arc::new(Mutex::new(Vec::new()));
        for (seed, depth) in (1..).zip([0.25, 0.5, 0.75]) {
            let count = |text: &str| anyhow::Ok(llm.tokenizer.encode(text.trim_end(), true)?.len());
            let needle = Needle { depth, digits: 7, seed };
            let Sample { prompt, answer } =
                needle.in_tokens(&Haystack::generated(1), 1000, count)?;
            let asked = llm.tokenizer.encode(prompt.trim_end(), true)?.len();
            let written = llm.tokenizer.encode(&format!("{prompt}{answer}"), true)?;
            ensure!(written.len() > asked, "the key {answer} has no tokens of its own");
            // The queries that generate the key: from the prompt's last token to the token before
            // the key's last.
            let (queries, tokens) = (written.len() - asked, &written[..written.len() - 1]);
            let mut session = llm.model.session(|spec: &LayerSpec| {
                let store = DenseStore::new(spec.shape, DType::F32)?;
                let probe = Probe { queries, sums: sums.clone() };
                // With any budget below the text's length, the policy is called once, after
                // attention.
                let settings = Settings { decode_step: None, ..Settings::new(Budget::Ratio(0.5)) };
                PolicyCache::with_settings(spec.clone(), store, probe, settings)
            })?;
            session.forward(&Batch::single(0, tokens.len())?, tokens, Logits::Last)?;
        }
        let scores = std::mem::take(&mut *sums.lock().expect("no thread has panicked"));
        Ok(Self { scores })
    }

    /// Reads published scores in the format of DuoAttention's `full_attention_heads.tsv`: a line
    /// per layer, a number per kv head.
    pub fn read(path: &Path) -> Result<Self> {
        let mut lines = csv::ReaderBuilder::new()
            .delimiter(b'\t')
            .has_headers(false)
            .from_path(path)
            .with_context(|| path.display().to_string())?;
        let scores = lines.deserialize().collect::<Result<Vec<Vec<f32>>, _>>();
        let scores = scores.with_context(|| {
            format!("{}: expected one line per layer and one number per kv head", path.display())
        })?;
        ensure!(!scores.is_empty(), "{}: expected one line per layer, got none", path.display());
        Ok(Self { scores })
    }

    /// Returns the streaming heads per layer, if this share of all heads streams.
    pub fn share(&self, share: f64) -> longctx_core::Result<Vec<Vec<bool>>> {
        DuoAttention::split(&self.scores, share)
    }

    /// Returns the streaming heads per layer such that a prompt of `tokens` tokens keeps `budget`
    /// entries per kv head on average; `None` if `budget` is less than streaming heads keep.
    pub fn split(&self, budget: usize, tokens: usize) -> Result<Option<Vec<Vec<bool>>>> {
        let kept = SINKS + RECENT;
        if budget < kept {
            return Ok(None);
        }
        let share = (tokens - budget) as f64 / (tokens - kept) as f64;
        Ok(Some(self.share(share)?))
    }
}

/// A policy that records the attention of a prompt's newest queries.
struct Probe {
    queries: usize,
    /// Sums per layer and kv head.
    sums: Arc<Mutex<Vec<Vec<f32>>>>,
}

impl EvictionPolicy for Probe {
    fn needs(&self) -> Needs {
        let newest = ObservedQueries::Newest { queries: self.queries, by_position: false };
        Needs { attention: Some(newest), ..Needs::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> longctx_core::Result<Tensor> {
        let (layer, kv_heads) = (view.spec.index, view.spec.shape.kv_heads);
        // The tokens outside the window of all these queries.
        let dropped = SINKS..view.seen - self.queries - RECENT;
        let seen = view.attention_sums()?.narrow(2, dropped.start, dropped.len())?;
        let shares = (seen.sum(2)?.max(1)? / self.queries as f64)?.to_vec1::<f32>()?;
        let mut sums = self.sums.lock().expect("no thread has panicked");
        let layers = sums.len().max(layer + 1);
        sums.resize(layers, vec![0.0; kv_heads]);
        sums[layer].iter_mut().zip(shares).for_each(|(sum, share)| *sum += share);
        Ok(Tensor::zeros((view.kv_heads.len(), view.entries), DType::F32, seen.device())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_scores_are_read_and_others_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("heads.tsv");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Heads::read(&path)
        };
        // The format of numpy's savetxt.
        let text = "9.000000000000000222e-01\t1.000000000000000056e-01\n2.0e-01\t8.0e-01\n";
        let heads = read(text).unwrap();
        assert_eq!(heads.share(0.5).unwrap(), [[false, true], [true, false]]);
        for wrong in ["", "0.5\tx\n", "0.5\t0.5\n0.5\n"] {
            let error = format!("{:#}", read(wrong).err().expect(wrong));
            assert!(error.contains("heads.tsv"), "{error}");
        }
    }
}
