//! Token losses of a causal language model.

use std::ops::Range;

use candle_core::{Device, Tensor};
use longctx_checkpoint::unpanicked;
use longctx_core::{Batch, CausalLm, Error, Logits, Result, SeqId};
use rayon::prelude::*;
use tokenizers::Tokenizer;

/// Tokens per call: the logits of a whole prompt over the vocabulary would not fit in memory.
const CHUNK: usize = 256;
/// The sequence in which all texts are evaluated.
const SEQ: SeqId = 0;

/// A model that keeps its cache between texts, so that a common prefix is evaluated once.
#[derive(Debug)]
pub struct LossModel<M> {
    model: M,
    fed: Vec<u32>,
}

impl<M: CausalLm> LossModel<M> {
    pub fn new(model: M) -> Self {
        Self { model, fed: Vec::new() }
    }

    /// Returns the longest context of the model, in tokens.
    pub fn context_length(&self) -> usize {
        self.model.context_length().unwrap_or(usize::MAX)
    }

    /// Returns the loss (negative log-likelihood, in nats) of each token after the first of
    /// `ids[from..]`, given all tokens before it.
    pub fn losses(&mut self, ids: &[u32], from: usize) -> Result<Vec<f32>> {
        if ids.len() < from + 2 {
            return Ok(Vec::new());
        }
        // The logits of the last token are not needed, so it is not fed.
        let ids_fed = &ids[..ids.len() - 1];
        let same = self.fed.iter().zip(ids_fed).take_while(|(a, b)| a == b).count();
        self.truncate(same.min(from))?;
        while self.fed.len() < from {
            let next = &ids[self.fed.len()..from];
            self.feed(&next[..next.len().min(CHUNK)], Logits::Last)?;
        }
        let mut losses = Vec::with_capacity(ids.len() - from - 1);
        for start in (from..ids_fed.len()).step_by(CHUNK) {
            let end = ids_fed.len().min(start + CHUNK);
            let logits = self.feed(&ids[start..end], Logits::All)?;
            let next = &ids[start + 1..=end];
            losses.extend(match logits.device() {
                Device::Cpu => losses_on_cpu(&logits, next)?,
                _ => losses_on_device(&logits, next)?,
            });
        }
        match losses.iter().position(|loss| !loss.is_finite()) {
            Some(at) => {
                let (value, position) = (losses[at], format!("token {}", from + 1 + at));
                Err(Error::NotFinite { what: "loss".into(), value, position })
            }
            None => Ok(losses),
        }
    }

    fn feed(&mut self, ids: &[u32], logits: Logits) -> Result<Tensor> {
        let logits = self.model.forward(&Batch::single(SEQ, ids.len())?, ids, logits)?;
        self.fed.extend_from_slice(ids);
        Ok(logits)
    }

    /// Truncates to the first `len` tokens, or to none if the model does not support it.
    fn truncate(&mut self, len: usize) -> Result<()> {
        if len > 0 && self.model.check_truncate(SEQ, len).is_ok() {
            self.model.truncate(SEQ, len)?;
            self.fed.truncate(len);
        } else {
            self.model.remove(SEQ);
            self.fed.clear();
        }
        Ok(())
    }
}

/// Returns the loss of each token of `ids`, given its row of logits, `[tokens, vocabulary]` in f32.
/// Copies only the losses from the device.
fn losses_on_device(logits: &Tensor, ids: &[u32]) -> Result<Vec<f32>> {
    let ids = Tensor::new(ids, logits.device())?.unsqueeze(1)?;
    let own = logits.gather(&ids, 1)?.squeeze(1)?;
    Ok((logits.log_sum_exp(1)? - own)?.to_vec1()?)
}

/// The same on the CPU, where one pass per row on all cores is several times faster.
fn losses_on_cpu(logits: &Tensor, ids: &[u32]) -> Result<Vec<f32>> {
    let vocab = logits.dim(1)?;
    let logits = logits.flatten_all()?.to_vec1::<f32>()?;
    let rows = logits.par_chunks(vocab).zip(ids);
    Ok(rows.map(|(row, &id)| loss(row, id as usize)).collect())
}

fn loss(logits: &[f32], id: usize) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = logits.iter().map(|x| (x - max).exp()).sum();
    sum.ln() + max - logits[id]
}

/// Returns the mean, as the loss of a whole text; NaN for an empty list.
pub fn mean(losses: &[f32]) -> f32 {
    (losses.iter().map(|&x| f64::from(x)).sum::<f64>() / losses.len() as f64) as f32
}

/// The tokens of a text, each with its byte range.
pub struct Tokens {
    pub ids: Vec<u32>,
    pub offsets: Vec<Range<usize>>,
}

/// Tokenizes a text. `special` adds the special tokens that the model expects around it.
pub fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Tokens> {
    let encoding = unpanicked(|| tokenizer.encode(text, special))?;
    let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
    Ok(Tokens { ids: encoding.get_ids().to_vec(), offsets })
}

/// Returns the number of tokens of a text, with the special tokens around it.
pub fn count(tokenizer: &Tokenizer, text: &str) -> Result<usize> {
    Ok(unpanicked(|| tokenizer.encode_fast(text, true))?.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_of_both_devices_agree() {
        let logits = Tensor::randn(0f32, 5.0, (7, 1000), &Device::Cpu).unwrap();
        let ids = [0, 999, 3, 500, 17, 17, 42];
        let host = losses_on_cpu(&logits, &ids).unwrap();
        let device = losses_on_device(&logits, &ids).unwrap();
        let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-4 * a.abs().max(1.0);
        assert!(host.iter().zip(&device).all(close), "{host:?} {device:?}");
    }
}
