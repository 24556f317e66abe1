//! Memory for the intermediate results of a captured step.
#![allow(unsafe_code)]

use std::cell::RefCell;

use crate::Result;
use candle_core::{DType, Device, Shape, Tensor};

/// Elements to which the start of a tensor is aligned: at least 16 bytes.
const ALIGN: usize = 128;

thread_local! {
    static CURRENT: RefCell<Option<Scratch>> = const { RefCell::new(None) };
}

/// Memory from which [`empty`] takes tensors.
///
/// A graph that allocates memory has nodes between its kernels, so that no kernel can start before
/// the previous one has ended. Tensors of a scratch are never freed or reused within a step.
#[derive(Debug, Default)]
pub struct Scratch {
    parts: Vec<Part>,
}

/// The tensors of one dtype.
#[derive(Debug)]
struct Part {
    dtype: DType,
    /// `None`: tensors are only counted.
    memory: Option<Tensor>,
    used: usize,
}

impl Scratch {
    /// Calls `f`. On this thread [`empty`] takes memory from the scratch meanwhile, or counts it. Also
    /// returns the scratch.
    pub fn during<T>(self, f: impl FnOnce() -> T) -> (T, Self) {
        /// Ends the use of the scratch, also after a panic. Holds the scratch of an outer call.
        struct End(Option<Scratch>);
        impl Drop for End {
            fn drop(&mut self) {
                CURRENT.set(self.0.take());
            }
        }
        let end = End(CURRENT.replace(Some(self)));
        let out = f();
        let scratch = CURRENT.take().unwrap_or_default();
        drop(end);
        (out, scratch)
    }

    /// Allocates the memory that has been counted.
    ///
    /// # Errors
    /// An error of candle.
    pub fn allocate(&self, device: &Device) -> Result<Self> {
        let part = |of: &Part| -> Result<Part> {
            // SAFETY: the callers of `empty` write every element before it is read.
            let memory = unsafe { Tensor::empty(of.used, of.dtype, device) }?;
            Ok(Part { dtype: of.dtype, memory: Some(memory), used: 0 })
        };
        Ok(Self { parts: self.parts.iter().map(part).collect::<Result<_>>()? })
    }

    /// Returns a contiguous tensor; `None` if tensors are only counted, or the memory is used up.
    fn take(&mut self, shape: &Shape, dtype: DType, device: &Device) -> Option<Tensor> {
        let index = self.parts.iter().position(|part| part.dtype == dtype).unwrap_or_else(|| {
            self.parts.push(Part { dtype, memory: None, used: 0 });
            self.parts.len() - 1
        });
        let (part, count) = (&mut self.parts[index], shape.elem_count());
        let start = part.used;
        part.used += count.next_multiple_of(ALIGN);
        let memory = part.memory.as_ref().filter(|of| of.device().same_device(device))?;
        if part.used > memory.elem_count() {
            return None;
        }
        memory.narrow(0, start, count).and_then(|taken| taken.reshape(shape)).ok()
    }
}

/// Returns a contiguous tensor with undefined elements. In a captured step its memory belongs to the
/// graph.
///
/// # Errors
/// An error of candle.
///
/// # Safety
/// Every element must be written before it is read.
pub unsafe fn empty(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    let taken = CURRENT.with_borrow_mut(|scratch| scratch.as_mut()?.take(&shape, dtype, device));
    match taken {
        Some(taken) => Ok(taken),
        // SAFETY: guaranteed by the caller.
        None => Ok(unsafe { Tensor::empty(shape, dtype, device) }?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(count: usize, dtype: DType) -> Tensor {
        // SAFETY: nothing reads the elements.
        unsafe { empty(count, dtype, &Device::Cpu) }.unwrap()
    }

    fn starts(tensors: &[Tensor]) -> Vec<usize> {
        tensors.iter().map(|tensor| tensor.layout().start_offset()).collect()
    }

    #[test]
    fn tensors_take_the_memory_that_was_counted() {
        let step = || {
            [make(100, DType::F16), make(3, DType::F32), make(200, DType::F16), make(1, DType::F16)]
        };
        let (counted, scratch) = Scratch::default().during(step);
        assert_eq!(starts(&counted), [0; 4]);
        let (taken, used) = scratch.allocate(&Device::Cpu).unwrap().during(step);
        assert_eq!(starts(&taken), [0, 0, 128, 384]);
        assert_eq!(taken.map(|tensor| tensor.elem_count()), [100, 3, 200, 1]);
        // More than was counted is allocated.
        let (more, _) = used.during(|| make(1, DType::F16));
        assert_eq!(starts(&[more, make(1, DType::F16)]), [0, 0]);
    }

    #[test]
    fn an_outer_scratch_is_used_again() {
        let ((inner, _), outer) = Scratch::default().during(|| {
            make(1, DType::F16);
            let inner = Scratch::default().during(|| make(2, DType::F16)).1;
            (inner, make(200, DType::F16))
        });
        let used =
            |scratch: &Scratch| scratch.parts.iter().map(|part| part.used).collect::<Vec<_>>();
        assert_eq!((used(&inner), used(&outer)), (vec![128], vec![384]));
    }

    #[test]
    fn a_panic_ends_the_use_of_a_scratch() {
        let counted = Scratch::default().during(|| make(100, DType::F16)).1;
        let scratch = counted.allocate(&Device::Cpu).unwrap();
        let panics = std::panic::AssertUnwindSafe(|| {
            scratch.during(|| {
                make(10, DType::F16);
                panic!("as intended");
            })
        });
        assert!(std::panic::catch_unwind(panics).is_err());
        let after = Scratch::default().during(|| make(7, DType::F16)).0;
        assert_eq!(after.layout().start_offset(), 0);
    }
}
