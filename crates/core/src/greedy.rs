//! Greedy sampling for a batch.

#[cfg(feature = "cuda")]
mod cuda;

use std::marker::PhantomData;

use crate::{Error, Result, Sampler, Sampling};
use candle_core::{D, DType, Tensor};

/// Chooses each sequence's most probable token; ties go to the lowest id.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use longctx_core::Greedy;
///
/// let logits = Tensor::new(&[[0.5f32, 2.0, 1.0], [3.0, 3.0, 1.0]], &Device::Cpu)?;
/// let tokens = Greedy::default().choose(&logits)?.into_iter().collect::<Result<Vec<_>, _>>()?;
/// assert_eq!(tokens, [1, 0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct Greedy {
    /// 0 to the vocabulary's size, on the logits' device.
    ids: Option<Tensor>,
    /// Memory that a CUDA device copies the tokens to.
    #[cfg(feature = "cuda")]
    host: Option<cuda::HostTokens>,
}

/// Tokens that a device may still be choosing.
#[derive(Debug)]
pub struct PendingTokens<'a>(Pending<'a>);

#[derive(Debug)]
enum Pending<'a> {
    Ready(Vec<Result<u32>>, PhantomData<&'a ()>),
    #[cfg(feature = "cuda")]
    OnDevice(cuda::TokenCopy<'a>),
}

impl PendingTokens<'_> {
    /// Waits for the tokens. Returns an error for a sequence with NaN.
    ///
    /// # Errors
    /// An error of the CUDA driver.
    pub fn wait(self) -> Result<Vec<Result<u32>>> {
        match self.0 {
            Pending::Ready(tokens, _) => Ok(tokens),
            #[cfg(feature = "cuda")]
            Pending::OnDevice(copy) => copy.wait(),
        }
    }
}

impl Greedy {
    /// Returns the tokens for f32 logits `[sequences, vocab]`; an error for a sequence with NaN.
    ///
    /// On other devices than the CPU, logits are not copied to the host: for a large vocabulary the
    /// copy takes longer than the step.
    ///
    /// # Errors
    /// If the logits are not f32 of two dimensions; an error of the CUDA driver.
    pub fn choose(&mut self, logits: &Tensor) -> Result<Vec<Result<u32>>> {
        self.start(logits)?.wait()
    }

    /// As [`choose`](Self::choose), but does not wait for a CUDA device.
    ///
    /// # Errors
    /// As [`choose`](Self::choose).
    pub fn start(&mut self, logits: &Tensor) -> Result<PendingTokens<'_>> {
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = logits.device() {
            let copy = cuda::start(&mut self.host, device, logits)?;
            return Ok(PendingTokens(Pending::OnDevice(copy)));
        }
        let tokens = match logits.device().is_cpu() {
            true => {
                let mut sampler = Sampler::new(Sampling::Greedy)?;
                logits.to_vec2::<f32>()?.iter().map(|row| sampler.sample(row)).collect()
            }
            false => self.choose_on_device(logits)?,
        };
        Ok(PendingTokens(Pending::Ready(tokens, PhantomData)))
    }

    fn choose_on_device(&mut self, logits: &Tensor) -> Result<Vec<Result<u32>>> {
        let vocab = logits.dim(D::Minus1)?;
        let ids = match self.ids.take() {
            Some(ids) if ids.dim(D::Minus1)? == vocab => ids,
            // f32 holds every id below 2^24.
            _ => Tensor::arange(0f32, vocab as f32, logits.device())?.unsqueeze(0)?,
        };
        let first = logits.broadcast_eq(&logits.max_keepdim(D::Minus1)?)?;
        let others = Tensor::full(vocab as f32, logits.shape(), logits.device())?;
        let first = first.where_cond(&ids.broadcast_as(logits.shape())?, &others)?;
        let first = first.min(D::Minus1)?.to_dtype(DType::U32)?.to_vec1::<u32>()?;
        // A NaN in a row makes its sum NaN.
        let sums = logits.sum(D::Minus1)?.to_vec1::<f32>()?;
        self.ids = Some(ids);
        let checked = |(token, sum): (u32, f32)| match sum.is_nan() || token as usize >= vocab {
            true => Err(nan_on_device()),
            false => Ok(token),
        };
        Ok(first.into_iter().zip(sums).map(checked).collect())
    }
}

fn nan_on_device() -> Error {
    let position = "on the device".into();
    Error::NotFinite { what: "logits".into(), value: f32::NAN, position }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Logits of a few distinct values, so that most rows have ties.
    #[test]
    fn the_device_chooses_as_the_sampler_does() {
        let mut greedy = Greedy::default();
        for vocab in [1, 7, 300] {
            let logits = Tensor::randn(0f32, 1.0, (40, vocab), &Device::Cpu).unwrap();
            // Adding 0 leaves no negative zero, which the sampler puts below 0.
            let logits = (logits.round().unwrap() + 0.0).unwrap();
            let tokens = |chosen: Vec<Result<u32>>| -> Vec<u32> {
                chosen.into_iter().map(Result::unwrap).collect()
            };
            let on_device = tokens(greedy.choose_on_device(&logits).unwrap());
            assert_eq!(on_device, tokens(greedy.choose(&logits).unwrap()));
        }
    }

    #[test]
    fn a_nan_is_an_error_of_its_sequence_only() {
        let rows = [[0f32, 1.0, 2.0], [3.0, f32::NAN, 2.0], [5.0, 4.0, f32::NEG_INFINITY]];
        let logits = Tensor::new(&rows, &Device::Cpu).unwrap();
        let mut greedy = Greedy::default();
        for chosen in [greedy.choose(&logits).unwrap(), greedy.choose_on_device(&logits).unwrap()] {
            assert_eq!((chosen[0].as_ref().unwrap(), chosen[2].as_ref().unwrap()), (&2, &0));
            assert!(matches!(chosen[1], Err(Error::NotFinite { .. })));
        }
    }
}
