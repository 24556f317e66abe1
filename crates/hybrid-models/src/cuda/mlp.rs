//! The gated feed-forward layer on the device.

use super::device_context::DeviceContext;
use super::gate::{Function, Gate};
use super::linear::Linear;
use super::{Carried, Input, Mixer};
use crate::gated_mlp::{Gate as HostGate, GatedMlp};
use candle_core::Tensor;
use longctx_core::Result;

#[derive(Debug)]
pub struct Mlp {
    inner: usize,
    /// Without bias, which is added together with the gate.
    gate_up: Linear,
    gate: Gate,
    down: Linear,
}

impl Mlp {
    pub fn new(host: &GatedMlp, to: &DeviceContext) -> Result<Self> {
        let function = match host.gate {
            HostGate::Gelu => Function::Gelu,
            HostGate::Silu => Function::Silu,
        };
        let mut gate = Gate::new(function, to)?;
        if let Some(bias) = &host.gate_up.bias {
            let (of_gate, of_up) = bias.split_at(host.inner);
            gate = gate.biased([to.vector(of_gate)?, to.vector(of_up)?]);
        }
        let (gate_up, down) = (Linear::of(&host.gate_up.matrix, to)?, Linear::new(&host.down, to)?);
        Ok(Self { inner: host.inner, gate_up, gate, down })
    }
}

impl Mixer for Mlp {
    fn forward(&self, x: Input<'_>, _: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let gate_up = self.gate_up.apply(x.x)?;
        let [gate, up] = [0, self.inner].map(|start| gate_up.narrow(1, start, self.inner));
        self.down.apply(&self.gate.apply(&gate?, &up?)?)
    }
}
