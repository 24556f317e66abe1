//! Products with codes of 8-bit floating-point numbers.
//!
//! The four codes of a word become two words of two bf16 numbers each, with another bias of the
//! exponent. A bf16 number is the upper half of an f32 number, so one instruction per step widens
//! it. Scales and the bias are applied to the vectors and the sums instead of to every number.

use super::super::{Panel, Params, Rows, prefetch};
use super::{load, store_sums};
use std::arch::x86_64::{
    __m512, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_fmadd_ps,
    _mm512_mask_shuffle_epi8, _mm512_mul_ps, _mm512_or_si512, _mm512_set1_epi8, _mm512_set1_epi16,
    _mm512_set1_epi32, _mm512_set1_epi64, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi16,
    _mm512_slli_epi32, _mm512_srai_epi16, _mm512_srli_epi16, _mm512_ternarylogic_epi32,
    _mm512_testn_epi8_mask,
};

/// Steps whose weights are computed at a time.
const PART: usize = 64;
/// Codes per word.
const PER_WORD: usize = 4;

/// Weights are multiplied by 2^60. The numbers of [`e4m3`] and [`e5m2`] are as small as 2^-113 and
/// 2^-126: their products with the weights of softmax would be subnormal, which CPUs compute
/// slowly. Weights up to 2^67 do not overflow.
const RAISED: f32 = f32::from_bits((127 + 60) << 23);
/// Corrects sums of [`e4m3`] numbers, which are 2^104 times too small.
const E4M3_UNIT: f32 = f32::from_bits((127 + 104 - 60) << 23);
/// Corrects sums of [`e5m2`] numbers, which are 2^112 times too small.
const E5M2_UNIT: f32 = f32::from_bits((127 + 112 - 60) << 23);

/// Computes `R` rows against a panel of `W` lines of e4m3 codes or, otherwise, e5m2 codes.
///
/// # Safety
/// As [`by_format`](super::by_format); `W` and `E4M3` must be those of the panel.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn rows<const R: usize, const W: usize, const E4M3: bool>(
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    first: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    let mut sums = [[_mm512_setzero_ps(); W]; R];
    let mut ahead = panel.ahead_by_word();
    for begin in (0..x.steps).step_by(PART) {
        let steps = PART.min(x.steps - begin);
        let mut weights = [[0.0; PART]; R];
        for (r, weights) in weights.iter_mut().enumerate() {
            let x = &x.data[(first + r) * x.stride + begin..][..steps];
            for ((weight, x), scale) in weights.iter_mut().zip(x).zip(&params.scales[begin..]) {
                *weight = x * (scale * RAISED);
            }
        }
        let words = panel.codes[begin / PER_WORD * W..].chunks_exact(W);
        for (word, lines) in words.take(steps.div_ceil(PER_WORD)).enumerate() {
            ahead.next().into_iter().for_each(prefetch);
            let mut numbers = [[_mm512_setzero_ps(); PER_WORD]; W];
            for (numbers, codes) in numbers.iter_mut().zip(load::<W>(lines)) {
                *numbers = halves(if E4M3 { e4m3(codes) } else { e5m2(codes) });
            }
            for step in 0..PER_WORD {
                for (sums, weights) in sums.iter_mut().zip(&weights) {
                    let weight = _mm512_set1_ps(weights[word * PER_WORD + step]);
                    for (sum, numbers) in sums.iter_mut().zip(&numbers) {
                        *sum = _mm512_fmadd_ps(weight, numbers[step], *sum);
                    }
                }
            }
        }
    }
    let unit = _mm512_set1_ps(if E4M3 { E4M3_UNIT } else { E5M2_UNIT });
    for sum in sums.as_flattened_mut() {
        *sum = _mm512_mul_ps(*sum, unit);
    }
    store_sums(&sums, &mut out[first * out_stride..], out_stride);
}

/// Returns the halves of pairs as f32: those of the codes 0 to 3 of each word.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves([even, odd]: [__m512i; 2]) -> [__m512; PER_WORD] {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    [
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(even)),
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(odd)),
        _mm512_castsi512_ps(_mm512_and_si512(even, upper)),
        _mm512_castsi512_ps(_mm512_and_si512(odd, upper)),
    ]
}

/// Returns the numbers of codes times 2^-104, as pairs of bf16: of the codes 0 and 2 of each word,
/// and of 1 and 3. Numbers that are subnormal in e4m3 are normal here.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn e4m3(codes: __m512i) -> [__m512i; 2] {
    // Magnitudes with 5 bits of exponent. A subnormal code m means m * 2^-9. The exponent of other
    // codes is increased by 16.
    const SUBNORMAL: i64 = i64::from_le_bytes([0, 112, 120, 124, 128, 130, 132, 134]);
    let magnitudes = _mm512_and_si512(codes, _mm512_set1_epi8(0x7f));
    let raised = _mm512_or_si512(magnitudes, _mm512_set1_epi8(i8::MIN));
    let subnormal = _mm512_testn_epi8_mask(codes, _mm512_set1_epi8(0x78));
    let table = _mm512_set1_epi64(SUBNORMAL);
    let magnitudes = _mm512_mask_shuffle_epi8(raised, subnormal, table, magnitudes);

    let (bits, sign) = (_mm512_set1_epi16(0x0ff0), _mm512_set1_epi16(i16::MIN));
    let even = _mm512_and_si512(_mm512_slli_epi16::<4>(magnitudes), bits);
    let odd = _mm512_and_si512(_mm512_srli_epi16::<4>(magnitudes), bits);
    // magnitude | codes & sign
    [
        _mm512_ternarylogic_epi32::<0xf8>(even, _mm512_slli_epi16::<8>(codes), sign),
        _mm512_ternarylogic_epi32::<0xf8>(odd, codes, sign),
    ]
}

/// Returns the numbers of codes times 2^-112, in the order of [`e4m3`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn e5m2(codes: __m512i) -> [__m512i; 2] {
    let bits = _mm512_set1_epi16(0x8fe0_u16 as i16);
    [
        _mm512_and_si512(_mm512_srai_epi16::<3>(_mm512_slli_epi16::<8>(codes)), bits),
        _mm512_and_si512(_mm512_srai_epi16::<3>(codes), bits),
    ]
}
