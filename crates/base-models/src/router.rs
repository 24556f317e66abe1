//! The router of a mixture: which experts each token goes through.

use crate::config::{Config, ExpertGroups, Experts, Scoring};
use crate::linear::Weight;
use crate::weights::Weights;
use candle_core::{DType, Device, Tensor};
use longctx_core::Result;
use rayon::prelude::*;
use std::borrow::Cow;

/// Smallest number of tokens that a thread takes.
const MIN_PARALLEL: usize = 64;

/// Scores a token's experts and chooses the best.
#[derive(Debug)]
pub(crate) struct Router {
    weight: Weight,
    /// A bias of each expert's score, for the choice only; empty if there is none.
    bias: Vec<f32>,
    settings: Experts,
}

/// The experts of each token and the weights of their outputs, both `[tokens, per_token]`.
pub(crate) struct Choice {
    pub experts: Vec<usize>,
    pub weights: Vec<f32>,
}

impl Router {
    pub fn load(c: &Config, experts: &Experts, layer: usize, w: &impl Weights) -> Result<Self> {
        let names = w.names();
        let name = |part: &str| format!("{}.{layer}.{part}", names.layers);
        let bias = match experts.scoring {
            Scoring::Softmax => Vec::new(),
            Scoring::BiasedSigmoid => {
                let bias = w.tensor(&name(names.router_bias), &[experts.count])?;
                bias.to_dtype(DType::F32)?.to_vec1()?
            }
        };
        let weight = format!("{}.weight", name(names.router));
        let weight = w.matrix(&weight, experts.count, c.hidden_size)?;
        Ok(Self { weight, bias, settings: experts.clone() })
    }

    /// Chooses the experts for each row of `[tokens, hidden]`. The choice is made on the host,
    /// which waits for the device once.
    pub fn choose(&self, x: &Tensor) -> Result<Choice> {
        let logits = self.weight.forward(x)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let (tokens, count) = logits.dims2()?;
        let per_token = self.settings.per_token;
        let (mut experts, mut weights) =
            (vec![0; tokens * per_token], vec![0.0; tokens * per_token]);
        let mut scores = logits.flatten_all()?.to_vec1::<f32>()?;
        let outputs = experts.par_chunks_mut(per_token).zip(weights.par_chunks_mut(per_token));
        let rows = scores.par_chunks_mut(count).zip(outputs).with_min_len(MIN_PARALLEL);
        rows.for_each(|(scores, (experts, weights))| {
            self.score(scores);
            self.choose_for_token(scores, experts, weights);
        });
        Ok(Choice { experts, weights })
    }

    /// Converts logits to scores, in place.
    fn score(&self, x: &mut [f32]) {
        match self.settings.scoring {
            Scoring::Softmax => {
                let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                x.iter_mut().for_each(|x| *x = (*x - max).exp());
                let sum: f32 = x.iter().sum();
                x.iter_mut().for_each(|x| *x /= sum);
            }
            Scoring::BiasedSigmoid => x.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
        }
    }

    fn choose_for_token(&self, scores: &[f32], experts: &mut [usize], weights: &mut [f32]) {
        let Experts { per_token, normalize, scale, .. } = self.settings;
        let biased: Cow<'_, [f32]> = match self.bias.is_empty() {
            true => scores.into(),
            false => scores.iter().zip(&self.bias).map(|(score, bias)| score + bias).collect(),
        };
        let mut order = self.candidates(&biased);
        keep_best(&mut order, per_token, &biased);
        let sum = match normalize {
            true => order.iter().map(|&expert| scores[expert]).sum(),
            false => 1.0,
        };
        experts.copy_from_slice(&order);
        for (weight, &expert) in weights.iter_mut().zip(&order) {
            *weight = scores[expert] / sum * scale as f32;
        }
    }

    /// Returns the experts of the best groups; all experts if there are no groups.
    fn candidates(&self, scores: &[f32]) -> Vec<usize> {
        let Some(ExpertGroups { count, per_token }) = self.settings.groups else {
            return (0..scores.len()).collect();
        };
        let size = scores.len() / count;
        let of_group = |group: &[f32]| {
            let mut group = group.to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            match self.settings.scoring {
                Scoring::Softmax => group[0],
                Scoring::BiasedSigmoid => group[0] + group[1],
            }
        };
        let groups: Vec<f32> = scores.chunks(size).map(of_group).collect();
        let mut order: Vec<_> = (0..count).collect();
        keep_best(&mut order, per_token, &groups);
        let experts = |&group: &usize| group * size..(group + 1) * size;
        let mut best: Vec<usize> = order.iter().flat_map(experts).collect();
        best.sort_unstable();
        best
    }
}

/// Keeps the `count` indices with the highest scores, from the best to the worst. Of equal scores
/// the lower index is better.
fn keep_best(order: &mut Vec<usize>, count: usize, scores: &[f32]) {
    let best_first = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    if (1..order.len()).contains(&count) {
        order.select_nth_unstable_by(count - 1, best_first);
    }
    order.truncate(count);
    order.sort_unstable_by(best_first);
}
