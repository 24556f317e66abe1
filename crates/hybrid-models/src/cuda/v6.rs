//! RWKV-6's time mixing on the device.

use super::shift::{Shift, differences};
use super::target::{Batched, GroupNorm, Linear, Target};
use super::wkv::Wkv;
use super::{Carried, Input, Mixer};
use crate::rwkv::{GROUP_EPS, V6 as Host};
use candle_core::{DType, Tensor};
use longctx_core::Result;

#[derive(Debug)]
pub struct V6 {
    /// Of what the other shifts are computed from.
    shift_mix: Shift,
    shift_in: Linear,
    shift_out: Batched,
    /// Of decay, key, value, receptance and gate.
    shift: Shift,
    decay_in: Linear,
    decay_out: Linear,
    /// Of key, value, receptance and gate.
    maps: Batched,
    wkv: Wkv,
    group_norm: GroupNorm,
    output: Linear,
    dtype: DType,
}

impl V6 {
    pub fn new(host: &Host, to: &Target) -> Result<Self> {
        let (weight, bias) = &host.group_norm;
        Ok(Self {
            shift_mix: Shift::new([&host.shift_mix], to)?,
            shift_in: to.matrix(&host.shift_in)?,
            shift_out: to.batched(&host.shift_out)?,
            shift: Shift::new(&host.mixes, to)?,
            decay_in: to.matrix(&host.decay_in)?,
            decay_out: to.matrix(&host.decay_out)?,
            maps: to.batched(&host.maps)?,
            wkv: Wkv::new("wkv6", &host.decay, &host.own, host.head_dim, to)?,
            group_norm: GroupNorm::new(to, weight, bias, host.head_dim, GROUP_EPS)?,
            output: to.matrix(&host.output)?,
            dtype: to.dtype,
        })
    }

    /// The five mixes `[5, rows, hidden]`, by weights that depend on the rows.
    fn mixes(&self, x: &Tensor, differences: &Tensor) -> Result<Tensor> {
        let mixed = self.shift_mix.apply(x, differences)?.get(0)?;
        let bottlenecks = self.shift_in.apply(&mixed.to_dtype(self.dtype)?)?.tanh()?;
        let (rows, mixes) = (x.dim(0)?, self.shift_out.count());
        let bottlenecks = bottlenecks.reshape((rows, mixes, ()))?.transpose(0, 1)?;
        let more = self.shift_out.apply(&bottlenecks.contiguous()?)?.to_dtype(DType::F32)?;
        Ok(self.shift.apply_with(x, differences, &more)?.to_dtype(self.dtype)?)
    }
}

impl Mixer for V6 {
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], _: &mut Carried) -> Result<Tensor> {
        let [shift, wkv] = state else { unreachable!("the host's mixer has these arrays") };
        let differences = differences(&x, shift)?;
        let mixed = self.mixes(x.x, &differences)?;
        let decays = self.decay_out.apply(&self.decay_in.apply(&mixed.get(0)?)?.tanh()?)?;
        let maps = self.maps.apply(&mixed.narrow(0, 1, self.maps.count())?)?;
        let [k, v, r, gate] = [0, 1, 2, 3].map(|i| maps.get(i));
        let y = self.wkv.apply([&r?, &k?, &v?], Some(&decays), x.batch, wkv)?;
        let y = self.group_norm.apply(&y.to_dtype(DType::F32)?)?.to_dtype(self.dtype)?;
        self.output.apply(&(y * gate?.silu()?)?)
    }
}
