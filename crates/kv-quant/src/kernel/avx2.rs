//! The kernel with AVX2 and FMA: a line is two registers.

use super::{Kernels, Panel, Params, Rows, prefetch};
use half::f16;
use std::arch::x86_64::{
    __m256i, _mm_loadu_si128, _mm256_add_ps, _mm256_and_si256, _mm256_cvtepi32_ps, _mm256_cvtph_ps,
    _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_set1_ps,
    _mm256_setzero_ps, _mm256_srlv_epi32, _mm256_storeu_ps,
};

/// The kernels, if this machine has what they need.
pub fn kernels() -> Option<Kernels> {
    let has = std::arch::is_x86_feature_detected!("avx2")
        && std::arch::is_x86_feature_detected!("fma")
        && std::arch::is_x86_feature_detected!("f16c");
    has.then_some(Kernels {
        name: "AVX2",
        accumulate,
        // SAFETY: F16C is there.
        widen: |src, out| unsafe { widen(src, out) },
    })
}

/// # Safety
/// F16C.
#[target_feature(enable = "avx,f16c")]
unsafe fn widen(src: &[f16], out: &mut [f32]) {
    let whole = src.len() / 8 * 8;
    for (src, out) in src.chunks_exact(8).zip(out.chunks_exact_mut(8)) {
        // SAFETY: both have 8 numbers.
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

/// `R` rows against the `half`-th line of each word.
///
/// # Safety
/// AVX2, FMA, and what [`run`](super::run) checks; `half` is below the panel's width, rows `first` to `first + R` are among `x.count`.
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
    let per_word = 32 / panel.bits;
    let mask = _mm256_set1_epi32((1 << panel.bits) - 1);
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let x_first = x.data[first * x.stride..].as_ptr();
    let mut ahead = panel.ahead_by_word();
    for (word, line) in panel.codes.iter().skip(half).step_by(panel.width).enumerate() {
        let begin = word * per_word;
        if begin >= x.steps {
            break;
        }
        ahead.next().into_iter().for_each(prefetch);
        // SAFETY: a line holds 16 words, two registers.
        let mut words: [__m256i; 2] = unsafe {
            [
                _mm256_loadu_si256(line[..8].as_ptr().cast()),
                _mm256_loadu_si256(line[8..].as_ptr().cast()),
            ]
        };
        let shift = _mm256_set1_epi32(panel.bits as i32);
        for step in begin..x.steps.min(begin + per_word) {
            let scale = _mm256_set1_ps(params.scales[step] * panel.unit);
            let zero = _mm256_set1_ps(params.zeros[step]);
            let mut values = [_mm256_setzero_ps(); 2];
            for (value, word) in values.iter_mut().zip(&mut words) {
                let code = _mm256_cvtepi32_ps(_mm256_and_si256(*word, mask));
                *value = _mm256_fmadd_ps(code, scale, zero);
                *word = _mm256_srlv_epi32(*word, shift);
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row first + r < x.count and step < x.steps lie in `x.data`.
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
            // SAFETY: `out` holds 8 numbers.
            unsafe {
                let before = _mm256_loadu_ps(out.as_ptr());
                _mm256_storeu_ps(out.as_mut_ptr(), _mm256_add_ps(before, sum));
            }
        }
    }
}
