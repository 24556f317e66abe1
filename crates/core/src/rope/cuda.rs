//! Rotation of f16 and bf16 on a CUDA device, in one kernel that reads strided views in place.
#![allow(unsafe_code)]

use super::Rope;
use crate::Result;
use crate::cuda::{address, empty, half_of};
use candle_core::{Device, Tensor};
use longctx_kernels::{RopeArgs, RopeTensor, rope};

/// The kernel's device arrays.
#[derive(Debug, Clone)]
pub struct OnDevice {
    frequencies: Tensor,
    /// The last call's positions on the host and on the device.
    positions: Option<(Vec<i64>, Tensor)>,
}

impl OnDevice {
    fn new(of: &Rope, device: &Device) -> Result<Self> {
        Ok(Self { frequencies: Tensor::new(of.frequencies.as_slice(), device)?, positions: None })
    }

    /// Returns the device address of the positions, which are kept until the next call with others.
    fn positions(&mut self, positions: &[i64]) -> Result<u64> {
        let last = self.positions.take().filter(|(last, _)| last == positions);
        let (_, on_device) = match last {
            Some(last) => self.positions.insert(last),
            None => {
                let on_device = Tensor::new(positions, self.frequencies.device())?;
                self.positions.insert((positions.to_vec(), on_device))
            }
        };
        address(on_device)
    }
}

/// One position per token.
#[derive(Debug, Clone, Copy)]
pub enum Positions<'a> {
    OnHost(&'a [i64]),
    /// The device address of a list of i64.
    OnDevice(u64),
}

/// Returns one or two tensors `[tokens, heads, head_dim]` rotated, in one launch; `None` if the
/// kernel does not support them.
pub fn rotate<const N: usize>(
    of: &Rope,
    tensors: [&Tensor; N],
    positions: Positions<'_>,
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
        let alike = x.dtype() == first.dtype() && x.device().same_device(first.device());
        in_pieces && alike && x.elem_count() > 0
    };
    if !tensors.iter().all(fits) || !of.has_cuda_kernel() {
        return Ok(None);
    }
    let mut cached = of.cached_on_device.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let here = |of: &OnDevice| of.frequencies.device().same_device(first.device());
    let on_device = match &mut *cached {
        Some(cached) if here(cached) => cached,
        cached => cached.insert(OnDevice::new(of, first.device())?),
    };
    let positions = match positions {
        Positions::OnHost(positions) => on_device.positions(positions)?,
        Positions::OnDevice(address) => address,
    };
    let mut args = RopeArgs {
        positions,
        frequencies: address(&on_device.frequencies)?,
        tokens: first.dims()[0] as i32,
        head_dim: of.head_dim as i32,
        rotary: rotary as i32,
        ..RopeArgs::default()
    };
    let mut outs = tensors.map(Tensor::clone);
    for ((x, out), of) in tensors.iter().zip(&mut outs).zip(&mut args.tensors) {
        // SAFETY: the kernel writes every element.
        *out = unsafe { empty(x.shape(), x.dtype(), x.device()) }?;
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
