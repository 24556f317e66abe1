//! Perplexity of a text, with teacher forcing.

use std::time::Instant;

use anyhow::Result;
use base_models::Pretrained;
use candle_core::{D, DType, Tensor};
use candle_nn::ops::log_softmax;
use longctx_core::{Batch, CausalLm, Logits};

use crate::bootstrap::interval;
use crate::lacks_kernels;
use crate::size::Size;
use crate::subject::Subject;

/// A method's losses per context, and its size at the end.
struct Outcome {
    /// Mean negative log-likelihood of each context.
    losses: Vec<f64>,
    size: Size,
}

/// Prints a row for each method. Changes are relative to `reference` if it is the first.
pub fn table(
    methods: &[Subject],
    reference: &str,
    llm: &Pretrained,
    contexts: &[Vec<u32>],
    block: usize,
) -> Result<()> {
    println!("| method | bits per number | perplexity | over f16 | 95 % | compression | seconds |");
    println!("|---|---|---|---|---|---|---|");
    let mut dense: Option<Vec<f64>> = None;
    for method in methods {
        let start = Instant::now();
        let Outcome { losses, size } = match run(method, llm, contexts, block) {
            Ok(outcome) => outcome,
            Err(error) if lacks_kernels(&error) => {
                println!("| {} | {error} | | | | | |", method.name());
                continue;
            }
            Err(error) => return Err(error),
        };
        let perplexity = (losses.iter().sum::<f64>() / losses.len() as f64).exp();
        if method.name() == reference {
            dense = Some(losses.clone());
        }
        let change = dense.as_ref().map_or(String::from(" | "), |dense| change(&losses, dense));
        println!(
            "| {} | {:.2} | {perplexity:.3} | {change} | {:.2}x | {:.0} |",
            method.name(),
            size.bits_per_number(),
            size.compression(),
            start.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

/// Returns the change of perplexity and its bootstrap interval over contexts.
fn change(losses: &[f64], dense: &[f64]) -> String {
    let differences: Vec<f64> = losses.iter().zip(dense).map(|(a, b)| a - b).collect();
    let percent = |difference: f64| 100.0 * difference.exp_m1();
    let (low, high) = interval(&differences);
    let mean = differences.iter().sum::<f64>() / differences.len() as f64;
    format!("{:+.2}% | {:+.2} to {:+.2}", percent(mean), percent(low), percent(high))
}

/// Runs the contexts as one batch, a few tokens at a time. Each block of tokens attends to the
/// packed past.
fn run(method: &Subject, llm: &Pretrained, contexts: &[Vec<u32>], block: usize) -> Result<Outcome> {
    let mut session = llm.model.session(|spec| method.cache(spec))?;
    let len = contexts[0].len();
    let mut losses = vec![0.0; contexts.len()];
    for start in (0..len).step_by(block) {
        let fed = block.min(len - start);
        let lens: Vec<_> = (0..).zip(contexts).map(|(seq, _)| (seq, fed)).collect();
        let ids: Vec<_> = contexts.iter().flat_map(|c| &c[start..start + fed]).copied().collect();
        let logits = session.forward(&Batch::new(&lens)?, &ids, Logits::All)?;
        // A context's last token has no target.
        let predicted = fed.min(len - 1 - start);
        let logits = logits.reshape((contexts.len(), fed, ()))?.narrow(1, 0, predicted)?;
        let log_p = log_softmax(&logits.contiguous()?.to_dtype(DType::F32)?, D::Minus1)?;
        let targets = contexts.iter().map(|c| &c[start + 1..start + 1 + predicted]);
        let targets =
            targets.map(|c| Tensor::new(c, log_p.device())).collect::<Result<Vec<_>, _>>()?;
        let of_targets = log_p.gather(&Tensor::stack(&targets, 0)?.unsqueeze(2)?, D::Minus1)?;
        let sums = of_targets.squeeze(2)?.sum(1)?.to_vec1::<f32>()?;
        losses.iter_mut().zip(sums).for_each(|(loss, sum)| *loss -= f64::from(sum));
    }
    losses.iter_mut().for_each(|loss| *loss /= (len - 1) as f64);
    let seqs: Vec<_> = (0..contexts.len() as u64).collect();
    let size = Size::new(llm, &session, &seqs, len);
    Ok(Outcome { losses, size })
}
