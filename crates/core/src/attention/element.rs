//! The element types of stored keys and values.

use crate::{Error, Result};
use candle_core::{Storage, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// An element type of keys and values: f32, f16 or bf16.
pub trait Element: WithDType + bytemuck::Pod {
    /// Returns `src` in f32. An f32 slice is returned as is; other types are converted into
    /// `scratch`.
    fn widen<'a>(src: &'a [Self], scratch: &'a mut Vec<f32>) -> &'a [f32] {
        scratch.resize(src.len(), 0.0);
        Self::widen_into(src, scratch);
        scratch
    }

    /// Converts `src` to f32. `out` has the same length.
    fn widen_into(src: &[Self], out: &mut [f32]);
}

impl Element for f32 {
    fn widen<'a>(src: &'a [Self], _: &'a mut Vec<f32>) -> &'a [f32] {
        src
    }

    fn widen_into(src: &[Self], out: &mut [f32]) {
        out.copy_from_slice(src);
    }
}

impl Element for f16 {
    fn widen_into(src: &[Self], out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F.
            #[allow(unsafe_code)]
            unsafe {
                widen_avx512(src, out)
            };
            return;
        }
        src.convert_to_f32_slice(out);
    }
}

/// Converts 16 elements per instruction. The crate `half` converts eight and was several times
/// slower in measurements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[allow(unsafe_code)]
fn widen_avx512(src: &[f16], out: &mut [f32]) {
    use std::arch::x86_64::{_mm256_loadu_si256, _mm512_cvtph_ps, _mm512_storeu_ps};
    assert_eq!(src.len(), out.len(), "numbers to widen");
    let (mut src, mut out) = (src.chunks_exact(16), out.chunks_exact_mut(16));
    for (src, out) in (&mut src).zip(&mut out) {
        // SAFETY: both chunks hold 16 elements: 32 bytes to read and 64 to write. Unaligned access
        // is allowed.
        unsafe {
            let halves = _mm256_loadu_si256(src.as_ptr().cast());
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtph_ps(halves));
        }
    }
    src.remainder().convert_to_f32_slice(out.into_remainder());
}

impl Element for bf16 {
    fn widen_into(src: &[Self], out: &mut [f32]) {
        src.convert_to_f32_slice(out);
    }
}

/// Calls `f` with the elements of a contiguous CPU tensor, without copying them.
///
/// # Errors
/// [`Error::Mismatch`] for a tensor on another device or with gaps; an error of candle for another
/// dtype; the errors of `f`.
pub fn with_slice<T: Element, R>(x: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cpu(data), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        let got = format!("one on {:?} with strides {:?}", x.device().location(), layout.stride());
        return Err(Error::mismatch("tensor", "a contiguous one on the CPU", got));
    };
    f(&data.as_slice::<T>()?[start..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_widened_exactly() {
        // An odd length, so that the last elements take the remainder path.
        let halves: Vec<_> = (0..=u16::MAX).chain(0..7).map(f16::from_bits).collect();
        let mut scratch = Vec::new();
        for (half, wide) in halves.iter().zip(f16::widen(&halves, &mut scratch)) {
            let want = half.to_f32();
            assert!(wide.to_bits() == want.to_bits() || (wide.is_nan() && want.is_nan()), "{half}");
        }
    }
}
