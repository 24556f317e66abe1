//! Rotation of f16 and bf16 on a CUDA device, in one kernel that reads strided views in place.
#![allow(unsafe_code)]

use super::Rope;
use crate::Result;
use crate::cuda::{address, half_of};
use candle_core::{Device, Tensor};
use longctx_kernels::{RopeArgs, rope};

/// The kernel's device arrays: positions and frequencies.
#[derive(Debug, Clone)]
pub struct OnDevice {
    host_positions: Vec<i64>,
    positions: Tensor,
    frequencies: Tensor,
}

impl OnDevice {
    fn new(frequencies: &[f64], positions: &[i64], device: &Device) -> Result<Self> {
        Ok(Self {
            host_positions: positions.to_vec(),
            positions: Tensor::new(positions, device)?,
            frequencies: Tensor::new(frequencies, device)?,
        })
    }

    fn serves(&self, positions: &[i64], device: &Device) -> bool {
        self.host_positions == positions && self.positions.device().same_device(device)
    }
}

/// Returns `x` `[tokens, heads, head_dim]` rotated; `None` if the kernel does not support it.
pub fn rotate(of: &Rope, x: &Tensor, positions: &[i64]) -> Result<Option<Tensor>> {
    let (Device::Cuda(device), Some(half)) = (x.device(), half_of(x)) else { return Ok(None) };
    let ((tokens, heads, head_dim), rotary) = (x.dims3()?, of.rotary_dims());
    let starts = [x.layout().start_offset(), x.stride()[0], x.stride()[1], head_dim];
    let eights = starts.iter().all(|n| n.is_multiple_of(8)) && x.stride()[2] == 1;
    if !eights || !rotary.is_multiple_of(16) || rotary > 256 || x.elem_count() == 0 {
        return Ok(None);
    }
    let on_device = {
        let mut last = of.cached_on_device.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*last {
            Some(last) if last.serves(positions, x.device()) => last.clone(),
            _ => last.insert(OnDevice::new(&of.frequencies, positions, x.device())?).clone(),
        }
    };
    // SAFETY: the kernel writes every element.
    let out = unsafe { Tensor::empty((tokens, heads, head_dim), x.dtype(), x.device()) }?;
    let args = RopeArgs {
        x: address(x)?,
        out: address(&out)?,
        positions: address(&on_device.positions)?,
        frequencies: address(&on_device.frequencies)?,
        x_token: x.stride()[0] as i64,
        x_head: x.stride()[1] as i64,
        tokens: tokens as i32,
        heads: heads as i32,
        head_dim: head_dim as i32,
        rotary: rotary as i32,
    };
    // SAFETY: the tensors have the shapes and strides in `args`, and the stream frees no memory
    // before this launch has used it.
    unsafe { rope(&device.cuda_stream(), half, &args) }?;
    Ok(Some(out))
}
