//! Mixtures of experts.

mod stacked;

use self::stacked::Stacked;
use crate::config::{Config, Experts};
use crate::feed_forward::GatedMlp;
use crate::linear::{FusedLinear, Linear};
use crate::router::{Choice, Router};
use crate::weights::Weights;
use candle_core::{Device, Tensor};
use longctx_core::Result;

/// A mixture of experts: a router chooses some blocks for each token. A shared block processes all
/// tokens.
#[derive(Debug)]
pub(crate) struct Mixture {
    router: Router,
    experts: Vec<GatedMlp>,
    /// The experts' matrices, of which `experts` has views. `None` on the CPU and for packed
    /// matrices.
    stacked: Option<Stacked>,
    shared: Option<GatedMlp>,
}

impl Mixture {
    pub fn load(c: &Config, experts: &Experts, layer: usize, w: &impl Weights) -> Result<Self> {
        let names = w.names();
        let (count, inner) = (experts.count, experts.intermediate_size);
        let name = |part: &str| format!("{}.{layer}.{part}", names.layers);
        let load = |part: &str, out, inner| w.experts(&name(part), count, out, inner);
        let gates = load(names.expert_gate, inner, c.hidden_size)?;
        let ups = load(names.expert_up, inner, c.hidden_size)?;
        let downs = load(names.expert_down, c.hidden_size, inner)?;
        let stacked = match w.options().device.is_cpu() {
            true => None,
            false => Stacked::new(&gates, &ups, &downs, c.activation)?,
        };
        let plain = |weight| Linear::new(weight, None);
        let block = |((gate, up), down)| -> Result<GatedMlp> {
            let gate_up = FusedLinear::new(vec![plain(gate), plain(up)])?;
            Ok(GatedMlp { gate_up, down: plain(down), activation: c.activation })
        };
        let blocks: Vec<_> = match &stacked {
            Some(stacked) => (0..count).map(|i| stacked.expert(i)).collect::<Result<_>>()?,
            None => gates.into_iter().zip(ups).zip(downs).map(block).collect::<Result<_>>()?,
        };
        let shared = [names.shared_gate, names.shared_up, names.shared_down];
        Ok(Self {
            router: Router::load(c, experts, layer, w)?,
            experts: blocks,
            stacked,
            shared: match experts.shared_size {
                0 => None,
                size => Some(GatedMlp::load_parts(c, size, shared.map(name), w)?),
            },
        })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.forward_routed(x)?;
        Ok(match &self.shared {
            Some(shared) => (y + shared.forward(x)?)?,
            None => y,
        })
    }

    /// Only the router waits for the device, once.
    fn forward_routed(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, hidden) = x.dims2()?;
        let Choice { experts, weights } = self.router.choose(x)?;
        let per_token = experts.len() / tokens;
        let mut positions = vec![0; experts.len()];
        let rows = Rows::new(experts, per_token);
        let runs = rows.runs();
        // A stacked product reads the experts that no token chose, too.
        let stacked = self.stacked.as_ref().filter(|_| 2 * runs.len() >= self.experts.len());
        let outputs = match stacked {
            Some(stacked) => self.forward_stacked(stacked, x, &rows, &runs, &mut positions)?,
            None => self.forward_each(x, &rows, &runs, 0, &mut positions)?,
        };
        let outputs = Tensor::cat(&outputs, 0)?.index_select(&indices(&positions, x)?, 0)?;
        let weights = Tensor::from_vec(weights, (tokens, 1, per_token), &Device::Cpu)?;
        let weights = weights.to_dtype(x.dtype())?.to_device(x.device())?;
        Ok(weights.matmul(&outputs.reshape((tokens, per_token, hidden))?)?.squeeze(1)?)
    }

    /// Feeds each expert its rows, so that its weights are read once. Returns one output per run
    /// and writes the position of each row among all outputs, of which the first is `start`.
    fn forward_each(
        &self,
        x: &Tensor,
        rows: &Rows,
        runs: &[(usize, &[usize])],
        mut start: usize,
        positions: &mut [usize],
    ) -> Result<Vec<Tensor>> {
        if runs.is_empty() {
            return Ok(Vec::new());
        }
        // One copy to the device for all runs.
        let tokens: Vec<_> = runs.iter().flat_map(|(_, run)| rows.tokens(run)).collect();
        let (tokens, first) = (indices(&tokens, x)?, start);
        let mut outputs = Vec::new();
        for &(expert, run) in runs {
            let gathered = x.index_select(&tokens.narrow(0, start - first, run.len())?, 0)?;
            outputs.push(self.experts[expert].forward(&gathered)?);
            run.iter().enumerate().for_each(|(i, &row)| positions[row] = start + i);
            start += run.len();
        }
        Ok(outputs)
    }

    /// Feeds all experts in one batched product for each matrix. An expert has room for twice the
    /// mean number of rows; the rows beyond go through it alone.
    fn forward_stacked(
        &self,
        stacked: &Stacked,
        x: &Tensor,
        rows: &Rows,
        runs: &[(usize, &[usize])],
        positions: &mut [usize],
    ) -> Result<Vec<Tensor>> {
        let (count, hidden) = (self.experts.len(), x.dim(1)?);
        let room = (2 * positions.len() / count).next_multiple_of(8).max(8);
        // Places without a row hold token 0. Their outputs are not read.
        let mut tokens = vec![0; count * room];
        let mut beyond = Vec::new();
        for &(expert, run) in runs {
            let (within, rest) = run.split_at(run.len().min(room));
            let start = expert * room;
            tokens[start..start + within.len()].copy_from_slice(&rows.tokens(within));
            within.iter().enumerate().for_each(|(i, &row)| positions[row] = start + i);
            if !rest.is_empty() {
                beyond.push((expert, rest));
            }
        }
        let gathered = x.index_select(&indices(&tokens, x)?, 0)?;
        let mut outputs = vec![stacked.forward(&gathered.reshape((count, room, hidden))?)?];
        outputs.extend(self.forward_each(x, rows, &beyond, count * room, positions)?);
        Ok(outputs)
    }
}

/// The rows of a call, one for each token and expert that it chose, sorted by expert.
struct Rows {
    order: Vec<usize>,
    experts: Vec<usize>,
    per_token: usize,
}

impl Rows {
    /// `experts`: the expert of each row. The rows of a token are adjacent.
    fn new(experts: Vec<usize>, per_token: usize) -> Self {
        // A counting sort: the rows of an expert begin after those of the experts before it.
        let mut next = vec![0; experts.iter().max().map_or(0, |last| last + 1)];
        experts.iter().for_each(|&expert| next[expert] += 1);
        let mut start = 0;
        next.iter_mut().for_each(|count| start += std::mem::replace(count, start));
        let mut order = vec![0; experts.len()];
        for (row, &expert) in experts.iter().enumerate() {
            order[next[expert]] = row;
            next[expert] += 1;
        }
        Self { order, experts, per_token }
    }

    /// Returns the chosen experts and the rows of each.
    fn runs(&self) -> Vec<(usize, &[usize])> {
        let runs = self.order.chunk_by(|&a, &b| self.experts[a] == self.experts[b]);
        runs.map(|run| (self.experts[run[0]], run)).collect()
    }

    /// Returns the token of each row.
    fn tokens(&self, rows: &[usize]) -> Vec<usize> {
        rows.iter().map(|row| row / self.per_token).collect()
    }
}

/// Returns row indices as a tensor on the device of `x`.
fn indices(rows: &[usize], x: &Tensor) -> Result<Tensor> {
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
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

    fn stacked() -> Mixture {
        let (config, weights) = (config(), Random(LoadOptions::default()));
        let matrices = |out, inner| -> Vec<_> {
            (0..16).map(|_| weights.matrix("", out, inner).unwrap()).collect()
        };
        let (gates, ups, downs) = (matrices(12, 24), matrices(12, 24), matrices(24, 12));
        let stacked = Stacked::new(&gates, &ups, &downs, config.activation).unwrap().unwrap();
        let experts = (0..16).map(|i| stacked.expert(i).unwrap()).collect();
        Mixture { experts, stacked: Some(stacked), ..mixture() }
    }

    /// With equal tokens three experts have all rows, more than there is room for.
    #[test]
    fn stacked_products_are_those_of_each_expert() {
        let mut mixture = stacked();
        let equal = random(1).repeat((50, 1)).unwrap();
        for x in [random(50), random(3), equal] {
            let experts = mixture.router.choose(&x).unwrap().experts;
            let mut positions = vec![0; experts.len()];
            let rows = Rows::new(experts, 3);
            let outputs = |parts: Vec<Tensor>, positions: &[usize]| {
                let all = Tensor::cat(&parts, 0).unwrap();
                all.index_select(&indices(positions, &x).unwrap(), 0).unwrap()
            };
            let stacked = mixture.stacked.take().unwrap();
            let runs = rows.runs();
            let got = mixture.forward_stacked(&stacked, &x, &rows, &runs, &mut positions).unwrap();
            let got = outputs(got, &positions);
            let want = mixture.forward_each(&x, &rows, &runs, 0, &mut positions).unwrap();
            let want = outputs(want, &positions);
            let error = largest(&(got - &want).unwrap());
            assert!(error < 1e-5 * largest(&want), "{error}");
            mixture.stacked = Some(stacked);
        }
    }
}
