//! Feed-forward blocks: gated ones, and mixtures of them.

use crate::config::{Activation, Config, Experts};
use crate::linear::{Joined, Linear};
use crate::router::{Choice, Router};
use crate::weights::Weights;
use candle_core::{Device, Tensor};
use longctx_core::{Result, silu_mul};

/// A layer's feed-forward block.
#[derive(Debug)]
pub(crate) enum FeedForward {
    /// One gated block.
    Gated(Gated),
    /// A mixture of experts.
    Mixture(Mixture),
}

impl FeedForward {
    pub fn load(config: &Config, layer: usize, w: &impl Weights) -> Result<Self> {
        match config.layer_experts(layer) {
            Some(experts) => Mixture::load(config, experts, layer, w).map(Self::Mixture),
            None => Gated::load(config, layer, w).map(Self::Gated),
        }
    }

    /// Returns the number of tokens to process at a time. The inner activations are several times
    /// wider than the model, so a long prompt is processed in parts. A mixture reads the weights of
    /// most experts for each part, so its parts are longer.
    fn tokens_at_once(&self, on_cpu: bool) -> usize {
        match (self, on_cpu) {
            (Self::Gated(_), true) => 1024,
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
        let fused = !names.gate_up.is_empty() && w.has(&format!("{}.weight", name(names.gate_up)));
        if !fused {
            return Self::load_parts(c, inner, [names.gate, names.up, names.down].map(name), w);
        }
        let linear = |part, out, inner| w.linear(&name(part), out, inner, c.mlp_bias);
        let gate_up = Joined::fused(linear(names.gate_up, 2 * inner, hidden)?, vec![inner; 2]);
        let down = linear(names.down, hidden, inner)?;
        Ok(Self { gate_up, down, activation: c.activation })
    }

    /// Loads a block of `inner` channels whose gate, up and down projections have these names.
    fn load_parts(
        c: &Config,
        inner: usize,
        [gate, up, down]: [String; 3],
        w: &impl Weights,
    ) -> Result<Self> {
        let linear = |name: &str, out, inner| w.linear(name, out, inner, c.mlp_bias);
        let gate_up = Joined::new(vec![
            linear(&gate, inner, c.hidden_size)?,
            linear(&up, inner, c.hidden_size)?,
        ])?;
        let down = linear(&down, c.hidden_size, inner)?;
        Ok(Self { gate_up, down, activation: c.activation })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate_up = self.gate_up.forward(x)?;
        let (gate, up) = (&gate_up[0], &gate_up[1]);
        self.down.forward(&self.activation.gated(gate, up)?)
    }
}

impl Activation {
    /// Returns `activation(gate) * up`.
    fn gated(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        match self {
            Self::Silu => silu_mul(gate, up),
            Self::Gelu => Ok((gate.contiguous()?.gelu_erf()? * up)?),
            Self::GeluTanh => Ok((gate.contiguous()?.gelu()? * up)?),
        }
    }
}

/// A mixture of experts: a router chooses some blocks for each token. A shared block processes all
/// tokens.
#[derive(Debug)]
pub(crate) struct Mixture {
    router: Router,
    experts: Vec<Gated>,
    shared: Option<Gated>,
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
        let shared = [names.shared_gate, names.shared_up, names.shared_down];
        Ok(Self {
            router: Router::load(c, experts, layer, w)?,
            experts: blocks.collect::<Result<_>>()?,
            shared: match experts.shared_size {
                0 => None,
                size => Some(Gated::load_parts(c, size, shared.map(name), w)?),
            },
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.forward_routed(x)?;
        Ok(match &self.shared {
            Some(shared) => (y + shared.forward(x)?)?,
            None => y,
        })
    }

    /// Rows are sorted by expert, so each chosen expert's weights are read once. Only the router
    /// waits for the device, once.
    fn forward_routed(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, hidden) = x.dims2()?;
        let Choice { experts, weights } = self.router.choose(x)?;
        let (rows, per_token) = (experts.len(), experts.len() / tokens);
        let mut order: Vec<usize> = (0..rows).collect();
        order.sort_by_key(|&row| experts[row]);
        let sources = indices(order.iter().map(|row| row / per_token), x)?;
        let outputs = Tensor::zeros((rows, hidden), x.dtype(), x.device())?;
        let mut start = 0;
        for run in order.chunk_by(|&a, &b| experts[a] == experts[b]) {
            let gathered = x.index_select(&sources.narrow(0, start, run.len())?, 0)?;
            let output = self.experts[experts[run[0]]].forward(&gathered)?;
            outputs.slice_set(&output.contiguous()?, 0, start)?;
            start += run.len();
        }
        // The sorted position of each row.
        let mut places = vec![0; rows];
        order.iter().enumerate().for_each(|(place, &row)| places[row] = place);
        let outputs = outputs.index_select(&indices(places.into_iter(), x)?, 0)?;
        let weights = Tensor::from_vec(weights, (tokens, 1, per_token), &Device::Cpu)?;
        let weights = weights.to_dtype(x.dtype())?.to_device(x.device())?;
        Ok(weights.matmul(&outputs.reshape((tokens, per_token, hidden))?)?.squeeze(1)?)
    }
}

/// Returns row indices as a tensor on the device of `x`.
fn indices(rows: impl Iterator<Item = usize>, x: &Tensor) -> Result<Tensor> {
    let rows: Vec<u32> = rows.map(|row| row as u32).collect();
    Ok(Tensor::new(rows, x.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::weights::LoadOptions;

    fn config() -> Config {
        let experts = Experts {
            count: 16,
            per_token: 3,
            intermediate_size: 12,
            normalize: true,
            shared_size: 20,
            ..Experts::default()
        };
        Config { hidden_size: 24, experts: Some(experts), ..Config::default() }
    }

    fn mixture() -> Mixture {
        let (config, weights) = (config(), Random(LoadOptions::default()));
        Mixture::load(&config, config.experts.as_ref().unwrap(), 0, &weights).unwrap()
    }

    fn random(tokens: usize) -> Tensor {
        Tensor::randn(0f32, 9., (tokens, 24), &Device::Cpu).unwrap()
    }

    fn largest(x: &Tensor) -> f32 {
        x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    /// An expert that is not chosen is not read: its NaNs would reach the output even with a weight
    /// of 0.
    #[test]
    fn experts_that_no_token_chose_are_not_read() {
        let mut mixture = mixture();
        let x = random(2);
        let expected = mixture.forward(&x).unwrap();
        let chosen = mixture.router.choose(&x).unwrap().experts;
        let mut poisoned = 0;
        for (number, expert) in mixture.experts.iter_mut().enumerate() {
            if !chosen.contains(&number) {
                let nan = Tensor::full(f32::NAN, (24, 12), &Device::Cpu).unwrap();
                expert.down = Linear::new(crate::linear::Weight::Dense(nan), None);
                poisoned += 1;
            }
        }
        assert!(poisoned >= 10);
        assert_eq!(largest(&(mixture.forward(&x).unwrap() - expected).unwrap()), 0.0);
    }

    /// Compares with a mixture that runs every expert over every token and weighs unchosen ones by
    /// 0.
    #[test]
    fn sorted_rows_are_the_sum_over_experts() {
        let mixture = mixture();
        let x = random(50);
        let Choice { experts, weights } = mixture.router.choose(&x).unwrap();
        let mut expected = mixture.shared.as_ref().unwrap().forward(&x).unwrap();
        for (number, expert) in mixture.experts.iter().enumerate() {
            let mut of_tokens = vec![0f32; 50];
            for (row, _) in experts.iter().enumerate().filter(|(_, chosen)| **chosen == number) {
                of_tokens[row / 3] = weights[row];
            }
            let of_tokens = Tensor::from_vec(of_tokens, (50, 1), &Device::Cpu).unwrap();
            let output = expert.forward(&x).unwrap().broadcast_mul(&of_tokens).unwrap();
            expected = (expected + output).unwrap();
        }
        let error = largest(&(mixture.forward(&x).unwrap() - &expected).unwrap());
        assert!(error < 1e-5 * largest(&expected), "{error}");
    }
}
