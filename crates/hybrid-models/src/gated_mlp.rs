//! The gated feed-forward layer: W_down (g(W_gate x) ∘ W_up x), with g GELU or SiLU (arXiv
//! 2002.05202).

use crate::checkpoint::Checkpoint;
use crate::linear::Linear;
use crate::matrix::Rows;
use crate::mixer::{Input, Recurrent, StateArray};
use crate::simd::{MulGelu, MulSilu, zip};
use crate::workspace::Workspace;
use longctx_core::Result;
use rayon::prelude::*;
use serde::Deserialize;

/// The function of the gate.
#[derive(Deserialize, Debug, Default, Clone, Copy)]
pub enum Gate {
    /// GELU in its tanh approximation.
    #[serde(rename = "gelu_pytorch_tanh")]
    Gelu,
    #[default]
    #[serde(rename = "silu")]
    Silu,
}

#[derive(Debug)]
pub struct GatedMlp {
    pub hidden: usize,
    pub inner: usize,
    pub gate: Gate,
    pub gate_up: Linear,
    pub down: Linear,
}

impl GatedMlp {
    /// Loads `name.gate_proj`, `up_proj` and `down_proj`, all with biases or all without.
    pub fn load(
        w: &Checkpoint,
        name: &str,
        hidden: usize,
        inner: usize,
        gate: Gate,
        bias: bool,
    ) -> Result<Self> {
        let names = ["gate_proj", "up_proj"].map(|part| format!("{name}.{part}"));
        let gate_up = Linear::concat(w, &names, inner, hidden, bias)?;
        let down = Linear::load(w, &format!("{name}.down_proj"), hidden, inner, bias)?;
        Ok(Self { hidden, inner, gate, gate_up, down })
    }
}

impl Recurrent for GatedMlp {
    fn state(&self) -> Vec<StateArray> {
        Vec::new()
    }

    fn forward(
        &self,
        x: Input<'_>,
        _: &mut [&mut [f32]],
        workspace: &mut Workspace,
        out: &mut [f32],
    ) {
        let mut gate_up = workspace.acquire(x.rows() * 2 * self.inner);
        self.gate_up.apply(Rows::new(x.x, self.hidden), &mut gate_up);
        gate_up.par_chunks_exact_mut(2 * self.inner).for_each(|row| {
            let (gate, up) = row.split_at_mut(self.inner);
            match self.gate {
                Gate::Gelu => zip(MulGelu, up, gate),
                Gate::Silu => zip(MulSilu, up, gate),
            }
        });
        let gated = Rows::new(&gate_up, 2 * self.inner).columns(self.inner, self.inner);
        self.down.apply(gated, out);
        workspace.release(gate_up);
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>> {
        Ok(Box::new(crate::cuda::Mlp::new(self, to)?))
    }
}
