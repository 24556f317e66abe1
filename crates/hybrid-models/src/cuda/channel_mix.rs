//! RWKV's channel mixing (feed-forward layer) on the device.

use super::device_context::DeviceContext;
use super::gate::{Function, Gate};
use super::linear::Linear;
use super::shift::Shift;
use super::{Carried, Input, Mixer};
use crate::rwkv::ChannelMix as Host;
use candle_core::Tensor;
use longctx_core::Result;

#[derive(Debug)]
pub struct ChannelMix {
    /// Token shift of key and receptance.
    shift: Shift,
    key: Linear,
    /// Multiplied by the key itself: its square.
    relu: Gate,
    value: Linear,
    receptance: Option<(Linear, Gate)>,
}

impl ChannelMix {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        let receptance = host.receptance.as_ref();
        let mixes = std::iter::once(&host.key_mix).chain(receptance.map(|(mix, _)| mix));
        let gated = |matrix| -> Result<_> {
            Ok((Linear::of(matrix, to)?, Gate::new(Function::Sigmoid, to)?))
        };
        Ok(Self {
            shift: Shift::new(mixes, to)?,
            key: Linear::of(&host.key, to)?,
            relu: Gate::new(Function::Relu, to)?,
            value: Linear::of(&host.value, to)?,
            receptance: receptance.map(|(_, matrix)| gated(matrix)).transpose()?,
        })
    }
}

impl Mixer for ChannelMix {
    fn reads_f32(&self) -> bool {
        true
    }

    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let mixed = self.shift.apply(&x, &mut state[0])?;
        let keys = self.key.apply(&mixed.get(0)?)?;
        let values = self.value.apply(&self.relu.apply(&keys, &keys)?)?;
        match &self.receptance {
            None => Ok(values),
            Some((receptance, gate)) => gate.apply(&receptance.apply(&mixed.get(1)?)?, &values),
        }
    }
}
