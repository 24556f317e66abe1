//! The rotary position embedding (Su et al., arXiv 2104.09864) and its scalings.

#[cfg(feature = "cuda")]
mod cuda;
mod scaling;

use std::sync::Mutex;

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

pub use scaling::RopeScaling;

/// Rotates queries and keys by their positions. Channel i is paired with channel i + rotary_dims/2
/// (the layout of Hugging Face checkpoints).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use longctx_core::{Rope, RopeScaling};
///
/// let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None)?;
/// let k = Tensor::randn(0f32, 1., (5, 2, 64), &Device::Cpu)?;
/// // Five tokens, three of one sequence and two of another.
/// let rotated = rope.apply(&k, &[100, 101, 102, 7, 8])?;
/// // Rotating back by the same positions restores the keys.
/// let back = rope.apply(&rotated, &[-100, -101, -102, -7, -8])?;
/// let error = (back - k)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(error < 1e-5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Rope {
    head_dim: usize,
    /// One frequency per rotated pair of channels, radians per position.
    frequencies: Vec<f64>,
    /// The cos/sin table of the last call's positions: all layers of a model use the same
    /// positions.
    cached_table: Mutex<Option<Table>>,
    /// The same table for the CUDA kernel.
    #[cfg(feature = "cuda")]
    cached_on_device: Mutex<Option<cuda::OnDevice>>,
}

#[derive(Debug, Clone)]
struct Table {
    positions: Vec<i64>,
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Creates an embedding for heads of `head_dim` channels, of which the first `rotary_dims`
    /// rotate, with base `theta`.
    ///
    /// The rotation preserves norms: the model applies the [attention
    /// factor](RopeScaling::attention_factor) of a scaling itself.
    ///
    /// # Errors
    /// [`Error::Setting`] if `rotary_dims` is odd, zero or above `head_dim`, or a factor is not
    /// positive.
    pub fn new(
        head_dim: usize,
        rotary_dims: usize,
        theta: f64,
        scaling: RopeScaling,
    ) -> Result<Self> {
        if rotary_dims == 0 || rotary_dims > head_dim || !rotary_dims.is_multiple_of(2) {
            let expected = format!("an even number from 2 to head_dim = {head_dim}");
            return Err(Error::setting("rotary_dims", expected, rotary_dims));
        }
        positive("rope theta", theta)?;
        let frequencies = scaling.frequencies(theta, rotary_dims)?;
        Ok(Self::of(head_dim, frequencies))
    }

    /// Creates an embedding with these frequencies, in radians per position, one for each rotated
    /// pair of channels.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there are more frequencies than pairs of channels;
    /// [`Error::Setting`] if one is not finite.
    pub fn with_frequencies(head_dim: usize, frequencies: &[f64]) -> Result<Self> {
        if 2 * frequencies.len() > head_dim {
            let expected = format!("at most {} of them", head_dim / 2);
            return Err(Error::mismatch("frequencies", expected, frequencies.len()));
        }
        match frequencies.iter().find(|frequency| !frequency.is_finite()) {
            Some(bad) => Err(Error::setting("frequency", "a finite number", bad)),
            None => Ok(Self::of(head_dim, frequencies.to_vec())),
        }
    }

    fn of(head_dim: usize, frequencies: Vec<f64>) -> Self {
        Self {
            head_dim,
            frequencies,
            cached_table: Mutex::new(None),
            #[cfg(feature = "cuda")]
            cached_on_device: Mutex::new(None),
        }
    }

    /// Divides each frequency by its own factor, as the GGUF files of Llama 3.1 and similar models
    /// specify it.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless there is one factor per rotated pair of channels;
    /// [`Error::Setting`] if one is not positive.
    pub fn with_factors(self, factors: &[f64]) -> Result<Self> {
        Ok(Self::of(self.head_dim, scaling::divide(self.frequencies, factors)?))
    }

    /// Creates an embedding without rotation, for layers without positions whose caches may move
    /// keys.
    pub fn identity(head_dim: usize) -> Self {
        Self::of(head_dim, Vec::new())
    }

    /// Returns the number of channels of a head that rotate.
    pub fn rotary_dims(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Returns whether there is a CUDA kernel for the rotation of f16 and bf16 heads.
    pub fn has_cuda_kernel(&self) -> bool {
        self.rotary_dims().is_multiple_of(16) && self.rotary_dims() <= 256
    }

    /// Returns radians per position, one for each rotated pair of channels, including scaling.
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// Rotates token i of `x` (`[tokens, heads, head_dim]`) by `positions[i]`. Rotations add up: to
    /// move a rotated key to another position, rotate it by the difference, which may be negative.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if `x` has another shape or there is not one position per token.
    pub fn apply(&self, x: &Tensor, positions: &[i64]) -> Result<Tensor> {
        self.check(x, positions)?;
        if self.frequencies.is_empty() {
            return Ok(x.clone());
        }
        #[cfg(feature = "cuda")]
        if let Some([rotated]) = cuda::rotate(self, [x], cuda::Positions::OnHost(positions))? {
            return Ok(rotated);
        }
        let (cos, sin) = self.table(positions, x.dtype(), x.device())?;
        self.rotate(x, &cos, &sin)
    }

    /// Rotates queries and keys of the same tokens, as [`apply`](Self::apply). On a CUDA device one
    /// kernel rotates both.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn apply_both(
        &self,
        q: &Tensor,
        k: &Tensor,
        positions: &[i64],
    ) -> Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        if !self.frequencies.is_empty() {
            self.check(q, positions)?;
            self.check(k, positions)?;
            let positions = cuda::Positions::OnHost(positions);
            if let Some([q, k]) = cuda::rotate(self, [q, k], positions)? {
                return Ok((q, k));
            }
        }
        Ok((self.apply(q, positions)?, self.apply(k, positions)?))
    }

    /// As [`apply_both`](Self::apply_both), with positions (i64, one per token) at a device address.
    #[cfg(feature = "cuda")]
    pub(crate) fn apply_both_at(
        &self,
        q: &Tensor,
        k: &Tensor,
        positions: u64,
    ) -> Result<(Tensor, Tensor)> {
        if self.frequencies.is_empty() {
            return Ok((q.clone(), k.clone()));
        }
        match cuda::rotate(self, [q, k], cuda::Positions::OnDevice(positions))? {
            Some([q, k]) => Ok((q, k)),
            None => {
                let what = format!("a captured rotation of {:?} by {self:?}", q.dims());
                Err(Error::Unsupported(what))
            }
        }
    }

    fn check(&self, x: &Tensor, positions: &[i64]) -> Result<()> {
        let tokens = match x.dims() {
            &[tokens, _, d] if d == self.head_dim => tokens,
            dims => {
                let expected = format!("[tokens, heads, {}]", self.head_dim);
                let what = "input of the rotary embedding";
                return Err(Error::mismatch(what, expected, format!("{dims:?}")));
            }
        };
        if positions.len() != tokens {
            return Err(Error::mismatch("positions", format!("{tokens} of them"), positions.len()));
        }
        Ok(())
    }

    fn table(&self, positions: &[i64], dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        let mut cached_table =
            self.cached_table.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(t) = &*cached_table
            && t.positions == positions
            && t.cos.dtype() == dtype
            && t.cos.device().same_device(device)
        {
            return Ok((t.cos.clone(), t.sin.clone()));
        }
        let (cos, sin) = self.cos_sin(positions, dtype, device)?;
        let positions = positions.to_vec();
        *cached_table = Some(Table { positions, cos: cos.clone(), sin: sin.clone() });
        Ok((cos, sin))
    }

    /// Returns the cosines and sines. Angles are computed in f64: at position 1,000,000 an f32
    /// product would be off by several hundredths of a radian.
    fn cos_sin(
        &self,
        positions: &[i64],
        dtype: DType,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let shape = (positions.len(), self.frequencies.len());
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for &position in positions {
            for frequency in &self.frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        let tensor = |x| -> Result<Tensor> {
            Ok(Tensor::from_vec(x, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)?)
        };
        Ok((tensor(cos)?, tensor(sin)?))
    }

    fn rotate(&self, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        let rotary = self.rotary_dims();
        // Each token is a batch row with its own angles: candle processes rows in parallel on the
        // CPU.
        let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
        let turn = |x: &Tensor| -> Result<Tensor> {
            let x = x.contiguous()?.unsqueeze(1)?;
            Ok(candle_nn::rotary_emb::rope_thd(&x, &cos, &sin)?.squeeze(1)?)
        };
        if rotary == self.head_dim {
            return turn(x);
        }
        let still = x.narrow(2, rotary, self.head_dim - rotary)?;
        Ok(Tensor::cat(&[&turn(&x.narrow(2, 0, rotary)?)?, &still], 2)?)
    }
}

fn positive(name: &str, value: f64) -> Result<f64> {
    if value.is_finite() && value > 0.0 {
        Ok(value)
    } else {
        Err(Error::setting(name, "a positive number", value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(dims: (usize, usize, usize)) -> Tensor {
        Tensor::randn(0f32, 1., dims, &Device::Cpu).unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn scores_depend_only_on_distance() {
        let rope = Rope::new(32, 32, 10_000.0, RopeScaling::None).unwrap();
        let (q, k) = (random((1, 1, 32)), random((1, 1, 32)));
        let score = |at_q, at_k| {
            let (q, k) = (rope.apply(&q, &[at_q]).unwrap(), rope.apply(&k, &[at_k]).unwrap());
            (q * k).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
        };
        assert!((score(7, 3) - score(100_007, 100_003)).abs() < 1e-4);
    }

    #[test]
    fn tokens_of_several_sequences_rotate_each_by_its_own_position() {
        let rope = Rope::new(16, 8, 10_000.0, RopeScaling::Linear(4.0)).unwrap();
        let x = random((4, 3, 16));
        let positions = [9, 10, 0, 500];
        let all = rope.apply(&x, &positions).unwrap();
        for (i, position) in positions.into_iter().enumerate() {
            let one = rope.apply(&x.narrow(0, i, 1).unwrap(), &[position]).unwrap();
            assert_eq!(distance(&all.narrow(0, i, 1).unwrap(), &one), 0.0);
        }
        // Partial rotation: the channels after the first eight stay.
        assert_eq!(distance(&all.narrow(2, 8, 8).unwrap(), &x.narrow(2, 8, 8).unwrap()), 0.0);
        assert!(rope.apply(&x, &[1, 2]).unwrap_err().to_string().contains("positions"));
    }

    #[test]
    fn bad_settings_are_named() {
        let message =
            |dims, theta, scaling| Rope::new(16, dims, theta, scaling).unwrap_err().to_string();
        assert!(message(7, 1e4, RopeScaling::None).contains("rotary_dims"));
        assert!(message(18, 1e4, RopeScaling::None).contains("head_dim = 16"));
        assert!(message(16, -1.0, RopeScaling::None).contains("theta"));
        assert!(message(16, 1e4, RopeScaling::Linear(0.0)).contains("rope factor"));
    }
}
