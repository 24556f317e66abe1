//! Selection of entries by their scores on a CUDA device.

use crate::{Result, Selection};
use candle_core::Tensor;

/// Selects the `count` entries with the highest scores of each kv head, without waiting for the
/// device. The first `sinks` and the last `recent` entries are always selected. Of equal scores the
/// older entry is selected; NaN counts as -inf. `scores`: `[kv_heads, entries]`, f32. Returns
/// `None` if the scores are not on a CUDA device; then select on the host.
///
/// # Errors
/// [`Error::Mismatch`](crate::Error::Mismatch) if there are fewer than `count` entries.
pub fn top_entries(
    scores: &Tensor,
    count: usize,
    sinks: usize,
    recent: usize,
) -> Result<Option<Selection>> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = scores.device() {
        return on_device::top_entries(device, scores, count, sinks, recent).map(Some);
    }
    let _ = (scores, count, sinks, recent);
    Ok(None)
}

/// Gathers values `[kv_heads, len]`, u32 or f32, by a selection on the same CUDA device. Entries
/// from `len` on have the values `next`, `next + 1`, and so on. Returns `None` if values and
/// selection are not on one CUDA device.
///
/// # Errors
/// [`Error::Mismatch`](crate::Error::Mismatch) if the numbers of heads differ, or for another
/// dtype.
pub fn gather_entries(values: &Tensor, keep: &Selection, next: u32) -> Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    if let (candle_core::Device::Cuda(device), Some(entries)) = (values.device(), keep.entries()) {
        return on_device::gather_entries(device, values, entries, next).map(Some);
    }
    let _ = (values, keep, next);
    Ok(None)
}

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod on_device {
    use crate::cuda::address;
    use crate::{Error, Result, Selection};
    use candle_core::{CudaDevice, DType, Tensor};
    use longctx_kernels::{GatherArgs, TopArgs, gather, top};

    pub fn top_entries(
        device: &CudaDevice,
        scores: &Tensor,
        count: usize,
        sinks: usize,
        recent: usize,
    ) -> Result<Selection> {
        let (heads, len) = scores.dims2()?;
        if count > len {
            return Err(Error::mismatch("entries to select", format!("at most {len}"), count));
        }
        let scores = scores.to_dtype(DType::F32)?.contiguous()?;
        // SAFETY: the kernel writes every element.
        let out = unsafe { Tensor::empty((heads, count), DType::U32, scores.device()) }?;
        if out.elem_count() == 0 {
            return Selection::on_device(&out);
        }
        let sinks = sinks.min(count);
        let args = TopArgs {
            scores: address(&scores)?,
            out: address(&out)?,
            len: len as i32,
            count: count as i32,
            sinks: sinks as i32,
            recent: recent.min(count - sinks) as i32,
        };
        // SAFETY: the arrays have these sizes, and the stream frees no memory before the launch has
        // used it.
        unsafe { top(&device.cuda_stream(), heads, &args) }?;
        Selection::on_device(&out)
    }

    pub fn gather_entries(
        device: &CudaDevice,
        values: &Tensor,
        entries: &Tensor,
        next: u32,
    ) -> Result<Tensor> {
        let ((heads, len), (rows, count)) = (values.dims2()?, entries.dims2()?);
        if rows != heads || !matches!(values.dtype(), DType::U32 | DType::F32) {
            let expected = format!("u32 or f32 [{rows}, entries]");
            let got = format!("{:?} {:?}", values.dtype(), values.dims());
            return Err(Error::mismatch("values to gather", expected, got));
        }
        let values = values.contiguous()?;
        // SAFETY: the kernel writes every element.
        let out = unsafe { Tensor::empty((heads, count), values.dtype(), values.device()) }?;
        if out.elem_count() == 0 {
            return Ok(out);
        }
        let args = GatherArgs {
            from: if len == 0 { 0 } else { address(&values)? },
            entries: address(entries)?,
            out: address(&out)?,
            len: len as i32,
            count: count as i32,
            next,
            unused: 0,
        };
        // SAFETY: as above; the kernel reads no element past a row.
        unsafe { gather(&device.cuda_stream(), heads, &args) }?;
        Ok(out)
    }
}
