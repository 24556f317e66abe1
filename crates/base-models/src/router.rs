//! The router of a mixture: which experts each token goes through.

use crate::config::{Config, ExpertGroups, Experts, Scoring};
use crate::linear::Weight;
use crate::weights::Weights;
use candle_core::{DType, Device, Tensor};
use longctx_core::Result;

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
        let mut choice = Choice { experts: Vec::new(), weights: Vec::new() };
        for mut scores in logits.to_vec2::<f32>()? {
            self.score(&mut scores);
            self.choose_for_token(&scores, &mut choice);
        }
        Ok(choice)
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

    fn choose_for_token(&self, scores: &[f32], choice: &mut Choice) {
        let Experts { per_token, normalize, scale, .. } = self.settings;
        let biased: Vec<f32> = match self.bias.is_empty() {
            true => scores.to_vec(),
            false => scores.iter().zip(&self.bias).map(|(score, bias)| score + bias).collect(),
        };
        let mut order = self.candidates(&biased);
        sort_best_first(&mut order, &biased);
        let best = &order[..per_token];
        let sum = match normalize {
            true => best.iter().map(|&expert| scores[expert]).sum(),
            false => 1.0,
        };
        choice.experts.extend(best);
        choice.weights.extend(best.iter().map(|&expert| scores[expert] / sum * scale as f32));
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
        sort_best_first(&mut order, &groups);
        let experts = |&group: &usize| group * size..(group + 1) * size;
        let mut best: Vec<usize> = order[..per_token].iter().flat_map(experts).collect();
        best.sort_unstable();
        best
    }
}

/// Sorts by descending score. The sort is stable.
fn sort_best_first(order: &mut [usize], scores: &[f32]) {
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
}
