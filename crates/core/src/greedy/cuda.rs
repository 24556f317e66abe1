//! Greedy sampling on a CUDA device: one kernel, and a copy that the host waits for.
#![allow(unsafe_code)]

use super::nan_on_device;
use crate::cuda::address;
use crate::{Error, Result};
use candle_core::{CudaDevice, DType, Storage, Tensor};
use longctx_cuda::cudarc::driver::{CudaEvent, PinnedHostSlice};
use longctx_kernels::{ArgmaxArgs, argmax};

/// Page-locked memory for tokens.
pub type HostTokens = PinnedHostSlice<u32>;

/// A copy of tokens to the host.
#[derive(Debug)]
pub struct TokenCopy<'a> {
    host: &'a HostTokens,
    rows: usize,
    /// The end of the copy. `host` has an event too, but waiting for that one suspends the thread,
    /// which takes longer.
    done: CudaEvent,
}

impl TokenCopy<'_> {
    pub fn wait(self) -> Result<Vec<Result<u32>>> {
        self.done.synchronize()?;
        let checked = |&token: &u32| match token {
            u32::MAX => Err(nan_on_device()),
            token => Ok(token),
        };
        Ok(self.host.as_slice()?[..self.rows].iter().map(checked).collect())
    }
}

/// Launches the choice of the tokens and their copy to `host`.
pub fn start<'a>(
    host: &'a mut Option<HostTokens>,
    device: &CudaDevice,
    logits: &Tensor,
) -> Result<TokenCopy<'a>> {
    let ((rows, vocab), stream) = (logits.dims2()?, device.cuda_stream());
    if logits.dtype() != DType::F32 {
        return Err(Error::mismatch("dtype of the logits", "f32", logits.dtype().as_str()));
    }
    let fits = |host: &HostTokens| host.len() >= rows && host.context() == stream.context();
    let host = match host.take().filter(fits) {
        Some(held) => host.insert(held),
        // SAFETY: the copy writes the tokens before they are read.
        None => host.insert(unsafe { stream.context().alloc_pinned(rows.max(1)) }?),
    };
    if rows > 0 {
        let logits = logits.contiguous()?;
        // SAFETY: the kernel writes every element.
        let tokens = unsafe { Tensor::empty(rows, DType::U32, logits.device()) }?;
        let args =
            ArgmaxArgs { x: address(&logits)?, out: address(&tokens)?, columns: vocab as i64 };
        // SAFETY: the tensors have the shapes in `args`, and the stream frees no memory before this
        // launch has used it.
        unsafe { argmax(&stream, rows, &args) }?;
        let (storage, _) = tokens.storage_and_layout();
        if let Storage::Cuda(storage) = &*storage {
            stream.memcpy_dtoh(storage.as_cuda_slice::<u32>()?, host)?;
        }
    }
    Ok(TokenCopy { host, rows, done: stream.record_event(None)? })
}
