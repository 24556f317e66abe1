//! Products of activations with weight matrices.

use crate::{Error, Result};
use candle_core::Tensor;

/// Returns `x wᵀ` of activations `[rows, inner]` and a weight matrix `[out, inner]`.
///
/// The few rows of a decode step in f16 or bf16 on CUDA use kernels that are limited by the bandwidth
/// of reading `w`: up to 32 rows on compute capability 9.0, up to four on others. All other products
/// are candle's.
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
    use crate::cuda::{address, empty, fits_kernel, half_of};
    use candle_core::Device;
    use longctx_kernels::{
        MAX_ROWS, MAX_SKINNY_ROWS, MatVecArgs, SkinnyGemmArgs, has_skinny_gemm, matvec, skinny_gemm,
    };

    let (Device::Cuda(device), Some(half)) = (x.device(), half_of(x)) else { return Ok(None) };
    let ((rows, inner), out) = (x.dims2()?, w.dim(0)?);
    let fits = |of: &Tensor| fits_kernel(of, half, x.device());
    let stream = device.cuda_stream();
    let skinny = has_skinny_gemm(stream.context())?;
    let most = if skinny { MAX_SKINNY_ROWS } else { MAX_ROWS };
    let sizes = (1..=most).contains(&rows) && inner.is_multiple_of(8) && inner * out > 0;
    if !sizes || !fits(x) || !fits(w) {
        return Ok(None);
    }
    // SAFETY: the kernels write every element.
    let y = unsafe { empty((rows, out), x.dtype(), x.device()) }?;
    let (w, x, to) = (address(w)?, address(x)?, address(&y)?);
    // SAFETY: the tensors have the shapes in the arguments, and the stream frees no memory before
    // this launch has used it.
    unsafe {
        match skinny {
            true => {
                let (gated, prefetch) = (false, false);
                let args = SkinnyGemmArgs { w, x, y: to, inner, out, rows, gated, prefetch };
                skinny_gemm(&stream, half, &args)?;
            }
            false => {
                let (inner, out, rows) = (inner as i32, out as i32, rows as i32);
                let args = MatVecArgs { w, x, y: to, inner, out, rows, unused: 0 };
                matvec(&stream, half, &args)?;
            }
        }
    }
    Ok(Some(y))
}
