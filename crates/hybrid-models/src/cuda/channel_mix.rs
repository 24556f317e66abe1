//! RWKV's feed-forward block on the device.

use super::shift::{Shift, differences};
use super::target::{Linear, Target};
use super::{Carried, Input, Mixer};
use crate::rwkv::ChannelMix as Host;
use candle_core::{DType, Tensor};
use longctx_core::Result;

#[derive(Debug)]
pub struct ChannelMix {
    /// Of key and receptance.
    shift: Shift,
    key: Linear,
    value: Linear,
    receptance: Option<Linear>,
    dtype: DType,
}

impl ChannelMix {
    pub fn new(host: &Host, to: &Target) -> Result<Self> {
        let receptance = host.receptance.as_ref();
        let mixes = std::iter::once(&host.key_mix).chain(receptance.map(|(mix, _)| mix));
        Ok(Self {
            shift: Shift::new(mixes, to)?,
            key: to.matrix(&host.key)?,
            value: to.matrix(&host.value)?,
            receptance: receptance.map(|(_, matrix)| to.matrix(matrix)).transpose()?,
            dtype: to.dtype,
        })
    }
}

impl Mixer for ChannelMix {
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let differences = differences(&x, &mut state[0])?;
        let mixed = self.shift.apply(x.x, &differences)?.to_dtype(self.dtype)?;
        let keys = self.key.apply(&mixed.get(0)?)?.relu()?.sqr()?;
        let values = self.value.apply(&keys)?;
        match &self.receptance {
            None => Ok(values),
            Some(receptance) => {
                let share = candle_nn::ops::sigmoid(&receptance.apply(&mixed.get(1)?)?)?;
                Ok((share * values)?)
            }
        }
    }
}
