//! Feed-forward blocks.

use crate::config::{Activation, Config};
use crate::linear::{FusedLinear, Linear};
use crate::mixture::Mixture;
use crate::weights::Weights;
use candle_core::Tensor;
use longctx_core::{Result, silu_mul};

/// A layer's feed-forward block.
#[derive(Debug)]
pub(crate) enum FeedForward {
    /// One gated block.
    GatedMlp(GatedMlp),
    /// A mixture of experts.
    Mixture(Mixture),
}

impl FeedForward {
    pub fn load(config: &Config, layer: usize, w: &impl Weights) -> Result<Self> {
        match config.layer_experts(layer) {
            Some(experts) => Mixture::load(config, experts, layer, w).map(Self::Mixture),
            None => GatedMlp::load(config, layer, w).map(Self::GatedMlp),
        }
    }

    /// Returns the number of tokens to process at a time. The inner activations are several times
    /// wider than the model, so a long prompt is processed in parts. A mixture reads the weights of
    /// most experts for each part, so its parts are longer.
    fn tokens_at_once(&self, on_cpu: bool) -> usize {
        match (self, on_cpu) {
            (Self::GatedMlp(_), true) => 1024,
            (Self::Mixture(_), true) => 2048,
            (_, false) => 8192,
        }
    }

    /// `x`: `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, of_part) = (x.dim(0)?, self.tokens_at_once(x.device().is_cpu()));
        if tokens <= of_part {
            return self.forward_part(x);
        }
        let part = |start| self.forward_part(&x.narrow(0, start, of_part.min(tokens - start))?);
        let parts: Vec<_> = (0..tokens).step_by(of_part).map(part).collect::<Result<_>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }

    fn forward_part(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::GatedMlp(block) => block.forward(x),
            Self::Mixture(mixture) => mixture.forward(x),
        }
    }
}

/// `down(activation(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct GatedMlp {
    pub gate_up: FusedLinear,
    pub down: Linear,
    pub activation: Activation,
}

impl GatedMlp {
    fn load(c: &Config, layer: usize, w: &impl Weights) -> Result<Self> {
        let names = w.names();
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let name = |part: &str| format!("{}.{layer}.{part}", names.layers);
        let fused = !names.gate_up.is_empty() && w.has(&format!("{}.weight", name(names.gate_up)));
        if !fused {
            return Self::load_parts(c, inner, [names.gate, names.up, names.down].map(name), w);
        }
        let linear = |part, out, inner| w.linear(&name(part), out, inner, c.mlp_bias);
        let gate_up =
            FusedLinear::from_single(linear(names.gate_up, 2 * inner, hidden)?, vec![inner; 2]);
        let down = linear(names.down, hidden, inner)?;
        Ok(Self { gate_up, down, activation: c.activation })
    }

    /// Loads a block of `inner` channels whose gate, up and down projections have these names.
    pub fn load_parts(
        c: &Config,
        inner: usize,
        [gate, up, down]: [String; 3],
        w: &impl Weights,
    ) -> Result<Self> {
        let linear = |name: &str, out, inner| w.linear(name, out, inner, c.mlp_bias);
        let gate_up = FusedLinear::new(vec![
            linear(&gate, inner, c.hidden_size)?,
            linear(&up, inner, c.hidden_size)?,
        ])?;
        let down = linear(&down, c.hidden_size, inner)?;
        Ok(Self { gate_up, down, activation: c.activation })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate_up = self.gate_up.forward(x)?;
        let (gate, up) = (&gate_up[0], &gate_up[1]);
        self.down.forward(&self.activation.gated(gate, up)?)
    }
}

impl Activation {
    /// Returns `activation(gate) * up`.
    pub fn gated(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => silu_mul(gate, up),
            Self::Gelu => Ok((gate.contiguous()?.gelu_erf()? * up)?),
            Self::GeluTanh => Ok((gate.contiguous()?.gelu()? * up)?),
        }
    }
}
