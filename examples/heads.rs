//! Which heads DuoAttention lets stream. Published scores are a gate per head, learnt by gradient descent; for a model without them,
//! such as SmolLM2, attention is looked at on a few needles.

use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use base_models::Pretrained;
use candle_core::{Device, Tensor};
use longctx_core::{CausalLm, Footprint, KvCache, LayerShape, Logits, Step, Visible, attention};
use longctx_eval::Haystack;
use longctx_eval::needle::{Needle, Sample};
use token_drop::DuoAttention;

/// First tokens that a streaming head keeps.
pub const SINKS: usize = 16;
/// Newest tokens that it keeps.
pub const RECENT: usize = 64;

/// For each layer and kv head, how much it looks at what a streaming head drops.
#[derive(Default)]
pub struct Heads {
    scores: Vec<Vec<f32>>,
}

impl Heads {
    /// Has the model write the keys of three prompts of 1,000 tokens (other text and other keys than the sweep's). A kv head's score: of the attention
    /// that its query heads give while they write the key, the share outside sinks and window; the mean over tokens and prompts, of the query head
    /// where it is largest.
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
            // The queries that write the key: from the prompt's last token to the one before the key's last.
            let (queries, tokens) = (written.len() - asked, &written[..written.len() - 1]);
            let mut session = llm.model.session(|layer: &LayerShape| {
                Ok(Probe { layer: layer.layer, queries, seen: 0, sums: sums.clone() })
            })?;
            session.forward(&Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?, Logits::Last)?;
        }
        let scores = std::mem::take(&mut *sums.lock().expect("no thread has panicked"));
        Ok(Self { scores })
    }

    /// Published scores, as DuoAttention's `full_attention_heads.tsv` has them: a line a layer, a number a kv head.
    pub fn read(path: &Path) -> Result<Self> {
        let mut lines = csv::ReaderBuilder::new()
            .delimiter(b'\t')
            .has_headers(false)
            .from_path(path)
            .with_context(|| path.display().to_string())?;
        let scores = lines.deserialize().collect::<Result<Vec<Vec<f32>>, _>>();
        let scores = scores.with_context(|| {
            format!("{}: expected a line a layer, a number a kv head", path.display())
        })?;
        ensure!(!scores.is_empty(), "{}: expected a line a layer, got none", path.display());
        Ok(Self { scores })
    }

    /// The heads that stream, per layer, if this share of all does.
    pub fn share(&self, share: f64) -> longctx_core::Result<Vec<Vec<bool>>> {
        DuoAttention::split(&self.scores, share)
    }

    /// The heads that stream, per layer, if a prompt of so many tokens is to be kept at `budget` per kv head in the mean; `None` if that is less than
    /// streaming heads alone keep.
    pub fn split(&self, budget: usize, tokens: usize) -> Result<Option<Vec<Vec<bool>>>> {
        let kept = SINKS + RECENT;
        if budget < kept {
            return Ok(None);
        }
        let share = (tokens - budget) as f64 / (tokens - kept) as f64;
        Ok(Some(self.share(share)?))
    }
}

/// Exact attention over one prompt, which notes what its newest queries look at.
struct Probe {
    layer: usize,
    queries: usize,
    seen: usize,
    /// Per layer and kv head.
    sums: Arc<Mutex<Vec<Vec<f32>>>>,
}

impl KvCache for Probe {
    fn attend(&mut self, step: &Step<'_>) -> longctx_core::Result<Tensor> {
        let (q, k) = (step.rope.apply(step.q, 0)?, step.rope.apply(step.k, 0)?);
        let whole = attention::attend(&q, &k, step.v, step.shape, Visible::Causal)?;
        self.seen = q.dim(2)?;
        let newest = |x: &Tensor| x.narrow(2, self.seen - self.queries, self.queries);
        let (q, lse) = (newest(&q)?, newest(&whole.lse)?);
        let mass = attention::mass(&q, &k, &lse, step.shape, Visible::Causal)?;
        // What even the first of these queries has outside its window.
        let dropped = SINKS..self.seen - self.queries - RECENT;
        let share =
            |head: &Vec<f32>| head[dropped.clone()].iter().sum::<f32>() / self.queries as f32;
        let largest = |group: &[Vec<f32>]| group.iter().map(share).fold(0.0, f32::max);
        let mut sums = self.sums.lock().expect("no thread has panicked");
        let layers = sums.len().max(self.layer + 1);
        sums.resize(layers, vec![0.0; step.shape.kv_heads]);
        let groups = mass.chunks(step.shape.group());
        sums[self.layer].iter_mut().zip(groups).for_each(|(sum, group)| *sum += largest(group));
        whole.into_output(step.q.dtype())
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn held(&self) -> usize {
        0
    }

    fn footprint(&self) -> Footprint {
        Footprint::default()
    }

    fn reset(&mut self) {
        self.seen = 0;
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
        // As numpy's savetxt writes them.
        let text = "9.000000000000000222e-01\t1.000000000000000056e-01\n2.0e-01\t8.0e-01\n";
        let heads = read(text).unwrap();
        assert_eq!(heads.share(0.5).unwrap(), [[false, true], [true, false]]);
        for wrong in ["", "0.5\tx\n", "0.5\t0.5\n0.5\n"] {
            let error = format!("{:#}", read(wrong).err().expect(wrong));
            assert!(error.contains("heads.tsv"), "{error}");
        }
    }
}
