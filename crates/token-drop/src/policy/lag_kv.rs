//! LagKV: Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are
//! Important", arXiv 2504.04704.

use crate::{Budget, EvictionPolicy, LayerView, Needs, PolicyCache, Protected, Settings};
use candle_core::{D, DType, Tensor};
use longctx_core::{Error, KvStore, LayerSpec, Result};

#[cfg(feature = "cuda")]
mod on_device;

/// Keeps the tokens whose keys and values vary the most relative to the range of the tokens one lag
/// later. It reads no attention.
///
/// The tokens after the sinks are divided into partitions of the lag's length. Each partition is
/// scored against the next, and tokens compete within their partition. The last whole partition and
/// the remainder have no successor and are kept, within the budget. Texts shorter than two
/// partitions keep their newest tokens.
#[derive(Debug, Clone, Copy)]
pub struct LagKv {
    sinks: usize,
    lag: usize,
}

impl LagKv {
    /// Creates the policy: the first `sinks` tokens are kept (4 in kvpress), and partitions have
    /// `lag` tokens (128 in kvpress).
    ///
    /// # Errors
    /// [`Error::Setting`] if the lag is 0.
    pub fn new(sinks: usize, lag: usize) -> Result<Self> {
        if lag == 0 {
            return Err(Error::setting("lag", "at least 1 token", 0));
        }
        Ok(Self { sinks, lag })
    }
}

impl EvictionPolicy for LagKv {
    fn needs(&self) -> Needs {
        Needs { keys: true, values: true, ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        let (len, keys) = (view.entries, view.keys()?);
        let (heads, device) = (view.kv_heads.len(), keys.device());
        if len < self.sinks + 2 * self.lag {
            let after = len.saturating_sub(self.sinks);
            let newer = (0..after).map(|i| i as f32 / after as f32);
            let scores: Vec<f32> = std::iter::repeat_n(1.0, len - after).chain(newer).collect();
            return Ok(Tensor::from_vec(scores.repeat(heads), (heads, len), device)?);
        }
        let scored = (len - self.sinks) / self.lag - 1;
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = device {
            return on_device::score(device, keys, view.values()?, self, scored);
        }
        let spread = |x: &Tensor| -> Result<Tensor> {
            // Partitions `[kv_heads, scored + 1, lag, channels]`.
            let x = x.narrow(1, self.sinks, (scored + 1) * self.lag)?;
            let x = x.reshape((heads, scored + 1, self.lag, ()))?;
            let spread = relative_spread(&x.narrow(1, 0, scored)?, &x.narrow(1, 1, scored)?)?;
            Ok(candle_nn::ops::softmax(&spread, D::Minus1)?)
        };
        let both = (spread(keys)? + spread(view.values()?)?)?;
        // The rank of each token within its partition, by spread.
        let ranks = both.arg_sort_last_dim(true)?.arg_sort_last_dim(true)?;
        let ranks = (ranks.flatten_from(1)?.to_dtype(DType::F32)? / self.lag as f64)?;
        let ones = |n: usize| Tensor::ones((heads, n), DType::F32, device);
        let rest = ones(len - self.sinks - scored * self.lag)?;
        Ok(match self.sinks {
            0 => Tensor::cat(&[&ranks, &rest], 1)?,
            sinks => Tensor::cat(&[&ones(sinks)?, &ranks, &rest], 1)?,
        })
    }
}

impl<S: KvStore> PolicyCache<S, LagKv> {
    /// LagKV; sinks are kept.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn lag_kv(spec: LayerSpec, store: S, policy: LagKv, budget: Budget) -> Result<Self> {
        let protected = Protected::sinks(policy.sinks);
        Self::with_settings(spec, store, policy, Settings { protected, ..Settings::new(budget) })
    }
}

/// Returns, for each row of `[kv_heads, partitions, rows, channels]`, the standard deviation over
/// the channels after each channel is scaled to its range in the partition's reference rows. A
/// range of zero width gives 0.
fn relative_spread(rows: &Tensor, reference: &Tensor) -> Result<Tensor> {
    let (low, high) = (reference.min_keepdim(2)?, reference.max_keepdim(2)?);
    let range = (high - &low)?;
    let width = range.gt(0f32)?.to_dtype(DType::F32)?;
    // A range of zero width has a factor of zero.
    let range = (range + (1.0 - &width)?)?;
    let scaled = rows.broadcast_sub(&low)?.broadcast_mul(&(width / range)?)?;
    Ok(scaled.var(D::Minus1)?.sqrt()?)
}

#[cfg(test)]
mod tests {
    use super::relative_spread;
    use candle_core::{Device, Tensor};

    #[test]
    fn spreads_are_relative_to_the_reference_and_a_constant_channel_does_not_count() {
        let rows = |x: [f32; 6]| Tensor::from_slice(&x, (1, 1, 2, 3), &Device::Cpu).unwrap();
        let reference = rows([0.0, 7.0, 1.0, 2.0, 7.0, 5.0]);
        // Scaled: (0, 0, 1) and (0.5, 0, 0.5).
        let spread = relative_spread(&rows([0.0, 9.0, 5.0, 1.0, 1.0, 3.0]), &reference).unwrap();
        let spread = spread.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!((spread[0] - (1.0f32 / 3.0).sqrt()).abs() < 1e-6);
        assert!((spread[1] - (1.0f32 / 12.0).sqrt()).abs() < 1e-6);
    }
}
