//! The element types of keys, values, queries and outputs.

use std::borrow::Cow;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// Elements that one thread converts at a time.
const PART: usize = 1 << 16;

/// The largest number that can be appended to a group token by token: half of f16's range, so that
/// the range of a group never exceeds f16's.
pub const MAX_GROUPED: f16 = f16::from_bits(f16::MAX.to_bits() - 0x400);

/// An element type of keys, values, queries and outputs: f32, f16 or bf16.
///
/// Keys and values are first rounded to f16, in which KIVI and FlexGen compute.
pub trait Number: Copy + Send + Sync + sealed::Sealed {
    /// Rounds `src` to the nearest f16. Numbers beyond f16's range become infinite.
    fn round_to_f16(src: &[Self]) -> Cow<'_, [f16]>;

    /// Converts `src` to f32. `out` has the same length.
    fn widen_all(src: &[Self], out: &mut [f32]);

    /// Rounds `src` to the nearest number of this type. `out` has the same length.
    fn narrow_all(src: &[f32], out: &mut [Self]);

    /// Converts the number to f32.
    fn widen(self) -> f32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Number for f32 {
    fn round_to_f16(src: &[Self]) -> Cow<'_, [f16]> {
        let mut out = vec![f16::ZERO; src.len()];
        let parts = out.par_chunks_mut(PART).zip(src.par_chunks(PART));
        parts.for_each(|(out, src)| out.convert_from_f32_slice(src));
        out.into()
    }

    fn widen_all(src: &[Self], out: &mut [f32]) {
        out.copy_from_slice(src);
    }

    fn narrow_all(src: &[f32], out: &mut [Self]) {
        out.copy_from_slice(src);
    }

    fn widen(self) -> f32 {
        self
    }
}

impl Number for f16 {
    fn round_to_f16(src: &[Self]) -> Cow<'_, [f16]> {
        src.into()
    }

    fn widen_all(src: &[Self], out: &mut [f32]) {
        crate::kernel::widen_into(src, out);
    }

    fn narrow_all(src: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(src);
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Number for bf16 {
    fn round_to_f16(src: &[Self]) -> Cow<'_, [f16]> {
        let mut out = vec![f16::ZERO; src.len()];
        let parts = out.par_chunks_mut(PART).zip(src.par_chunks(PART));
        parts.for_each(|(out, src)| {
            out.iter_mut().zip(src).for_each(|(out, x)| *out = f16::from_f32(x.to_f32()));
        });
        out.into()
    }

    fn widen_all(src: &[Self], out: &mut [f32]) {
        src.convert_to_f32_slice(out);
    }

    fn narrow_all(src: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(src);
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// Converts `src` to f16; the error is the index of the first number beyond ±`largest`.
pub fn to_f16<T: Number>(src: &[T], largest: f16) -> Result<Cow<'_, [f16]>, usize> {
    let halves = T::round_to_f16(src);
    match first_out_of_range(&halves, largest) {
        None => Ok(halves),
        Some(at) => Err(at),
    }
}

/// Returns the index of the first number beyond ±`largest`, or of a NaN.
pub fn first_out_of_range(x: &[f16], largest: f16) -> Option<usize> {
    let any = |x: &[f16]| x.iter().fold(false, |any, x| any | is_out_of_range(*x, largest));
    // A scan without early exit vectorizes.
    if x.par_chunks(PART).any(any) {
        x.iter().position(|x| is_out_of_range(*x, largest))
    } else {
        None
    }
}

/// The same for a few numbers, on this thread.
pub fn first_out_of_range_sequential(x: &[f16], largest: f16) -> Option<usize> {
    let any = x.iter().fold(false, |any, x| any | is_out_of_range(*x, largest));
    if any { x.iter().position(|x| is_out_of_range(*x, largest)) } else { None }
}

/// Without the sign, f16 numbers are ordered like their bits; NaN and infinity are the largest.
fn is_out_of_range(x: f16, largest: f16) -> bool {
    x.to_bits() & 0x7fff > largest.to_bits()
}
