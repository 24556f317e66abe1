//! Rotation of f16 and bf16 on a CUDA device, in one kernel that reads strided views in place.
#![allow(unsafe_code)]

use super::Rope;
use crate::Result;
use crate::cuda::{address, half_of};
use candle_core::{Device, Tensor};
use longctx_kernels::{RopeArgs, RopeTensor, rope};

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

/// Returns one or two tensors `[tokens, heads, head_dim]` rotated, in one launch; `None` if the
/// kernel does not support them.
pub fn rotate<const N: usize>(
    of: &Rope,
    tensors: [&Tensor; N],
    positions: &[i64],
) -> Result<Option<[Tensor; N]>> {
    const { assert!(N >= 1 && N <= 2) };
    let first = tensors[0];
    let (Device::Cuda(device), Some(half)) = (first.device(), half_of(first)) else {
        return Ok(None);
    };
    let rotary = of.rotary_dims();
    let fits = |x: &&Tensor| {
        let starts = [x.layout().start_offset(), x.stride()[0], x.stride()[1], x.dims()[2]];
        let in_pieces = starts.iter().all(|n| n.is_multiple_of(8)) && x.stride()[2] == 1;
        in_pieces && x.dtype() == first.dtype() && x.elem_count() > 0
    };
    if !tensors.iter().all(fits) || !rotary.is_multiple_of(16) || rotary > 256 {
        return Ok(None);
    }
    let on_device = {
        let mut last = of.cached_on_device.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*last {
            Some(last) if last.serves(positions, first.device()) => last.clone(),
            _ => last.insert(OnDevice::new(&of.frequencies, positions, first.device())?).clone(),
        }
    };
    let mut args = RopeArgs {
        positions: address(&on_device.positions)?,
        frequencies: address(&on_device.frequencies)?,
        tokens: positions.len() as i32,
        head_dim: of.head_dim as i32,
        rotary: rotary as i32,
        ..RopeArgs::default()
    };
    let mut outs = tensors.map(Tensor::clone);
    for ((x, out), of) in tensors.iter().zip(&mut outs).zip(&mut args.tensors) {
        // SAFETY: the kernel writes every element.
        *out = unsafe { Tensor::empty(x.shape(), x.dtype(), x.device()) }?;
        *of = RopeTensor {
            x: address(x)?,
            out: address(out)?,
            token: x.stride()[0] as i64,
            head: x.stride()[1] as i64,
            heads: x.dims()[1] as i64,
        };
    }
    // SAFETY: the tensors have the shapes and strides in `args`, and the stream frees no memory
    // before this launch has used it.
    unsafe { rope(&device.cuda_stream(), half, &args) }?;
    Ok(Some(outs))
}
