//! Feed-forward blocks: gated ones, and mixtures of them.

use crate::config::{Activation, Config, Experts};
use crate::linear::{Joined, Linear, Weight};
use crate::weights::Weights;
use candle_core::{DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use longctx_core::{Result, silu_mul};

/// A layer's feed-forward block.
#[derive(Debug)]
pub(crate) enum FeedForward {
    /// One block.
    Gated(Gated),
    /// A mixture.
    Mixture(Mixture),
}

impl FeedForward {
    pub fn load(config: &Config, layer: usize, w: &impl Weights) -> Result<Self> {
        match config.layer_experts(layer) {
            Some(experts) => Mixture::load(config, experts, layer, w).map(Self::Mixture),
            None => Gated::load(config, layer, w).map(Self::Gated),
        }
    }

    /// `x`: `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Gated(block) => block.forward(x),
            Self::Mixture(mixture) => mixture.forward(x),
        }
    }
}

/// `down(activation(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct Gated {
    gate_up: Joined,
    down: Linear,
    activation: Activation,
}

impl Gated {
    fn load(c: &Config, layer: usize, w: &impl Weights) -> Result<Self> {
        let names = w.names();
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let name = |part: &str| format!("{}.{layer}.{part}", names.layers);
        let linear = |part, out, inner| w.linear(&name(part), out, inner, c.mlp_bias);
        let fused = !names.gate_up.is_empty() && w.has(&format!("{}.weight", name(names.gate_up)));
        let gate_up = match fused {
            true => Joined::fused(linear(names.gate_up, 2 * inner, hidden)?, vec![inner; 2]),
            false => Joined::new(vec![
                linear(names.gate, inner, hidden)?,
                linear(names.up, inner, hidden)?,
            ])?,
        };
        let down = linear(names.down, hidden, inner)?;
        Ok(Self { gate_up, down, activation: c.activation })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate_up = self.gate_up.forward(x)?;
        let (gate, up) = (&gate_up[0], &gate_up[1]);
        self.down.forward(&self.activation.gated(gate, up)?)
    }
}

impl Activation {
    /// The activation of the gate, times up.
    fn gated(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => silu_mul(gate, up),
            Self::Gelu => Ok((gate.contiguous()?.gelu_erf()? * up)?),
            Self::GeluTanh => Ok((gate.contiguous()?.gelu()? * up)?),
        }
    }
}

/// Blocks of which a router chooses some for each token.
#[derive(Debug)]
pub(crate) struct Mixture {
    router: Weight,
    experts: Vec<Gated>,
    per_token: usize,
    normalize: bool,
}

/// The tokens that go through an expert, and the weights of its output for each.
#[derive(Debug, Clone, Default)]
struct Share {
    tokens: Vec<u32>,
    weights: Vec<f32>,
}

impl Mixture {
    fn load(c: &Config, experts: &Experts, layer: usize, w: &impl Weights) -> Result<Self> {
        let names = w.names();
        let (count, inner) = (experts.count, experts.intermediate_size);
        let name = |part: &str| format!("{}.{layer}.{part}", names.layers);
        let load = |part: &str, out, inner| w.experts(&name(part), count, out, inner);
        let gates = load(names.expert_gate, inner, c.hidden_size)?;
        let ups = load(names.expert_up, inner, c.hidden_size)?;
        let downs = load(names.expert_down, c.hidden_size, inner)?;
        let plain = |weight| Linear::new(weight, None);
        let block = |((gate, up), down)| -> Result<Gated> {
            let gate_up = Joined::new(vec![plain(gate), plain(up)])?;
            Ok(Gated { gate_up, down: plain(down), activation: c.activation })
        };
        let blocks = gates.into_iter().zip(ups).zip(downs).map(block);
        Ok(Self {
            router: w.matrix(&format!("{}.weight", name(names.router)), count, c.hidden_size)?,
            experts: blocks.collect::<Result<_>>()?,
            per_token: experts.per_token,
            normalize: experts.normalize,
        })
    }

    /// Each chosen expert's weights are read once, for all of its tokens.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut y = x.zeros_like()?;
        for (expert, share) in self.experts.iter().zip(self.route(x)?) {
            if share.tokens.is_empty() {
                continue;
            }
            let tokens = Tensor::new(share.tokens, x.device())?;
            let weights = Tensor::new(share.weights, x.device())?.to_dtype(x.dtype())?;
            let out = expert.forward(&x.index_select(&tokens, 0)?)?;
            y = y.index_add(&tokens, &out.broadcast_mul(&weights.unsqueeze(1)?)?, 0)?;
        }
        Ok(y)
    }

    /// Each expert's tokens. The router's choice is made on the host, which waits for the device.
    fn route(&self, x: &Tensor) -> Result<Vec<Share>> {
        let logits = self.router.forward(x)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let probabilities = softmax_last_dim(&logits.contiguous()?)?.to_vec2::<f32>()?;
        let mut shares = vec![Share::default(); self.experts.len()];
        for (token, p) in probabilities.iter().enumerate() {
            let mut order: Vec<_> = (0..p.len()).collect();
            // Equal probabilities: the first expert.
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
            order.truncate(self.per_token);
            let sum = match self.normalize {
                true => order.iter().map(|&expert| p[expert]).sum(),
                false => 1.0,
            };
            for expert in order {
                shares[expert].tokens.push(token as u32);
                shares[expert].weights.push(p[expert] / sum);
            }
        }
        Ok(shares)
    }
}
