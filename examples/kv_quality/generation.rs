//! KL divergence during generation. Keys and values of new tokens are computed with attention over
//! the packed cache, so errors can accumulate.
//!
//! The model with the method's cache continues prompts; it samples each token from its own
//! distribution. The dense model is fed the same tokens. The two distributions are compared at each
//! position.

use std::time::Instant;

use anyhow::Result;
use base_models::Pretrained;
use candle_core::{D, DType, Tensor};
use candle_nn::ops::log_softmax;
use longctx_core::{Batch, CausalLm, Logits};
use longctx_examples::llm::replayed;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::bootstrap::interval;
use crate::lacks_kernels;
use crate::size::Size;
use crate::subject::Subject;

/// The measurements of a method's continuations.
struct Outcome {
    /// KL divergence of the dense distribution from the method's: `[position][sequence]`.
    kl: Vec<Vec<f64>>,
    /// The first position of each sequence at which the most probable tokens differ; the length if
    /// they never do.
    first: Vec<usize>,
    size: Size,
}

/// Prints a row for each method: the mean KL divergence in each quarter of the positions with its
/// interval over resampled sequences, and the first disagreement.
pub fn table(
    methods: &[Subject],
    reference: &str,
    llm: &Pretrained,
    prompts: &[Vec<u32>],
    tokens: usize,
) -> Result<()> {
    let quarter = tokens.div_ceil(4);
    let parts: Vec<_> =
        (0..tokens).step_by(quarter).map(|p| (p, tokens.min(p + quarter))).collect();
    let heads: Vec<_> = parts.iter().map(|(from, to)| format!("KL {from} to {to}")).collect();
    println!(
        "| method | bits per number | {} | first disagreement: median, quartiles | seconds |",
        heads.join(" | ")
    );
    println!("|---|---|{}---|---|", "---|".repeat(heads.len()));
    for method in methods {
        let start = Instant::now();
        let Outcome { kl, mut first, size } = match run(method, reference, llm, prompts, tokens) {
            Ok(outcome) => outcome,
            Err(error) if lacks_kernels(&error) => {
                println!("| {} | {error} | {}| |", method.name(), "| ".repeat(heads.len()));
                continue;
            }
            Err(error) => return Err(error),
        };
        let cells = parts.iter().map(|&(from, to)| {
            let of = |seq: usize| kl[from..to].iter().map(|kl| kl[seq]).sum::<f64>();
            let means: Vec<_> =
                (0..prompts.len()).map(|seq| of(seq) / (to - from) as f64).collect();
            let (low, high) = interval(&means);
            let mean = means.iter().sum::<f64>() / means.len() as f64;
            format!("{mean:.5} ({low:.5} to {high:.5})")
        });
        first.sort_unstable();
        let at = |share: usize| first[(first.len() - 1) * share / 4];
        println!(
            "| {} | {:.2} | {} | {}, {} to {} | {:.0} |",
            method.name(),
            size.bits_per_number(),
            cells.collect::<Vec<_>>().join(" | "),
            at(2),
            at(1),
            at(3),
            start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

fn run(
    method: &Subject,
    reference: &str,
    llm: &Pretrained,
    prompts: &[Vec<u32>],
    tokens: usize,
) -> Result<Outcome> {
    let dense = Subject::named(reference)?;
    let mut dense = replayed(llm.model.session(|spec| dense.cache(spec))?)?;
    let mut packed = replayed(llm.model.session(|spec| method.cache(spec))?)?;
    let seqs: Vec<u64> = (0..prompts.len() as u64).collect();
    let prompt = prompts[0].len();
    let mut batch = Batch::new(&seqs.iter().map(|&seq| (seq, prompt)).collect::<Vec<_>>())?;
    let mut ids = prompts.concat();
    let (mut kl, mut first) = (Vec::new(), vec![tokens; prompts.len()]);
    // All methods use the same random numbers.
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    for position in 0..tokens {
        let log_p = |logits: Tensor| log_softmax(&logits.to_dtype(DType::F32)?, D::Minus1);
        let want = log_p(dense.forward(&batch, &ids, Logits::Last)?)?;
        let got = log_p(packed.forward(&batch, &ids, Logits::Last)?)?;
        kl.push(divergences(&want, &got)?);
        for (seq, (a, b)) in argmax(&want)?.into_iter().zip(argmax(&got)?).enumerate() {
            if a != b {
                first[seq] = first[seq].min(position);
            }
        }
        let draws = (0..prompts.len()).map(|_| rng.random::<f32>());
        ids = draw(&got, draws)?;
        batch = Batch::decode(&seqs)?;
    }
    // The last sampled token has not been fed.
    let size = Size::new(llm, &packed, &seqs, prompt + tokens - 1);
    Ok(Outcome { kl, first, size })
}

/// Returns the KL divergence of each row, `Σ p (log p - log q)`.
fn divergences(log_p: &Tensor, log_q: &Tensor) -> Result<Vec<f64>> {
    let terms = (log_p.exp()? * (log_p - log_q)?)?;
    let sums = terms.sum(D::Minus1)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(sums.into_iter().map(|kl| f64::from(kl.max(0.0))).collect())
}

fn argmax(log_p: &Tensor) -> Result<Vec<u32>> {
    Ok(log_p.argmax(D::Minus1)?.flatten_all()?.to_vec1::<u32>()?)
}

/// The number of probabilities that are summed on the device before the sums are copied to the
/// host.
const BLOCK: usize = 256;

/// Samples a token of each row: the first at which the cumulative probability is larger than the
/// draw.
fn draw(log_p: &Tensor, draws: impl Iterator<Item = f32>) -> Result<Vec<u32>> {
    let vocabulary = log_p.dim(D::Minus1)?;
    let p = log_p.exp()?.reshape(((), vocabulary))?;
    let p = p.pad_with_zeros(1, 0, vocabulary.next_multiple_of(BLOCK) - vocabulary)?;
    let blocks = vocabulary.div_ceil(BLOCK);
    let p = p.reshape(((), blocks, BLOCK))?;
    let sums = p.sum(2)?.to_vec2::<f32>()?;
    let found: Vec<_> = sums.iter().zip(draws).map(|(sums, draw)| exceeds(sums, draw)).collect();
    let rows = (0..).zip(&found).map(|(row, (block, _))| row * blocks as u32 + *block as u32);
    let rows = Tensor::from_iter(rows, p.device())?;
    let of_blocks = p.flatten(0, 1)?.index_select(&rows, 0)?.to_vec2::<f32>()?;
    let token = |(p, (block, rest)): (Vec<f32>, (usize, f32))| {
        (block * BLOCK + exceeds(&p, rest).0).min(vocabulary - 1) as u32
    };
    Ok(of_blocks.into_iter().zip(found).map(token).collect())
}

/// Returns the first item at which the cumulative sum is larger than the draw, and the draw minus
/// the sum of the items before it. Returns the last item if, by rounding, the whole sum is not
/// larger.
fn exceeds(items: &[f32], draw: f32) -> (usize, f32) {
    let mut rest = draw;
    for (i, item) in items.iter().enumerate() {
        if rest < *item {
            return (i, rest);
        }
        rest -= item;
    }
    (items.len() - 1, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_token_is_drawn_where_the_cumulative_probability_exceeds_the_draw() -> Result<()> {
        // 600 tokens, so that the last block is padded: token i has probability (i + 1) / sum.
        let weights: Vec<f32> = (1..=600).map(|i| i as f32).collect();
        let sum: f32 = weights.iter().sum();
        let p: Vec<f32> = weights.iter().map(|w| w / sum).collect();
        let draws = [0.0, 0.1, 0.4999, 0.75, 0.999];
        let log_p = Tensor::new(p.clone(), &Device::Cpu)?.log()?.unsqueeze(0)?;
        let log_p = log_p.repeat((draws.len(), 1))?;
        for (token, draw) in draw(&log_p, draws.into_iter())?.into_iter().zip(draws) {
            let before: f32 = p[..token as usize].iter().sum();
            assert!(before <= draw + 1e-5 && draw <= before + p[token as usize] + 1e-5, "{token}");
        }
        Ok(())
    }
}
