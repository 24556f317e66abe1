//! Text generation from a prompt, token by token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use crate::{Batch, CausalLm, Error, Greedy, Logits, Result, SeqId};
use candle_core::Tensor;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// How the next token is sampled.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[non_exhaustive]
pub enum Sampling {
    /// The most probable token.
    #[default]
    Greedy,
    /// Random sampling.
    Random {
        /// The logits are divided by it: below 1 sharpens, above 1 flattens the distribution.
        temperature: f32,
        /// Samples among the k most probable tokens. `None`: all.
        top_k: Option<usize>,
        /// Nucleus sampling (arXiv 1904.09751): samples among the most probable tokens with a total
        /// probability of p. `None`: all.
        top_p: Option<f32>,
        /// Random seed. The same seed gives the same tokens.
        seed: u64,
    },
}

/// Options of [`generate`].
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// The largest number of tokens to generate.
    pub max_tokens: usize,
    /// Stop tokens. They are not part of the result.
    pub stop: Vec<u32>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Prompt tokens per call. `None`: the whole prompt in one call, which is exact under every
    /// cache. In chunks, later tokens see the compressed cache of earlier ones.
    pub prefill_chunk: Option<usize>,
}

impl Default for GenerateOptions {
    /// 256 tokens, greedy, the whole prompt in one call.
    fn default() -> Self {
        Self { max_tokens: 256, stop: Vec::new(), sampling: Sampling::Greedy, prefill_chunk: None }
    }
}

/// Generated tokens and timings.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Generation {
    /// The generated tokens, without the prompt and the stop token.
    pub tokens: Vec<u32>,
    /// Why generation ended.
    pub stop: StopReason,
    /// Time from the first prompt token to the first logits.
    pub prefill_time: Duration,
    /// Time of all decode steps.
    pub decode_time: Duration,
    /// Number of decode steps: one less than the number of sampled tokens.
    pub decode_steps: usize,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// [`GenerateOptions::max_tokens`] was reached.
    MaxTokens,
    /// This stop token was sampled.
    StopToken(u32),
    /// The callback stopped it.
    Callback,
}

/// Feeds `prompt` to a sequence of the model and generates. `on_token` is called with each token
/// and can stop the generation. The sequence and its tokens stay in the model until it is removed.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// # use longctx_core::*;
/// # struct Counter(usize);
/// # impl CausalLm for Counter {
/// #     fn forward(&mut self, batch: &Batch, ids: &[u32], _: Logits) -> Result<Tensor> {
/// #         self.0 += ids.len();
/// #         let last = ids[ids.len() - 1];
/// #         let next = (0..10).map(|i| if i == (last + 1) % 10 { 9f32 } else { 0. });
/// #         let next: Vec<_> = next.collect();
/// #         Ok(Tensor::from_vec(next, (1, 10), &Device::Cpu)?)
/// #     }
/// #     fn fork(&mut self, from: SeqId, _: SeqId) -> Result<()> {
/// #         Err(Error::UnknownSequence(from))
/// #     }
/// #     fn check_truncate(&self, seq: SeqId, _: usize) -> Result<()> {
/// #         Err(Error::UnknownSequence(seq))
/// #     }
/// #     fn truncate(&mut self, seq: SeqId, _: usize) -> Result<()> {
/// #         Err(Error::UnknownSequence(seq))
/// #     }
/// #     fn remove(&mut self, _: SeqId) -> bool { std::mem::take(&mut self.0) > 0 }
/// #     fn seqs(&self) -> Vec<SeqId> { vec![0] }
/// #     fn seen(&self, _: SeqId) -> usize { self.0 }
/// #     fn can_append(&self, _: &Batch) -> bool { true }
/// #     fn footprint(&self) -> Footprint { Footprint::default() }
/// #     fn seq_footprint(&self, _: SeqId) -> Footprint { Footprint::default() }
/// #     fn clear(&mut self) { self.0 = 0 }
/// #     fn vocab_size(&self) -> usize { 10 }
/// #     fn context_length(&self) -> Option<usize> { None }
/// #     fn model_type(&self) -> &str { "counter" }
/// #     fn device(&self) -> &Device { &Device::Cpu }
/// # }
/// # let mut model = Counter(0);
/// use std::ops::ControlFlow;
///
/// // `model` counts up and starts again after 9.
/// let options = GenerateOptions { max_tokens: 3, ..Default::default() };
/// let generation = generate(&mut model, 0, &[5, 6, 7], &options, |_| ControlFlow::Continue(()))?;
/// assert_eq!(generation.tokens, [8, 9, 0]);
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`] for an empty prompt; [`Error::Setting`] for invalid sampling settings or a
/// chunk of 0 tokens; errors of the model.
pub fn generate(
    model: &mut dyn CausalLm,
    seq: SeqId,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    let mut chooser = Chooser::new(options.sampling)?;
    let started = Instant::now();
    let logits = prefill(model, seq, prompt, options.prefill_chunk)?;
    let prefill_time = started.elapsed();
    let mut done = Generation {
        tokens: Vec::new(),
        stop: StopReason::MaxTokens,
        prefill_time,
        decode_time: Duration::ZERO,
        decode_steps: 0,
    };
    let started = Instant::now();
    while done.tokens.len() < options.max_tokens {
        let token = match done.tokens.last() {
            None => chooser.first(&logits)?,
            Some(&last) => {
                done.decode_steps += 1;
                chooser.next(model, seq, last)?
            }
        };
        if options.stop.contains(&token) {
            done.stop = StopReason::StopToken(token);
            break;
        }
        done.tokens.push(token);
        if on_token(token).is_break() {
            done.stop = StopReason::Callback;
            break;
        }
    }
    done.decode_time = started.elapsed();
    Ok(done)
}

/// Chooses the tokens of one sequence. With greedy sampling, logits stay on the model's device.
struct Chooser {
    sampler: Sampler,
    greedy: Greedy,
}

impl Chooser {
    fn new(sampling: Sampling) -> Result<Self> {
        Ok(Self { sampler: Sampler::new(sampling)?, greedy: Greedy::default() })
    }

    /// Returns the token after a prompt with these logits, `[1, vocab]`.
    fn first(&mut self, logits: &Tensor) -> Result<u32> {
        match self.sampler.sampling {
            Sampling::Greedy => only(self.greedy.choose(logits)?),
            Sampling::Random { .. } => self.sampler.sample(&logits.flatten_all()?.to_vec1()?),
        }
    }

    /// Feeds the last token, and returns the next one.
    fn next(&mut self, model: &mut dyn CausalLm, seq: SeqId, last: u32) -> Result<u32> {
        let batch = Batch::single(seq, 1)?;
        match self.sampler.sampling {
            Sampling::Greedy => only(model.forward_greedy(&batch, &[last], &mut self.greedy)?),
            Sampling::Random { .. } => self.first(&model.forward(&batch, &[last], Logits::Last)?),
        }
    }
}

/// Returns the token of the only sequence.
fn only(tokens: Vec<Result<u32>>) -> Result<u32> {
    let rows = tokens.len();
    match tokens.into_iter().next() {
        Some(token) if rows == 1 => token,
        _ => Err(Error::mismatch("rows of the logits", 1, rows)),
    }
}

/// Feeds a prompt to a sequence, whole or in chunks. Returns the logits of its last token, `[1,
/// vocab]`.
///
/// # Errors
/// [`Error::Mismatch`] for an empty prompt; [`Error::Setting`] for a chunk of 0 tokens; errors of
/// the model.
pub fn prefill(
    model: &mut dyn CausalLm,
    seq: SeqId,
    prompt: &[u32],
    chunk: Option<usize>,
) -> Result<Tensor> {
    if chunk == Some(0) {
        return Err(Error::setting("prefill_chunk", "at least 1 token", 0));
    }
    let mut logits = None;
    for part in prompt.chunks(chunk.unwrap_or(prompt.len()).max(1)) {
        logits = Some(model.forward(&Batch::single(seq, part.len())?, part, Logits::Last)?);
    }
    logits.ok_or_else(|| Error::mismatch("prompt", "at least one token", 0))
}

/// Samples tokens from logits.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: StdRng,
}

impl Sampler {
    /// Creates a sampler.
    ///
    /// # Errors
    /// [`Error::Setting`] if the temperature is not positive, `top_k` is 0 or `top_p` is outside
    /// (0, 1].
    pub fn new(sampling: Sampling) -> Result<Self> {
        let mut seed_used = 0;
        if let Sampling::Random { temperature, top_k, top_p, seed } = sampling {
            if !(temperature > 0.0 && temperature.is_finite()) {
                return Err(Error::setting("temperature", "a positive number", temperature));
            }
            if top_k == Some(0) {
                return Err(Error::setting("top_k", "at least 1", 0));
            }
            if let Some(p) = top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
                return Err(Error::setting("top_p", "a number in (0, 1]", p));
            }
            seed_used = seed;
        }
        Ok(Self { sampling, rng: StdRng::seed_from_u64(seed_used) })
    }

    /// Returns the next token.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if a logit is NaN, or the greatest one is infinite and sampling is
    /// random; [`Error::Mismatch`] if `logits` is empty.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let not_finite = |at: usize| {
            let (value, position) = (logits[at], format!("token {at}"));
            Err(Error::NotFinite { what: "logits".into(), value, position })
        };
        if let Some(at) = logits.iter().position(|x| x.is_nan()) {
            return not_finite(at);
        }
        let best = (0u32..)
            .zip(logits)
            .max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)))
            .ok_or_else(|| Error::mismatch("logits", "at least one", 0))?;
        match self.sampling {
            Sampling::Greedy => Ok(best.0),
            // An infinite maximum has no softmax: the difference of two infinities is NaN.
            Sampling::Random { .. } if best.1.is_infinite() => not_finite(best.0 as usize),
            Sampling::Random { temperature, top_k, top_p, .. } => {
                Ok(self.draw(logits, *best.1, temperature, top_k, top_p))
            }
        }
    }

    fn draw(
        &mut self,
        logits: &[f32],
        max: f32,
        temperature: f32,
        top_k: Option<usize>,
        top_p: Option<f32>,
    ) -> u32 {
        let weight = |&x: &f32| f64::from((x - max) / temperature).exp();
        let mut tokens: Vec<(u32, f64)> = (0u32..).zip(logits.iter().map(weight)).collect();
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        tokens.truncate(top_k.unwrap_or(usize::MAX));
        let sum = |tokens: &[(u32, f64)]| tokens.iter().map(|t| t.1).sum::<f64>();
        let nucleus = f64::from(top_p.unwrap_or(1.0)) * sum(&tokens);
        let mut reached = 0.0;
        let enough = tokens.iter().position(|t| {
            reached += t.1;
            reached >= nucleus
        });
        tokens.truncate(enough.map_or(tokens.len(), |at| at + 1));
        let mut left = self.rng.random::<f64>() * sum(&tokens);
        for &(token, weight) in &tokens {
            left -= weight;
            if left < 0.0 {
                return token;
            }
        }
        tokens[tokens.len() - 1].0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_without_probabilities_are_errors() {
        let (low, high) = (f32::NEG_INFINITY, f32::INFINITY);
        for top_k in [None, Some(1), Some(2)] {
            let sampling = Sampling::Random { temperature: 1.0, top_k, top_p: None, seed: 1 };
            let mut sampler = Sampler::new(sampling).unwrap();
            for logits in [[1.0, high, 2.0], [high, high, low], [low; 3], [1.0, 2.0, f32::NAN]] {
                let error = sampler.sample(&logits).unwrap_err();
                assert!(matches!(error, Error::NotFinite { .. }), "{logits:?}: {error}");
            }
            // Tokens that a grammar forbids are never chosen.
            for _ in 0..50 {
                assert_eq!(sampler.sample(&[low, 0.5, low]).unwrap(), 1);
            }
        }
        let mut greedy = Sampler::new(Sampling::Greedy).unwrap();
        assert_eq!(greedy.sample(&[1.0, high, 2.0]).unwrap(), 1);
    }
}
