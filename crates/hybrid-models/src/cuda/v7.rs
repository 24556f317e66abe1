//! RWKV-7's time mixing on the device.

use super::device_context::DeviceContext;
use super::gate::Blend;
use super::head_norm::HeadNorm;
use super::linear::{Batched, Linear};
use super::shift::Shift;
use super::wkv::Wkv7;
use super::{Carried, Input, Mixer, arrays};
use crate::rwkv::{LowRank as HostLowRank, V7 as Host};
use candle_core::Tensor;
use candle_nn::ops::sigmoid;
use longctx_core::Result;

#[derive(Debug)]
pub struct V7 {
    /// Token shift of receptance, key, value, decay, rate and gate.
    shift: Shift,
    /// Projections of receptance, key and value.
    maps: Batched,
    decay: LowRank,
    rate: LowRank,
    gate: LowRank,
    /// The weight of the first layer's values; `None` in the first layer.
    first_values: Option<(LowRank, Blend)>,
    wkv: Wkv7,
    norm: HeadNorm,
    output: Linear,
}

/// A low-rank map `W₂ f(W₁ x)`.
#[derive(Debug)]
struct LowRank {
    first: Linear,
    second: Linear,
}

impl LowRank {
    fn new(host: &HostLowRank, to: &DeviceContext) -> Result<Self> {
        Ok(Self { first: Linear::of(&host.first, to)?, second: Linear::of(&host.second, to)? })
    }

    fn apply(
        &self,
        x: &Tensor,
        f: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        self.second.apply(&f(&self.first.apply(x)?)?)
    }
}

/// The identity, for maps without a function between the two matrices.
fn same(x: &Tensor) -> candle_core::Result<Tensor> {
    Ok(x.clone())
}

impl V7 {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        let [r, w, k, v, a, g] = &host.mixes;
        let blend = |share: &HostLowRank| -> Result<_> {
            Ok((LowRank::new(share, to)?, Blend::new(&share.bias, to)?))
        };
        Ok(Self {
            shift: Shift::new([r, k, v, w, a, g], to)?,
            maps: Batched::new([&host.receptance, &host.key, &host.value], to)?,
            decay: LowRank::new(&host.decay, to)?,
            rate: LowRank::new(&host.rate, to)?,
            gate: LowRank::new(&host.gate, to)?,
            first_values: host.first_values.as_ref().map(blend).transpose()?,
            wkv: Wkv7::new(host, to)?,
            norm: HeadNorm::new(&host.group_norm, host.heads, to)?,
            output: Linear::of(&host.output, to)?,
        })
    }

    /// Returns the values, mixed with those of the first layer. The first layer stores its own for
    /// the others.
    fn values(&self, v: Tensor, mixed: &Tensor, carried: &mut Carried) -> Result<Tensor> {
        match (&self.first_values, carried.first_values.get(&carried.block)) {
            (Some((share, blend)), Some(first)) => {
                blend.apply(&v, first, &share.apply(mixed, same)?)
            }
            _ => {
                carried.first_values.insert(carried.block, v.clone());
                Ok(v)
            }
        }
    }
}

impl Mixer for V7 {
    fn reads_f32(&self) -> bool {
        true
    }

    fn forward(&self, x: Input<'_>, state: &mut [Tensor], carried: &mut Carried) -> Result<Tensor> {
        let [shift, wkv] = arrays(state)?;
        let mixed = self.shift.apply(&x, shift)?;
        let maps = self.maps.apply(&mixed.narrow(0, 0, self.maps.count())?)?;
        let (r, k) = (maps.get(0)?, maps.get(1)?);
        let v = self.values(maps.get(2)?, &mixed.get(2)?, carried)?;
        let w = self.decay.apply(&mixed.get(3)?, Tensor::tanh)?;
        let a = self.rate.apply(&mixed.get(4)?, same)?;
        let gate = self.gate.apply(&mixed.get(5)?, sigmoid)?;
        let (y, bonus) = self.wkv.apply([&r, &k, &v, &w, &a], x.batch, wkv)?;
        self.output.apply(&self.norm.with_bonus(&y, &gate, &v, &bonus)?)
    }
}
