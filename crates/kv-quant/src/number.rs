//! The number formats that can be quantized, and their way to f16.

use crate::{Error, Result};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A number format that keys and values may come in: f32, f16 or bf16.
///
/// All are rounded to f16 first, the format in which KIVI's and FlexGen's arithmetic is done.
pub trait Number: Copy + Send + Sync + sealed::Sealed {
    /// Appends `src` to `out`, rounded to nearest; numbers beyond f16's range become infinite.
    fn extend_f16(src: &[Self], out: &mut Vec<f16>);

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
    fn extend_f16(src: &[Self], out: &mut Vec<f16>) {
        let start = out.len();
        out.resize(start + src.len(), f16::ZERO);
        out[start..].convert_from_f32_slice(src);
    }

    fn widen(self) -> f32 {
        self
    }
}

impl Number for f16 {
    fn extend_f16(src: &[Self], out: &mut Vec<f16>) {
        out.extend_from_slice(src);
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Number for bf16 {
    fn extend_f16(src: &[Self], out: &mut Vec<f16>) {
        out.extend(src.iter().map(|x| f16::from_f32(x.to_f32())));
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// `src` (rows of `columns` numbers) in f16, none of them beyond ±`largest`.
///
/// # Errors
/// [`Error::NotFinite`] or [`Error::OutOfRange`] for the first number that is.
pub fn to_f16<T: Number>(src: &[T], columns: usize, largest: f16) -> Result<Vec<f16>> {
    let mut out = Vec::with_capacity(src.len());
    T::extend_f16(src, &mut out);
    match beyond(&out, largest) {
        None => Ok(out),
        Some(at) => {
            let (value, row, column) = (src[at].widen(), at / columns, at % columns);
            Err(if value.is_finite() {
                Error::OutOfRange { value, row, column }
            } else {
                Error::NotFinite { value, row, column }
            })
        }
    }
}

/// Where the first number beyond ±`largest` is, or NaN.
pub fn beyond(x: &[f16], largest: f16) -> Option<usize> {
    // Without their signs, halves are ordered as their bits are; NaN and infinity come last.
    let beyond = |x: &f16| x.to_bits() & 0x7fff > largest.to_bits();
    // A scan without early exit is one that vectors can do.
    if x.iter().fold(false, |any, x| any | beyond(x)) { x.iter().position(beyond) } else { None }
}
