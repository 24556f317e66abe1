//! The number formats of keys, values, queries and outputs.

use std::borrow::Cow;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// Numbers that one thread converts at a time.
const PART: usize = 1 << 16;

/// The largest number that groups of tokens to come can take: half of f16's range, so that no group's
/// range can be beyond it, whatever tokens come to share a group.
pub const LARGEST: f16 = f16::from_bits(f16::MAX.to_bits() - 0x400);

/// A number format that keys, values and queries may come in, and outputs may be written in: f32, f16
/// or bf16.
///
/// Keys and values are rounded to f16 first, the format in which KIVI's and FlexGen's arithmetic is
/// done.
pub trait Number: Copy + Send + Sync + sealed::Sealed {
    /// `src` rounded to nearest; numbers beyond f16's range become infinite.
    fn halves(src: &[Self]) -> Cow<'_, [f16]>;

    /// Writes `src` in f32, in a slice of the same length.
    fn widen_all(src: &[Self], out: &mut [f32]);

    /// Writes `src` rounded to nearest, in a slice of the same length.
    fn narrow_all(src: &[f32], out: &mut [Self]);

    /// The number in f32.
    fn widen(self) -> f32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Number for f32 {
    fn halves(src: &[Self]) -> Cow<'_, [f16]> {
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
    fn halves(src: &[Self]) -> Cow<'_, [f16]> {
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
    fn halves(src: &[Self]) -> Cow<'_, [f16]> {
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

/// `src` in f16, or where the first number beyond ±`largest` is.
pub fn to_f16<T: Number>(src: &[T], largest: f16) -> Result<Cow<'_, [f16]>, usize> {
    let halves = T::halves(src);
    match beyond(&halves, largest) {
        None => Ok(halves),
        Some(at) => Err(at),
    }
}

/// Where the first number beyond ±`largest` is, or NaN.
pub fn beyond(x: &[f16], largest: f16) -> Option<usize> {
    let any = |x: &[f16]| x.iter().fold(false, |any, x| any | is_beyond(*x, largest));
    // A scan without early exit is one that vectors can do.
    if x.par_chunks(PART).any(any) { x.iter().position(|x| is_beyond(*x, largest)) } else { None }
}

/// The same of a few numbers, on this thread.
pub fn beyond_within(x: &[f16], largest: f16) -> Option<usize> {
    let any = x.iter().fold(false, |any, x| any | is_beyond(*x, largest));
    if any { x.iter().position(|x| is_beyond(*x, largest)) } else { None }
}

/// Without their signs, halves are ordered as their bits are; NaN and infinity come last.
fn is_beyond(x: f16, largest: f16) -> bool {
    x.to_bits() & 0x7fff > largest.to_bits()
}
