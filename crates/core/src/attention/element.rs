//! The number formats in which keys and values are held.

use crate::{Error, Result};
use candle_core::{Storage, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A number format of keys and values: f32, f16 or bf16.
pub trait Element: WithDType {
    /// `src` in f32: itself, or written into `scratch`.
    fn widen<'a>(src: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32];
}

impl Element for f32 {
    fn widen<'a>(src: &'a [Self], _: &'a mut Vec<f32>) -> &'a [f32] {
        src
    }
}

impl Element for f16 {
    fn widen<'a>(src: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(src.len(), 0.0);
        src.convert_to_f32_slice(scratch);
        scratch
    }
}

impl Element for bf16 {
    fn widen<'a>(src: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(src.len(), 0.0);
        src.convert_to_f32_slice(scratch);
        scratch
    }
}

/// Calls `f` with the numbers of a contiguous tensor on the CPU, without copying them.
pub fn with_slice<T: Element, R>(x: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cpu(data), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        let got = format!("one on {:?} with strides {:?}", x.device().location(), layout.stride());
        return Err(Error::mismatch("tensor", "a contiguous one on the CPU", got));
    };
    f(&data.as_slice::<T>()?[start..end])
}
