//! The AVX2 and FMA kernel: a line is two registers.

use super::{Kernels, Panel, Params, Rows, prefetch};
use crate::layout::Line;
use crate::levels::{Levels, float8_bits, float8_unit};
use half::f16;
use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_cvtsi32_si128, _mm_loadu_si128, _mm256_add_ps, _mm256_and_si256,
    _mm256_blendv_ps, _mm256_castsi256_ps, _mm256_cvtepi32_ps, _mm256_cvtph_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_or_si256, _mm256_permutevar8x32_ps,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_slli_epi32,
    _mm256_sra_epi32, _mm256_srli_epi32, _mm256_srlv_epi32, _mm256_storeu_ps,
};

/// Returns the kernels if this CPU supports them.
pub fn kernels() -> Option<Kernels> {
    let has = std::arch::is_x86_feature_detected!("avx2")
        && std::arch::is_x86_feature_detected!("fma")
        && std::arch::is_x86_feature_detected!("f16c");
    has.then_some(Kernels {
        name: "AVX2",
        accumulate,
        shared: None,
        // SAFETY: the CPU supports F16C.
        widen: |src, out| unsafe { widen(src, out) },
    })
}

/// # Safety
/// The CPU must support F16C.
#[target_feature(enable = "avx,f16c")]
unsafe fn widen(src: &[f16], out: &mut [f32]) {
    let whole = src.len() / 8 * 8;
    for (src, out) in src.chunks_exact(8).zip(out.chunks_exact_mut(8)) {
        // SAFETY: both slices have 8 elements.
        unsafe {
            let halves = _mm_loadu_si128(src.as_ptr().cast());
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(halves));
        }
    }
    out[whole..].iter_mut().zip(&src[whole..]).for_each(|(out, x)| *out = x.to_f32());
}

fn accumulate(
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    for half in 0..panel.width {
        in_blocks!(x, 4, |first| rows(panel, half, params, x, first, &mut *out, out_stride));
    }
}

/// Computes `R` rows against the `half`-th line of each word.
///
/// # Safety
/// The CPU must support AVX2 and FMA, and the checks of [`run`](super::run) must hold. `half` is
/// below the panel's width; rows `first` to `first + R` are among `x.count`.
#[target_feature(enable = "avx2,fma")]
unsafe fn rows<const R: usize>(
    panel: Panel<'_>,
    half: usize,
    params: Params<'_>,
    x: Rows<'_>,
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let per_word = panel.per_word();
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let x_first = x.data[first * x.stride..].as_ptr();
    let decoder = Decoder::new(&panel);
    let shift = _mm256_set1_epi32(panel.low_bits() as i32);
    let mut ahead = panel.ahead_by_word();
    for (word, line) in panel.codes.iter().skip(half).step_by(panel.width).enumerate() {
        let begin = word * per_word;
        if begin >= x.steps {
            break;
        }
        ahead.next().into_iter().for_each(prefetch);
        let mut words = load(line);
        let mut high = [_mm256_setzero_si256(); 2];
        if panel.bits == 3 {
            high = load(&panel.high[word / 2 * panel.width + half]);
            if word % 2 == 1 {
                high = high.map(|high| _mm256_srli_epi32::<16>(high));
            }
        }
        for step in begin..x.steps.min(begin + per_word) {
            let mut codes = words;
            if panel.bits == 3 {
                let (low, upper) = (_mm256_set1_epi32(3), _mm256_set1_epi32(4));
                for (code, high) in codes.iter_mut().zip(&mut high) {
                    let bit = _mm256_and_si256(_mm256_slli_epi32::<2>(*high), upper);
                    *code = _mm256_or_si256(_mm256_and_si256(*code, low), bit);
                    *high = _mm256_srli_epi32::<1>(*high);
                }
            }
            let values = decoder.decode(codes, params.scales[step], params.zero_points[step]);
            words = words.map(|words| _mm256_srlv_epi32(words, shift));
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row first + r < x.count and step < x.steps are in `x.data`.
                let weight = _mm256_set1_ps(unsafe { *x_first.add(r * x.stride + step) });
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = _mm256_fmadd_ps(weight, value, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut out[(first + r) * out_stride + 16 * half..][..16];
        for (&sum, out) in sums.iter().zip(out.chunks_exact_mut(8)) {
            // SAFETY: `out` has 8 elements.
            unsafe {
                let before = _mm256_loadu_ps(out.as_ptr());
                _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(before, sum));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load(line: &Line) -> [__m256i; 2] {
    // SAFETY: a line holds 16 words, two registers.
    unsafe {
        [
            _mm256_loadu_si256(line[..8].as_ptr().cast()),
            _mm256_loadu_si256(line[8..].as_ptr().cast()),
        ]
    }
}

/// How the codes in the lowest bits of words are converted to numbers.
#[derive(Clone, Copy)]
enum Decoder {
    /// Integers: the mask of a code's bits, and the first number.
    Integers(__m256i, f32),
    /// The lower and the upper eight of 16 levels.
    Table(__m256, __m256),
    /// The mask of a byte's shifted bits, the shift, and the unit.
    Floats(__m256i, __m128i, f32),
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn new(panel: &Panel<'_>) -> Self {
        match panel.levels {
            Levels::Integers { first } => {
                Self::Integers(_mm256_set1_epi32((1 << panel.bits) - 1), first)
            }
            // SAFETY: the table has twice 8 elements.
            Levels::Table(table) => unsafe {
                let (low, high) = (table[..8].as_ptr(), table[8..].as_ptr());
                Self::Table(_mm256_loadu_ps(low), _mm256_loadu_ps(high))
            },
            Levels::Float8(kind) => {
                let (shift, mask) = float8_bits(kind);
                let mask = _mm256_set1_epi32(mask as i32);
                Self::Floats(mask, _mm_cvtsi32_si128(shift as i32), float8_unit(kind))
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn decode(self, codes: [__m256i; 2], scale: f32, zero: f32) -> [__m256; 2] {
        match self {
            Self::Integers(mask, first) => {
                let (scale, zero) = (_mm256_set1_ps(scale), _mm256_set1_ps(zero + first * scale));
                codes.map(|codes| {
                    let numbers = _mm256_cvtepi32_ps(_mm256_and_si256(codes, mask));
                    _mm256_fmadd_ps(numbers, scale, zero)
                })
            }
            Self::Table(low, high) => {
                let (scale, zero) = (_mm256_set1_ps(scale), _mm256_set1_ps(zero));
                let low = _mm256_fmadd_ps(low, scale, zero);
                let high = _mm256_fmadd_ps(high, scale, zero);
                codes.map(|codes| {
                    // A permutation reads three bits; the fourth, as the sign, selects between two
                    // permutations.
                    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
                    _mm256_blendv_ps(
                        _mm256_permutevar8x32_ps(low, codes),
                        _mm256_permutevar8x32_ps(high, codes),
                        upper,
                    )
                })
            }
            Self::Floats(mask, shift, unit) => {
                let (scale, zero) = (_mm256_set1_ps(scale * unit), _mm256_set1_ps(zero));
                codes.map(|codes| {
                    let moved = _mm256_sra_epi32(_mm256_slli_epi32::<24>(codes), shift);
                    let number = _mm256_castsi256_ps(_mm256_and_si256(moved, mask));
                    _mm256_fmadd_ps(number, scale, zero)
                })
            }
        }
    }
}
