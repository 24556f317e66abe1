//! The activation of gated feed-forward blocks.

use crate::{Error, Result};
use candle_core::Tensor;

/// `silu(gate) * up` of two `[rows, columns]`, which may be views into one projection.
///
/// f16 and bf16 on a CUDA device go through one kernel, which rounds once.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let gate_up = Tensor::new(&[[1f32, -2., 3., 4.]], &Device::Cpu)?;
/// let y = longctx_core::silu_mul(&gate_up.narrow(1, 0, 2)?, &gate_up.narrow(1, 2, 2)?)?;
/// let y = y.to_vec2::<f32>()?;
/// assert!((y[0][0] - 3. / (1. + (-1f32).exp())).abs() < 1e-6);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`] if the shapes differ or are not of two dimensions.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.rank() != 2 || up.dims() != gate.dims() {
        let expected = format!("[rows, columns], as gate's {:?}", gate.dims());
        return Err(Error::mismatch("up", expected, format!("{:?}", up.dims())));
    }
    #[cfg(feature = "cuda")]
    if let Some(y) = on_cuda(gate, up)? {
        return Ok(y);
    }
    Ok((candle_nn::ops::silu(&gate.contiguous()?)? * up)?)
}

/// `None` for other formats, and for rows that do not begin at multiples of 16 bytes.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
fn on_cuda(gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    use crate::cuda::{Half, SiluMulArgs, address};
    use candle_core::{DType, Device};

    let Device::Cuda(device) = gate.device() else { return Ok(None) };
    let half = match (gate.dtype(), up.dtype()) {
        (DType::F16, DType::F16) => Half::F16,
        (DType::BF16, DType::BF16) => Half::BF16,
        _ => return Ok(None),
    };
    let (rows, columns) = gate.dims2()?;
    let fits = |x: &Tensor| {
        let starts = [columns, x.layout().start_offset(), x.stride()[0]];
        x.stride()[1] == 1 && starts.iter().all(|n| n.is_multiple_of(8))
    };
    if !fits(gate) || !fits(up) {
        return Ok(None);
    }
    // SAFETY: the kernel writes all of it.
    let out = unsafe { Tensor::empty((rows, columns), gate.dtype(), gate.device()) }?;
    let args = SiluMulArgs {
        gate: address(gate)?,
        up: address(up)?,
        out: address(&out)?,
        gate_row: gate.stride()[0] as i64,
        up_row: up.stride()[0] as i64,
        rows: rows as i64,
        columns: columns as i64,
    };
    // SAFETY: the tensors have the shapes and strides that `args` gives, and the device's stream
    // frees no memory before this launch has used it.
    unsafe { crate::cuda::silu_mul(&device.cuda_stream(), half, &args) }?;
    Ok(Some(out))
}
