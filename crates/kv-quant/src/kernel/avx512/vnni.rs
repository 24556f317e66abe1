//! Products with integer codes by VNNI: an instruction adds four products of bytes to each lane.
//!
//! The weights of a part of the steps, vectors times scales, are quantized to 16 bits, relative to
//! the largest of them, and split into two signed bytes. This takes more time than the products of
//! one panel, so it is done once for all panels that share scales.

use super::super::{Panel, Params, Rows, prefetch};
use super::load;
use crate::layout::PANEL;
use crate::levels::Levels;
use std::arch::x86_64::{
    __m512, _mm_loadu_si128, _mm_shuffle_epi8, _mm_storeu_si128, _mm512_abs_ps, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtps_epi32,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_fnmadd_ps, _mm512_loadu_ps, _mm512_maskz_loadu_ps,
    _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_set1_epi8,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi32,
    _mm512_srai_epi32, _mm512_srli_epi32, _mm512_storeu_ps,
};

/// The fewest steps for which this kernel is used: with 64, the quantization of weights takes most
/// of what the products save.
pub const MIN_STEPS: usize = 128;
/// Steps whose weights are quantized together. Sums of codes of 8 bits times 16-bit weights stay
/// below 2^31.
const PART: usize = 128;
/// The largest quantized weight whose two bytes are signed: 127 * 256 + 127.
const MAX_WEIGHT: f32 = 32_639.0;

/// The quantized weights of a part, for `R` rows.
struct Weights<const R: usize> {
    /// The upper bytes, four steps per element in the order in which a word's codes are unpacked.
    high: [[i32; PART / 4]; R],
    /// The lower bytes, signed.
    low: [[i32; PART / 4]; R],
    /// The weight of one unit.
    unit: [f32; R],
    /// The contribution of the zero points and the first level, the same for every lane.
    offset: [f32; R],
}

/// Computes the products with panels of 2, 4 or 8-bit integers that share their parameters.
pub fn accumulate(
    panels: &[Panel<'_>],
    params: Params<'_>,
    x: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    in_blocks!(x, 4, |first| by_bits(panels, params, x, first, out, out_stride));
}

/// # Safety
/// The CPU must support AVX-512F, BW and VNNI, and the checks of [`run`](super::super::run) must
/// hold for each panel. Rows `first` to `first + R` are among `x.count`.
unsafe fn by_bits<const R: usize>(
    panels: &[Panel<'_>],
    params: Params<'_>,
    x: Rows<'_>,
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let Some(panel) = panels.first() else { return };
    // SAFETY: the requirements are those of this function.
    unsafe {
        match panel.bits {
            2 => rows::<R, 2>(panels, params, x, first, out, out_stride),
            4 => rows::<R, 4>(panels, params, x, first, out, out_stride),
            _ => rows::<R, 8>(panels, params, x, first, out, out_stride),
        }
    }
}

/// # Safety
/// As [`by_bits`]; codes have `BITS` bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn rows<const R: usize, const BITS: u32>(
    panels: &[Panel<'_>],
    params: Params<'_>,
    x: Rows<'_>,
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let Levels::Integers { first: level } = panels[0].levels else { return };
    for begin in (0..x.steps).step_by(PART) {
        let steps = begin..x.steps.min(begin + PART);
        let mut weights = Weights::<R> {
            high: [[0; PART / 4]; R],
            low: [[0; PART / 4]; R],
            unit: [0.0; R],
            offset: [0.0; R],
        };
        for r in 0..R {
            let x = &x.data[(first + r) * x.stride..][steps.clone()];
            let (scales, zeros) =
                (&params.scales[steps.clone()], &params.zero_points[steps.clone()]);
            weights.set::<BITS>(r, x, scales, zeros, level);
        }
        for (i, panel) in panels.iter().enumerate() {
            let out = &mut out[first * out_stride + i * PANEL..];
            match panel.width {
                1 => part::<R, 1, BITS>(panel, begin, steps.len(), &weights, out, out_stride),
                _ => part::<R, 2, BITS>(panel, begin, steps.len(), &weights, out, out_stride),
            }
        }
    }
}

impl<const R: usize> Weights<R> {
    /// Quantizes the weights of a row: vector elements times scales.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn set<const BITS: u32>(
        &mut self,
        r: usize,
        x: &[f32],
        scales: &[f32],
        zeros: &[f32],
        level: f32,
    ) {
        let mut weights = [_mm512_setzero_ps(); PART / 16];
        let mut largest = _mm512_set1_ps(f32::MIN_POSITIVE * MAX_WEIGHT);
        let (mut total, mut zero_point_sum) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        let parts = x.chunks(16).zip(scales.chunks(16)).zip(zeros.chunks(16));
        for (weight, ((x, scales), zeros)) in weights.iter_mut().zip(parts) {
            let (x, scales, zeros) = (load_part(x), load_part(scales), load_part(zeros));
            *weight = _mm512_mul_ps(x, scales);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(*weight));
            total = _mm512_add_ps(total, *weight);
            zero_point_sum = _mm512_fmadd_ps(x, zeros, zero_point_sum);
        }
        let largest = _mm512_reduce_max_ps(largest);
        let inverse = _mm512_set1_ps(MAX_WEIGHT / largest);
        let mut quantized_total = _mm512_setzero_si512();
        let parts = self.high[r].chunks_exact_mut(4).zip(self.low[r].chunks_exact_mut(4));
        for (weights, (high, low)) in weights.iter().zip(parts).take(x.len().div_ceil(16)) {
            let weights = _mm512_cvtps_epi32(_mm512_mul_ps(*weights, inverse));
            quantized_total = _mm512_add_epi32(quantized_total, weights);
            // The lower byte is signed, so the upper one is rounded.
            let rounded = _mm512_add_epi32(weights, _mm512_set1_epi32(128));
            let upper = _mm512_cvtepi32_epi8(_mm512_srai_epi32::<8>(rounded));
            let lower = _mm512_cvtepi32_epi8(weights);
            // SAFETY: the order has 16 bytes, and four elements are 16 bytes.
            unsafe {
                let order = _mm_loadu_si128(const { &order(BITS) }.as_ptr().cast());
                _mm_storeu_si128(high.as_mut_ptr().cast(), _mm_shuffle_epi8(upper, order));
                _mm_storeu_si128(low.as_mut_ptr().cast(), _mm_shuffle_epi8(lower, order));
            }
        }
        let unit = largest / MAX_WEIGHT;
        // The error of the weights' total is known. With its correction, only the distances of
        // codes from the middle are multiplied by errors of weights.
        let middle = ((1 << BITS) - 1) as f32 / 2.0;
        let exact = _mm512_fmadd_ps(total, _mm512_set1_ps(level + middle), zero_point_sum);
        let quantized = _mm512_cvtepi32_ps(quantized_total);
        let offset = _mm512_fnmadd_ps(quantized, _mm512_set1_ps(middle * unit), exact);
        self.unit[r] = unit;
        self.offset[r] = _mm512_reduce_add_ps(offset);
    }
}

/// Loads up to 16 numbers; zeros follow them.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_part(x: &[f32]) -> __m512 {
    let mask = 0xffff_u16.checked_shr(16 - x.len().min(16) as u32).unwrap_or(0);
    // SAFETY: only elements of the slice are read.
    unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) }
}

/// Returns the order of 16 steps in which codes of `bits` bits are unpacked: the k-th mask of a
/// word selects the steps k, k + 8 / bits, …
const fn order(bits: u32) -> [u8; 16] {
    let masks = 8 / bits as usize;
    let mut order = [0; 16];
    let mut at = 0;
    while at < 16 {
        let (element, byte) = (at / 4, at % 4);
        let (word, mask) = (element / masks, element % masks);
        order[at] = (word * 4 * masks + mask + byte * masks) as u8;
        at += 1;
    }
    order
}

/// Adds the products of a part of a panel's steps.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn part<const R: usize, const W: usize, const BITS: u32>(
    panel: &Panel<'_>,
    begin: usize,
    steps: usize,
    weights: &Weights<R>,
    out: &mut [f32],
    out_stride: usize,
) {
    let (per_word, masks) = (32 / BITS as usize, 8 / BITS as usize);
    let mask = _mm512_set1_epi8(((1u32 << BITS) - 1) as i8);
    let mut high = [[_mm512_setzero_si512(); W]; R];
    let mut low = [[_mm512_setzero_si512(); W]; R];
    let first_word = begin / per_word;
    let mut ahead = panel.ahead_by_word();
    // A call to `skip`'s iterator in the loop would move the sums to memory.
    first_word.checked_sub(1).and_then(|before| ahead.nth(before));
    let words = panel.codes[first_word * W..].chunks_exact(W).take(steps.div_ceil(per_word));
    for (word, lines) in words.enumerate() {
        ahead.next().into_iter().for_each(prefetch);
        let mut words = load::<W>(lines);
        for at in word * masks..(word + 1) * masks {
            for line in 0..W {
                let codes = _mm512_and_si512(words[line], mask);
                words[line] = _mm512_srli_epi32::<BITS>(words[line]);
                for r in 0..R {
                    let upper = _mm512_set1_epi32(weights.high[r][at]);
                    let lower = _mm512_set1_epi32(weights.low[r][at]);
                    high[r][line] = _mm512_dpbusd_epi32(high[r][line], codes, upper);
                    low[r][line] = _mm512_dpbusd_epi32(low[r][line], codes, lower);
                }
            }
        }
    }
    for r in 0..R {
        let (unit, offset) = (_mm512_set1_ps(weights.unit[r]), _mm512_set1_ps(weights.offset[r]));
        for line in 0..W {
            let out = &mut out[r * out_stride + 16 * line..][..16];
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high[r][line]), low[r][line]);
            // SAFETY: `out` has 16 elements.
            unsafe {
                let before = _mm512_add_ps(_mm512_loadu_ps(out.as_ptr()), offset);
                let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), unit, before);
                _mm512_storeu_ps(out.as_mut_ptr(), sum);
            }
        }
    }
}
