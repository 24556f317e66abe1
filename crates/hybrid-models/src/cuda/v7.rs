//! RWKV-7's time mixing on the device.

use super::shift::{Shift, differences};
use super::target::{Batched, GroupNorm, Linear, Target};
use super::wkv::Wkv7;
use super::{Carried, Input, Mixer};
use crate::rwkv::{GROUP_EPS, LowRank as HostLowRank, V7 as Host};
use candle_core::{DType, Tensor};
use candle_nn::ops::sigmoid;
use longctx_core::Result;

#[derive(Debug)]
pub struct V7 {
    heads: usize,
    /// Of receptance, key, value, decay, rate and gate.
    shift: Shift,
    /// Of receptance, key and value.
    maps: Batched,
    decay: LowRank,
    rate: LowRank,
    gate: LowRank,
    /// How much of the first layer's values comes in, and a bias; `None` in the first layer.
    first_values: Option<(LowRank, Tensor)>,
    wkv: Wkv7,
    group_norm: GroupNorm,
    output: Linear,
    dtype: DType,
}

/// `W₂ f(W₁ x)`.
#[derive(Debug)]
struct LowRank {
    first: Linear,
    second: Linear,
}

impl LowRank {
    fn new(host: &HostLowRank, to: &Target) -> Result<Self> {
        Ok(Self { first: to.matrix(&host.first)?, second: to.matrix(&host.second)? })
    }

    fn apply(
        &self,
        x: &Tensor,
        f: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        self.second.apply(&f(&self.first.apply(x)?)?)
    }
}

/// The function between the two matrices, where there is none.
fn same(x: &Tensor) -> candle_core::Result<Tensor> {
    Ok(x.clone())
}

impl V7 {
    pub fn new(host: &Host, to: &Target) -> Result<Self> {
        let [r, w, k, v, a, g] = host.mixes.as_slice() else {
            unreachable!("the host's mixer has six")
        };
        let (weight, bias) = &host.group_norm;
        let with_bias = |map: &HostLowRank| -> Result<_> {
            Ok((LowRank::new(map, to)?, to.vector(&map.bias)?))
        };
        Ok(Self {
            heads: host.heads,
            shift: Shift::new([r, k, v, w, a, g], to)?,
            maps: to.batched([&host.receptance, &host.key, &host.value])?,
            decay: LowRank::new(&host.decay, to)?,
            rate: LowRank::new(&host.rate, to)?,
            gate: LowRank::new(&host.gate, to)?,
            first_values: host.first_values.as_ref().map(with_bias).transpose()?,
            wkv: Wkv7::new(host, to)?,
            group_norm: GroupNorm::new(to, weight, bias, host.head_dim, GROUP_EPS)?,
            output: to.matrix(&host.output)?,
            dtype: to.dtype,
        })
    }

    /// The values, with some of the first layer's mixed in; the first layer leaves its own for the others.
    fn values(&self, v: Tensor, mixed: &Tensor, carried: &mut Carried) -> Result<Tensor> {
        match (&self.first_values, &carried.first_values) {
            (Some((share, bias)), Some(first)) => {
                let share = share.apply(mixed, same)?.to_dtype(DType::F32)?.broadcast_add(bias)?;
                let share = sigmoid(&share)?.to_dtype(self.dtype)?;
                Ok((&v + ((first - &v)? * share)?)?)
            }
            _ => {
                carried.first_values = Some(v.clone());
                Ok(v)
            }
        }
    }

    /// The values of each head in its share, in f32.
    fn own(&self, v: &Tensor, shares: &Tensor) -> Result<Tensor> {
        let by_head = v.to_dtype(DType::F32)?.reshape((v.dim(0)?, self.heads, ()))?;
        Ok(by_head.broadcast_mul(&shares.unsqueeze(2)?)?.reshape(v.shape())?)
    }
}

impl Mixer for V7 {
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], carried: &mut Carried) -> Result<Tensor> {
        let [shift, wkv] = state else { unreachable!("the host's mixer has these arrays") };
        let differences = differences(&x, shift)?;
        let mixed = self.shift.apply(x.x, &differences)?.to_dtype(self.dtype)?;
        let maps = self.maps.apply(&mixed.narrow(0, 0, self.maps.count())?)?;
        let (r, k) = (maps.get(0)?, maps.get(1)?);
        let v = self.values(maps.get(2)?, &mixed.get(2)?, carried)?;
        let w = self.decay.apply(&mixed.get(3)?, Tensor::tanh)?;
        let a = self.rate.apply(&mixed.get(4)?, same)?;
        let gate = self.gate.apply(&mixed.get(5)?, sigmoid)?;
        let (y, shares) = self.wkv.apply([&r, &k, &v, &w, &a], x.batch, wkv)?;
        let y = self.group_norm.apply(&y.to_dtype(DType::F32)?)?;
        let y = (y + self.own(&v, &shares)?)?.to_dtype(self.dtype)?;
        self.output.apply(&(y * gate)?)
    }
}
