//! The activation of gated feed-forward layers.

use crate::attention::simd;
use crate::{Error, Result};
use candle_core::{CpuStorage, Device, Layout, Storage, Tensor};
use rayon::prelude::*;

/// Returns `silu(gate) * up` of two tensors `[rows, columns]`. They may be views into one
/// projection.
///
/// f32 on the CPU, and f16 and bf16 on CUDA, are computed in one pass and rounded once.
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
/// [`Error::Mismatch`] if the shapes differ or are not of two dimensions; an error of candle.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.rank() != 2 || up.dims() != gate.dims() {
        let expected = format!("[rows, columns], as gate's {:?}", gate.dims());
        return Err(Error::mismatch("up", expected, format!("{:?}", up.dims())));
    }
    #[cfg(feature = "cuda")]
    if let Some(y) = on_cuda(gate, up)? {
        return Ok(y);
    }
    if let Some(y) = on_cpu(gate, up)? {
        return Ok(y);
    }
    Ok((candle_nn::ops::silu(&gate.contiguous()?)? * up)?)
}

/// Returns `None` for other devices and dtypes, and for rows that are not contiguous.
fn on_cpu(gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    /// For fewer elements, waking a thread does not pay.
    const MIN_PARALLEL: usize = 1 << 14;
    let ((gates, gate_layout), (ups, up_layout)) =
        (gate.storage_and_layout(), up.storage_and_layout());
    let (Storage::Cpu(gates), Storage::Cpu(ups)) = (&*gates, &*ups) else { return Ok(None) };
    let (CpuStorage::F32(gates), CpuStorage::F32(ups)) = (gates, ups) else { return Ok(None) };
    if gate_layout.stride()[1] != 1 || up_layout.stride()[1] != 1 {
        return Ok(None);
    }
    let (rows, columns) = gate.dims2()?;
    let row = |layout: &Layout, i: usize| layout.start_offset() + i * layout.stride()[0];
    let mut out = vec![0.0; rows * columns];
    let fill = |(i, out): (usize, &mut [f32])| {
        let gate = &gates[row(gate_layout, i)..][..columns];
        simd::silu_mul(gate, &ups[row(up_layout, i)..][..columns], out);
    };
    if out.len() < MIN_PARALLEL {
        out.chunks_exact_mut(columns.max(1)).enumerate().for_each(fill);
    } else {
        out.par_chunks_exact_mut(columns).enumerate().for_each(fill);
    }
    Ok(Some(Tensor::from_vec(out, (rows, columns), &Device::Cpu)?))
}

/// Returns `None` for other devices and dtypes, and for rows that are not aligned to 16 bytes.
#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
fn on_cuda(gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    use crate::cuda::{address, empty, half_of};
    use longctx_kernels::SiluMulArgs;

    let (Device::Cuda(device), Some(half)) = (gate.device(), half_of(gate)) else {
        return Ok(None);
    };
    let (rows, columns) = gate.dims2()?;
    let fits = |x: &Tensor| {
        let starts = [columns, x.layout().start_offset(), x.stride()[0]];
        let aligned = x.stride()[1] == 1 && starts.iter().all(|n| n.is_multiple_of(8));
        half_of(x) == Some(half) && aligned && x.device().same_device(gate.device())
    };
    if !fits(gate) || !fits(up) {
        return Ok(None);
    }
    // SAFETY: the kernel writes every element.
    let out = unsafe { empty((rows, columns), gate.dtype(), gate.device()) }?;
    let args = SiluMulArgs {
        gate: address(gate)?,
        up: address(up)?,
        out: address(&out)?,
        gate_row: gate.stride()[0] as i64,
        up_row: up.stride()[0] as i64,
        rows: rows as i64,
        columns: columns as i64,
    };
    // SAFETY: the tensors have the shapes and strides in `args`, and the stream frees no memory
    // before this launch has used it.
    unsafe { longctx_kernels::silu_mul(&device.cuda_stream(), half, &args) }?;
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_and_large_tensors_equal_candles_operations() {
        for (rows, columns) in [(1, 7), (3, 300), (65, 513)] {
            let x = Tensor::rand(-100f32, 100., (rows, 2 * columns), &Device::Cpu).unwrap();
            let (gate, up) =
                (x.narrow(1, 0, columns).unwrap(), x.narrow(1, columns, columns).unwrap());
            let ours = silu_mul(&gate, &up).unwrap().flatten_all().unwrap();
            let candles = (gate.contiguous().unwrap().silu().unwrap() * up).unwrap();
            let candles = candles.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (a, b) in ours.to_vec1::<f32>().unwrap().into_iter().zip(candles) {
                // Below e^-87 the vectorized exp is zero.
                assert!((a - b).abs() <= 1e-6 * b.abs() + 1e-30, "{a}, not {b}");
            }
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_shown() {
        let silu = |x: f32| {
            let x = Tensor::new(&[[x]], &Device::Cpu).unwrap();
            silu_mul(&x, &x.ones_like().unwrap()).unwrap().to_vec2::<f32>().unwrap()[0][0]
        };
        assert!(silu(f32::NAN).is_nan() && silu(f32::NEG_INFINITY).is_nan());
        assert_eq!(silu(f32::INFINITY), f32::INFINITY);
    }
}
