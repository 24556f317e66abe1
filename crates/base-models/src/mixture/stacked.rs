//! The matrices of all experts in one tensor each.

use crate::config::Activation;
use crate::feed_forward::GatedMlp;
use crate::linear::{FusedLinear, Linear, Weight};
use candle_core::Tensor;
use longctx_core::Result;

/// On a GPU, the product of one expert's few rows fills a part of the chip, and its launches take
/// longer than its work. One batched product has the rows of all experts.
#[derive(Debug)]
pub(super) struct Stacked {
    /// Gate above up: `[experts, 2 * inner, hidden]`.
    gate_up: Tensor,
    /// `[experts, hidden, inner]`.
    down: Tensor,
    activation: Activation,
}

impl Stacked {
    /// Stacks the experts' matrices; `None` if they are packed.
    pub fn new(
        gates: &[Weight],
        ups: &[Weight],
        downs: &[Weight],
        activation: Activation,
    ) -> Result<Option<Self>> {
        let (Some(gates), Some(ups), Some(downs)) = (dense(gates), dense(ups), dense(downs)) else {
            return Ok(None);
        };
        let gate_up: Vec<_> = gates.iter().zip(ups).flat_map(|(gate, up)| [*gate, up]).collect();
        Ok(Some(Self {
            gate_up: stack(&gate_up, gates.len())?,
            down: stack(&downs, downs.len())?,
            activation,
        }))
    }

    /// Returns one expert, whose matrices are views.
    pub fn expert(&self, i: usize) -> Result<GatedMlp> {
        let matrix =
            |x: &Tensor| Ok::<_, candle_core::Error>(Linear::new(Weight::Dense(x.get(i)?), None));
        let inner = self.down.dim(2)?;
        let gate_up = FusedLinear::from_single(matrix(&self.gate_up)?, vec![inner; 2]);
        Ok(GatedMlp { gate_up, down: matrix(&self.down)?, activation: self.activation })
    }

    /// Maps each expert's rows. `x`: `[experts, rows, hidden]`. Returns `[experts * rows, hidden]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (experts, rows, hidden) = x.dims3()?;
        let inner = self.down.dim(2)?;
        let gate_up = x.matmul(&self.gate_up.transpose(1, 2)?)?;
        let gate_up = gate_up.reshape((experts * rows, 2 * inner))?;
        let (gate, up) = (gate_up.narrow(1, 0, inner)?, gate_up.narrow(1, inner, inner)?);
        let y = self.activation.gated(&gate, &up)?.reshape((experts, rows, inner))?;
        Ok(y.matmul(&self.down.transpose(1, 2)?)?.reshape((experts * rows, hidden))?)
    }
}

/// Returns the float tensors, if all are.
fn dense(weights: &[Weight]) -> Option<Vec<&Tensor>> {
    weights.iter().map(Weight::dense).collect()
}

/// Copies matrices `[out, in]` into one tensor `[count, …, in]`, one after the other.
fn stack(matrices: &[&Tensor], count: usize) -> Result<Tensor> {
    let (out, inner) = matrices[0].dims2()?;
    let all =
        Tensor::zeros((matrices.len() * out, inner), matrices[0].dtype(), matrices[0].device())?;
    for (i, matrix) in matrices.iter().enumerate() {
        all.slice_set(&matrix.contiguous()?, 0, i * out)?;
    }
    Ok(all.reshape((count, (), inner))?)
}
