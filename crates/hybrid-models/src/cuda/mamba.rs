//! Mamba's mixer on the device.

use super::conv::Conv;
use super::device_context::DeviceContext;
use super::linear::Linear;
use super::selective_scan::{Inputs, Scan};
use super::{Carried, Input, Mixer, arrays};
use crate::mamba::{Mamba as Host, MambaShape};
use candle_core::Tensor;
use longctx_core::Result;

#[derive(Debug)]
pub struct Mamba {
    shape: MambaShape,
    project_in: Linear,
    conv: Conv,
    select: Linear,
    time_step: Linear,
    scan: Scan,
    project_out: Linear,
}

impl Mamba {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        Ok(Self {
            shape: host.shape,
            project_in: Linear::new(&host.project_in, to)?,
            conv: Conv::new(&host.conv, to)?,
            select: Linear::of(&host.select, to)?,
            time_step: Linear::of(&host.time_step, to)?,
            scan: Scan::new(host, to)?,
            project_out: Linear::new(&host.project_out, to)?,
        })
    }
}

impl Mixer for Mamba {
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let [conv, ssm] = arrays(state)?;
        let MambaShape { inner, states, rank, .. } = self.shape;
        let projected = self.project_in.apply(x.x)?;
        let u = self.conv.apply(&projected.narrow(1, 0, inner)?, x.batch, conv)?;
        let selected = self.select.apply(&u)?;
        let steps = self.time_step.apply(&selected.narrow(1, 0, rank)?)?;
        let inputs = Inputs {
            u: &u,
            steps: &steps,
            b: &selected.narrow(1, rank, states)?,
            c: &selected.narrow(1, rank + states, states)?,
            gate: &projected.narrow(1, inner, inner)?,
        };
        self.project_out.apply(&self.scan.apply(inputs, x.batch, ssm)?)
    }
}
