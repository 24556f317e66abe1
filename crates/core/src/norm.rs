//! Residual addition and RMS norm.

use crate::{Error, Result};
use candle_core::Tensor;
use candle_nn::ops::rms_norm;

/// Returns the sum of two activations `[tokens, channels]`, and its root-mean-square norm times
/// `weights` `[channels]`. Without `y` the sum is `x`.
///
/// f16 and bf16 on CUDA use one kernel. Elsewhere the function uses candle's operations.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let y = Tensor::new(&[[2f32, 2.]], &Device::Cpu)?;
/// let weights = Tensor::new(&[1f32, 10.], &Device::Cpu)?;
/// let (sum, normed) = longctx_core::add_rms_norm(&x, Some(&y), &weights, 0.0)?;
/// assert_eq!(sum.to_vec2::<f32>()?, [[3., 4.]]);
/// // The root of the mean square is 5 / √2.
/// let normed = normed.to_vec2::<f32>()?;
/// assert!((normed[0][1] - 8. * 2f32.sqrt()).abs() < 1e-5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`] if the shapes differ; an error of candle.
pub fn add_rms_norm(
    x: &Tensor,
    y: Option<&Tensor>,
    weights: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let (_, channels) = x.dims2()?;
    if let Some(y) = y.filter(|y| y.dims() != x.dims()) {
        return Err(Error::mismatch("y", format!("{:?}", x.dims()), format!("{:?}", y.dims())));
    }
    if weights.dims() != [channels] {
        let got = format!("{:?}", weights.dims());
        return Err(Error::mismatch("weights of a norm", format!("[{channels}]"), got));
    }
    #[cfg(feature = "cuda")]
    if let Some(both) = on_cuda(x, y, weights, eps)? {
        return Ok(both);
    }
    let sum = match y {
        Some(y) => (x + y)?,
        None => x.clone(),
    };
    let normed = rms_norm(&sum.contiguous()?, weights, eps)?;
    Ok((sum, normed))
}

/// Returns `None` for other devices and dtypes, and for rows that are not multiples of 16 bytes.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
fn on_cuda(
    x: &Tensor,
    y: Option<&Tensor>,
    weights: &Tensor,
    eps: f32,
) -> Result<Option<(Tensor, Tensor)>> {
    use crate::cuda::{address, empty, fits_kernel, half_of};
    use candle_core::Device;
    use longctx_kernels::RmsNormArgs;

    let (Device::Cuda(device), Some(half)) = (x.device(), half_of(x)) else { return Ok(None) };
    let (rows, channels) = x.dims2()?;
    let all = [Some(x), y, Some(weights)];
    let fits = |of: &&Tensor| fits_kernel(of, half, x.device());
    if !all.iter().flatten().all(fits) || !channels.is_multiple_of(8) || rows == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel writes every element of both.
    let new = || unsafe { empty((rows, channels), x.dtype(), x.device()) };
    let sum = if y.is_some() { new()? } else { x.clone() };
    let out = new()?;
    let args = RmsNormArgs {
        x: address(x)?,
        y: y.map_or(Ok(0), address)?,
        weight: address(weights)?,
        sum: if y.is_some() { address(&sum)? } else { 0 },
        out: address(&out)?,
        columns: channels as i32,
        eps,
    };
    // SAFETY: the tensors have the shapes in `args`, and the stream frees no memory before this
    // launch has used it.
    unsafe { longctx_kernels::rms_norm(&device.cuda_stream(), half, rows, &args) }?;
    Ok(Some((sum, out)))
}
