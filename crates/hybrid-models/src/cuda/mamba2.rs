//! Mamba-2's mixer on the device.

use super::conv::Conv;
use super::device_context::DeviceContext;
use super::gated_norm::GatedNorm;
use super::linear::Linear;
use super::ssd::Ssd;
use super::{Carried, Input, Mixer, arrays};
use crate::mamba2::{Mamba2 as Host, Mamba2Shape};
use candle_core::Tensor;
use longctx_core::Result;

#[derive(Debug)]
pub struct Mamba2 {
    shape: Mamba2Shape,
    project_in: Linear,
    conv: Conv,
    ssd: Ssd,
    norm: GatedNorm,
    project_out: Linear,
}

impl Mamba2 {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        Ok(Self {
            shape: host.shape,
            project_in: Linear::new(&host.project_in, to)?,
            conv: Conv::new(&host.conv, to)?,
            ssd: Ssd::new(&host.ssd, to)?,
            norm: GatedNorm::new(&host.norm, host.shape.groups, host.shape.norm_eps, to)?,
            project_out: Linear::new(&host.project_out, to)?,
        })
    }
}

impl Mixer for Mamba2 {
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let [conv, ssm] = arrays(state)?;
        let (inner, convolved) = (self.shape.inner(), self.shape.convolved());
        let projected = self.project_in.apply(x.x)?;
        let mixed = self.conv.apply(&projected.narrow(1, inner, convolved)?, x.batch, conv)?;
        let steps = projected.narrow(1, inner + convolved, self.shape.heads)?;
        let y = self.ssd.apply(&mixed, &steps, x.batch, ssm)?;
        self.project_out.apply(&self.norm.apply(&y, &projected.narrow(1, 0, inner)?)?)
    }
}
