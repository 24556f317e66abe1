//! Products of activations with weight matrices.

use crate::{Error, Result};
use candle_core::Tensor;

/// Returns `x wᵀ` of activations `[rows, inner]` and a weight matrix `[out, inner]`.
///
/// Up to four rows of f16 or bf16 on CUDA (a decode step) use a matrix-vector kernel that is
/// limited by the bandwidth of reading `w`. All other products are candle's.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
/// let w = Tensor::new(&[[3f32, 4.], [5., 6.], [7., 8.]], &Device::Cpu)?;
/// assert_eq!(longctx_core::linear(&x, &w)?.to_vec2::<f32>()?, [[11., 17., 23.]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`] if the shapes do not match; an error of candle.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let ((_, inner), (out, of)) = (x.dims2()?, w.dims2()?);
    if inner != of {
        return Err(Error::mismatch("columns of x", format!("{of}, as of w [{out}, {of}]"), inner));
    }
    #[cfg(feature = "cuda")]
    if let Some(y) = on_cuda(x, w)? {
        return Ok(y);
    }
    Ok(x.matmul(&w.t()?)?)
}

/// Returns `None` for other devices and dtypes, more rows, and rows that are not multiples of 16
/// bytes.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
fn on_cuda(x: &Tensor, w: &Tensor) -> Result<Option<Tensor>> {
    use crate::cuda::{address, fits_kernel, half_of};
    use candle_core::Device;
    use longctx_kernels::{MAX_ROWS, MatVecArgs, matvec};

    let (Device::Cuda(device), Some(half)) = (x.device(), half_of(x)) else { return Ok(None) };
    let ((rows, inner), out) = (x.dims2()?, w.dim(0)?);
    let fits = |of: &Tensor| fits_kernel(of, half, x.device());
    if !(1..=MAX_ROWS).contains(&rows) || !inner.is_multiple_of(8) || !fits(x) || !fits(w) {
        return Ok(None);
    }
    // SAFETY: the kernel writes every element.
    let y = unsafe { Tensor::empty((rows, out), x.dtype(), x.device()) }?;
    let args = MatVecArgs {
        w: address(w)?,
        x: address(x)?,
        y: address(&y)?,
        inner: inner as i32,
        out: out as i32,
        rows: rows as i32,
        unused: 0,
    };
    // SAFETY: the tensors have the shapes in `args`, and the stream frees no memory before this
    // launch has used it.
    unsafe { matvec(&device.cuda_stream(), half, &args) }?;
    Ok(Some(y))
}
