//! The feed-forward block with a gate, on the device.

use super::target::{Linear, Target};
use super::{Carried, Input, Mixer};
use crate::gated_mlp::{Gate, GatedMlp};
use candle_core::{DType, Tensor};
use longctx_core::Result;

#[derive(Debug)]
pub struct Mlp {
    inner: usize,
    gate: Gate,
    gate_up: Linear,
    down: Linear,
    dtype: DType,
}

impl Mlp {
    pub fn new(host: &GatedMlp, to: &Target) -> Result<Self> {
        let (gate_up, down) = (to.linear(&host.gate_up)?, to.linear(&host.down)?);
        Ok(Self { inner: host.inner, gate: host.gate, gate_up, down, dtype: to.dtype })
    }
}

impl Mixer for Mlp {
    fn forward(&self, x: Input<'_>, _: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let gate_up = self.gate_up.apply(&x.x.to_dtype(self.dtype)?)?;
        let gate = gate_up.narrow(1, 0, self.inner)?;
        let gate = match self.gate {
            Gate::Gelu => gate.gelu()?,
            Gate::Silu => gate.silu()?,
        };
        self.down.apply(&(gate * gate_up.narrow(1, self.inner, self.inner)?)?)
    }
}
