//! The kernel with AVX-512: a line is one register. Codes of 4 bits and fewer become dequantized numbers by one permutation of a table of
//! 16, which each step's scale and zero make anew by one multiplication: fewer than the lines of a step would need.

use super::{Kernels, Panel, Params, Rows, prefetch};
use half::f16;
use std::arch::x86_64::{
    __m512, __m512i, _mm256_loadu_si256, _mm512_add_ps, _mm512_and_si512, _mm512_cvtepi32_ps,
    _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutexvar_ps,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi32,
    _mm512_storeu_ps,
};

/// The kernels, if this machine has what they need.
pub fn kernels() -> Option<Kernels> {
    std::arch::is_x86_feature_detected!("avx512f").then_some(Kernels {
        name: "AVX-512",
        accumulate,
        // SAFETY: AVX-512F is there.
        widen: |src, out| unsafe { widen(src, out) },
    })
}

/// # Safety
/// AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn widen(src: &[f16], out: &mut [f32]) {
    let whole = src.len() / 16 * 16;
    for (src, out) in src.chunks_exact(16).zip(out.chunks_exact_mut(16)) {
        // SAFETY: both have 16 numbers.
        unsafe {
            let halves = _mm256_loadu_si256(src.as_ptr().cast());
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtph_ps(halves));
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
    in_blocks!(x, 8, |first| by_format(panel, params, x, first, out, out_stride));
}

/// # Safety
/// AVX-512F, and what [`run`](super::run) checks; rows `first` to `first + R` are among `x.count`.
unsafe fn by_format<const R: usize>(
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    // SAFETY: as this function's.
    unsafe {
        match (panel.bits, panel.width) {
            (1, 1) => rows::<R, 1, 1>(panel, params, x, first, out, out_stride),
            (1, _) => rows::<R, 2, 1>(panel, params, x, first, out, out_stride),
            (2, 1) => rows::<R, 1, 2>(panel, params, x, first, out, out_stride),
            (2, _) => rows::<R, 2, 2>(panel, params, x, first, out, out_stride),
            (4, 1) => rows::<R, 1, 4>(panel, params, x, first, out, out_stride),
            (4, _) => rows::<R, 2, 4>(panel, params, x, first, out, out_stride),
            (_, 1) => rows::<R, 1, 8>(panel, params, x, first, out, out_stride),
            (_, _) => rows::<R, 2, 8>(panel, params, x, first, out, out_stride),
        }
    }
}

/// `R` rows against a panel of `W` lines of `B`-bit codes.
///
/// # Safety
/// As [`by_format`], and `W` and `B` are the panel's.
#[target_feature(enable = "avx512f")]
unsafe fn rows<const R: usize, const W: usize, const B: u32>(
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    // A code indexes the table with its four lowest bits; what lies above the code's own is the next code's, so the table repeats.
    let table: [f32; 16] = std::array::from_fn(|i| (i % (1 << B.min(4))) as f32 * panel.unit);
    // SAFETY: the table has 16 numbers.
    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
    let mut sums = [[_mm512_setzero_ps(); W]; R];
    let x_first = x.data[first * x.stride..].as_ptr();
    let (scales, zeros) = (params.scales.as_ptr(), params.zeros.as_ptr());
    let mut ahead = panel.ahead_by_word();
    for (word, lines) in panel.codes.chunks_exact(W).enumerate() {
        let begin = word * (32 / B as usize);
        if begin >= x.steps {
            break;
        }
        ahead.next().into_iter().for_each(prefetch);
        let mut words = [_mm512_setzero_si512(); W];
        for (words, line) in words.iter_mut().zip(lines) {
            // SAFETY: a line is 64 bytes.
            *words = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
        }
        for step in begin..x.steps.min(begin + 32 / B as usize) {
            // SAFETY: step < x.steps, and there are as many scales and zeros.
            let (scale, zero) = unsafe { (*scales.add(step), *zeros.add(step)) };
            let values = decode::<W, B>(words, table, scale, zero, panel.unit);
            words = words.map(|words| _mm512_srli_epi32::<B>(words));
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row first + r < x.count and step < x.steps lie in `x.data`.
                let weight = unsafe { *x_first.add(r * x.stride + step) };
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = _mm512_fmadd_ps(_mm512_set1_ps(weight), value, *sum);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut out[(first + r) * out_stride..][..16 * W];
        for (&sum, out) in sums.iter().zip(out.chunks_exact_mut(16)) {
            // SAFETY: `out` holds 16 numbers.
            unsafe {
                let before = _mm512_loadu_ps(out.as_ptr());
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_add_ps(before, sum));
            }
        }
    }
}

/// The lowest code of each word, dequantized.
#[inline]
#[target_feature(enable = "avx512f")]
fn decode<const W: usize, const B: u32>(
    words: [__m512i; W],
    table: __m512,
    scale: f32,
    zero: f32,
    unit: f32,
) -> [__m512; W] {
    let zero = _mm512_set1_ps(zero);
    if B == 8 {
        let scale = _mm512_set1_ps(scale * unit);
        words.map(|words| {
            let codes = _mm512_and_si512(words, _mm512_set1_epi32(0xff));
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale, zero)
        })
    } else {
        let table = _mm512_fmadd_ps(table, _mm512_set1_ps(scale), zero);
        words.map(|words| _mm512_permutexvar_ps(words, table))
    }
}
