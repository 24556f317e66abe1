//! Mamba-2's mixer on the device.

use super::conv::Conv;
use super::ssd::Ssd;
use super::target::{Linear, Target};
use super::{Carried, Input, Mixer};
use crate::mamba2::{Mamba2 as Host, Mamba2Shape};
use candle_core::{DType, Tensor};
use longctx_core::Result;

#[derive(Debug)]
pub struct Mamba2 {
    shape: Mamba2Shape,
    project_in: Linear,
    conv: Conv,
    ssd: Ssd,
    norm: Tensor,
    project_out: Linear,
    dtype: DType,
}

impl Mamba2 {
    pub fn new(host: &Host, to: &Target) -> Result<Self> {
        Ok(Self {
            shape: host.shape,
            project_in: to.linear(&host.project_in)?,
            conv: Conv::new(&host.conv, to)?,
            ssd: Ssd::new(&host.ssd, to)?,
            norm: to.vector(&host.norm)?,
            project_out: to.linear(&host.project_out)?,
            dtype: to.dtype,
        })
    }

    /// RMS norm, by groups, of `y silu(gate)`.
    fn gated_norm(&self, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
        let Mamba2Shape { groups, norm_eps, .. } = self.shape;
        let (rows, inner) = y.dims2()?;
        let y = (y.to_dtype(DType::F32)? * gate.to_dtype(DType::F32)?.silu()?)?;
        let grouped = y.reshape((rows * groups, inner / groups))?;
        let ones = self.norm.ones_like()?.narrow(0, 0, inner / groups)?;
        let normed = candle_nn::ops::rms_norm(&grouped, &ones, norm_eps)?;
        let y = normed.reshape((rows, inner))?.broadcast_mul(&self.norm)?;
        Ok(y.to_dtype(self.dtype)?)
    }
}

impl Mixer for Mamba2 {
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let [conv, ssm] = state else { unreachable!("the host's mixer has these arrays") };
        let (inner, convolved) = (self.shape.inner(), self.shape.convolved());
        let projected = self.project_in.apply(&x.x.to_dtype(self.dtype)?)?;
        let mixed = self.conv.apply(&projected.narrow(1, inner, convolved)?, x.batch, conv)?;
        let steps = projected.narrow(1, inner + convolved, self.shape.heads)?;
        let y = self.ssd.apply(&mixed, &steps, x.batch, ssm)?;
        self.project_out.apply(&self.gated_norm(&y, &projected.narrow(1, 0, inner)?)?)
    }
}
