//! The AVX-512 kernel: a line is one register.
//!
//! Codes of up to 4 bits are dequantized by one permutation of a table of 16 levels. One
//! multiply-add per step applies the step's scale and zero point to the table, which takes fewer
//! instructions than applying them to the lines of the step.

mod float8;
mod vnni;

use super::{Kernels, Panel, Params, Rows, Shared, prefetch};
use crate::Float8;
use crate::layout::Line;
use crate::levels::Levels;
use half::f16;
use std::arch::x86_64::{
    __m512, __m512i, _mm256_loadu_si256, _mm512_add_ps, _mm512_and_si512, _mm512_cvtepi32_ps,
    _mm512_cvtph_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_permutexvar_ps,
    _mm512_rol_epi32, _mm512_ror_epi32, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_ternarylogic_epi32,
};

/// Returns the kernels if this CPU supports them.
pub fn kernels() -> Option<Kernels> {
    let has = std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512bw");
    has.then_some(Kernels {
        name: "AVX-512",
        accumulate,
        shared: None,
        // SAFETY: the CPU supports AVX-512F.
        widen: |src, out| unsafe { widen(src, out) },
    })
}

/// Returns the kernels with products of bytes if this CPU supports them.
pub fn vnni_kernels() -> Option<Kernels> {
    let shared = Some(Shared { accumulate: vnni::accumulate, min_steps: vnni::MIN_STEPS });
    let has = std::arch::is_x86_feature_detected!("avx512vnni");
    kernels().filter(|_| has).map(|kernels| Kernels { name: "AVX-512 VNNI", shared, ..kernels })
}

/// # Safety
/// The CPU must support AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn widen(src: &[f16], out: &mut [f32]) {
    let whole = src.len() / 16 * 16;
    for (src, out) in src.chunks_exact(16).zip(out.chunks_exact_mut(16)) {
        // SAFETY: both slices have 16 elements.
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
/// The CPU must support AVX-512F and BW, and the checks of [`run`](super::run) must hold. Rows
/// `first` to `first + R` are among `x.count`.
unsafe fn by_format<const R: usize>(
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    macro_rules! call {
        ($rows:path, $form:expr) => {
            // SAFETY: the requirements are those of this function.
            unsafe {
                use $rows as rows;
                match panel.width {
                    1 => rows::<R, 1, { $form }>(panel, params, x, first, out, out_stride),
                    _ => rows::<R, 2, { $form }>(panel, params, x, first, out, out_stride),
                }
            }
        };
    }
    match (panel.bits, panel.levels) {
        (2, _) => call!(self::rows, TABLE_2),
        (3, _) => call!(self::rows, TABLE_3),
        (4, _) => call!(self::rows, TABLE_4),
        (_, Levels::Float8(kind)) => match kind {
            Float8::E4m3 => call!(float8::rows, true),
            Float8::E5m2 => call!(float8::rows, false),
        },
        (_, _) => call!(self::rows, BYTES),
    }
}

/// Kinds of codes: bits and levels.
const TABLE_2: u32 = 0;
const TABLE_3: u32 = 1;
const TABLE_4: u32 = 2;
const BYTES: u32 = 3;

/// Returns the number of codes per word.
const fn per_word(form: u32) -> usize {
    match form {
        TABLE_2 | TABLE_3 => 16,
        TABLE_4 => 8,
        _ => 4,
    }
}

/// Returns the levels of codes of up to 4 bits. A code indexes the table with its four lowest bits.
/// Bits above the code belong to the next code, so the table repeats.
fn table(panel: &Panel<'_>) -> [f32; 16] {
    match panel.levels {
        Levels::Table(table) => *table,
        Levels::Integers { first } => {
            std::array::from_fn(|i| (i % (1 << panel.bits.min(4))) as f32 + first)
        }
        Levels::Float8(_) => [0.0; 16],
    }
}

/// Returns the number of scales to add to a step's zero point, because the kernel treats bytes as
/// unsigned.
fn first_byte(panel: &Panel<'_>) -> f32 {
    match panel.levels {
        Levels::Integers { first } if panel.bits == 8 => first,
        _ => 0.0,
    }
}

/// Computes `R` rows against a panel of `W` lines of codes of a kind.
///
/// # Safety
/// As [`by_format`]; `W` and `FORM` must be those of the panel.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn rows<const R: usize, const W: usize, const FORM: u32>(
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let per_word = per_word(FORM);
    // SAFETY: the table has 16 elements.
    let table = unsafe { _mm512_loadu_ps(table(&panel).as_ptr()) };
    let first_byte = first_byte(&panel);
    let mut sums = [[_mm512_setzero_ps(); W]; R];
    let x_first = x.data[first * x.stride..].as_ptr();
    let (scales, zero_points) = (params.scales.as_ptr(), params.zero_points.as_ptr());
    let mut ahead = panel.ahead_by_word();
    for (word, lines) in panel.codes.chunks_exact(W).enumerate() {
        let begin = word * per_word;
        if begin >= x.steps {
            break;
        }
        ahead.next().into_iter().for_each(prefetch);
        let mut words = load::<W>(lines);
        let mut high = [_mm512_setzero_si512(); W];
        if FORM == TABLE_3 {
            high = load::<W>(&panel.high[word / 2 * W..][..W]);
            // The upper bit of the next code moves to bit 2.
            high = match word % 2 {
                0 => high.map(|high| _mm512_rol_epi32::<2>(high)),
                _ => high.map(|high| _mm512_ror_epi32::<14>(high)),
            };
        }
        for step in begin..x.steps.min(begin + per_word) {
            // SAFETY: step < x.steps, and there are as many scales and zeros.
            let (scale, zero) = unsafe { (*scales.add(step), *zero_points.add(step)) };
            let values = match FORM {
                TABLE_2 | TABLE_4 => look_up(words, table, scale, zero),
                TABLE_3 => {
                    let low = _mm512_set1_epi32(3);
                    let codes = std::array::from_fn(|i| {
                        _mm512_ternarylogic_epi32::<0xca>(low, words[i], high[i])
                    });
                    high = high.map(|high| _mm512_ror_epi32::<1>(high));
                    look_up(codes, table, scale, zero)
                }
                _ => bytes(words, scale, zero + first_byte * scale),
            };
            words = match FORM {
                TABLE_2 | TABLE_3 => words.map(|words| _mm512_srli_epi32::<2>(words)),
                TABLE_4 => words.map(|words| _mm512_srli_epi32::<4>(words)),
                _ => words.map(|words| _mm512_srli_epi32::<8>(words)),
            };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row first + r < x.count and step < x.steps are in `x.data`.
                let weight = unsafe { *x_first.add(r * x.stride + step) };
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = _mm512_fmadd_ps(_mm512_set1_ps(weight), value, *sum);
                }
            }
        }
    }
    store_sums(&sums, &mut out[first * out_stride..], out_stride);
}

/// Adds the sums of `R` rows to the rows of `out`.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_sums<const R: usize, const W: usize>(
    sums: &[[__m512; W]; R],
    out: &mut [f32],
    out_stride: usize,
) {
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut out[r * out_stride..][..16 * W];
        for (&sum, out) in sums.iter().zip(out.chunks_exact_mut(16)) {
            // SAFETY: `out` has 16 elements.
            unsafe {
                let before = _mm512_loadu_ps(out.as_ptr());
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_add_ps(before, sum));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load<const W: usize>(lines: &[Line]) -> [__m512i; W] {
    let mut words = [_mm512_setzero_si512(); W];
    for (words, line) in words.iter_mut().zip(lines) {
        // SAFETY: a line is 64 bytes.
        *words = unsafe { _mm512_loadu_si512(line.as_ptr().cast()) };
    }
    words
}

/// Dequantizes the codes in the lowest bits of each word.
#[inline]
#[target_feature(enable = "avx512f")]
fn look_up<const W: usize>(
    words: [__m512i; W],
    table: __m512,
    scale: f32,
    zero: f32,
) -> [__m512; W] {
    let table = _mm512_fmadd_ps(table, _mm512_set1_ps(scale), _mm512_set1_ps(zero));
    words.map(|words| _mm512_permutexvar_ps(words, table))
}

/// Dequantizes the lowest byte of each word.
#[inline]
#[target_feature(enable = "avx512f")]
fn bytes<const W: usize>(words: [__m512i; W], scale: f32, zero: f32) -> [__m512; W] {
    let (scale, zero) = (_mm512_set1_ps(scale), _mm512_set1_ps(zero));
    words.map(|words| {
        let codes = _mm512_and_si512(words, _mm512_set1_epi32(0xff));
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale, zero)
    })
}
