//! The NEON kernel: a line is four registers.

use super::{Kernels, Panel, Params, Rows, portable, prefetch};
use crate::layout::Line;
use crate::levels::{Levels, float8_bits, float8_unit};
use std::arch::aarch64::{
    float32x4_t, int32x4_t, uint8x16x4_t, uint32x4_t, vaddq_f32, vandq_u32, vcvtq_f32_u32,
    vdupq_n_f32, vdupq_n_s32, vdupq_n_u32, vfmaq_f32, vfmaq_n_f32, vld1q_f32, vld1q_u8_x4,
    vld1q_u32, vmlaq_n_u32, vorrq_u32, vqtbl4q_u8, vreinterpretq_f32_u8, vreinterpretq_f32_u32,
    vreinterpretq_s32_u32, vreinterpretq_u8_u32, vreinterpretq_u32_s32, vshlq_n_u32, vshlq_s32,
    vshlq_u32, vshrq_n_u32, vst1q_f32,
};

/// Every 64-bit ARM CPU supports NEON.
pub const KERNELS: Kernels =
    Kernels { name: "NEON", accumulate, shared: None, widen: portable::widen };

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
/// The checks of [`run`](super::run) must hold. `half` is below the panel's width; rows `first` to
/// `first + R` are among `x.count`.
#[target_feature(enable = "neon")]
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
    // A right shift is a left shift by a negative number.
    let right = vdupq_n_s32(-(panel.low_bits() as i32));
    let mut sums = [[vdupq_n_f32(0.0); 4]; R];
    let x_first = x.data[first * x.stride..].as_ptr();
    let decoder = Decoder::new(&panel);
    let mut ahead = panel.ahead_by_word();
    for (word, line) in panel.codes.iter().skip(half).step_by(panel.width).enumerate() {
        let begin = word * per_word;
        if begin >= x.steps {
            break;
        }
        ahead.next().into_iter().for_each(prefetch);
        let mut words = load(line);
        let mut high = [vdupq_n_u32(0); 4];
        if panel.bits == 3 {
            high = load(&panel.high[word / 2 * panel.width + half]);
            let begin = vdupq_n_s32(-(word as i32 % 2 * 16));
            high.iter_mut().for_each(|high| *high = vshlq_u32(*high, begin));
        }
        for step in begin..x.steps.min(begin + per_word) {
            let mut codes = words;
            if panel.bits == 3 {
                for (code, high) in codes.iter_mut().zip(&mut high) {
                    let bit = vandq_u32(vshlq_n_u32::<2>(*high), vdupq_n_u32(4));
                    *code = vorrq_u32(vandq_u32(*code, vdupq_n_u32(3)), bit);
                    *high = vshrq_n_u32::<1>(*high);
                }
            }
            let values = decoder.decode(codes, params.scales[step], params.zero_points[step]);
            words.iter_mut().for_each(|word| *word = vshlq_u32(*word, right));
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row first + r < x.count and step < x.steps are in `x.data`.
                let weight = vdupq_n_f32(unsafe { *x_first.add(r * x.stride + step) });
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum = vfmaq_f32(*sum, weight, value);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut out[(first + r) * out_stride + 16 * half..][..16];
        for (&sum, out) in sums.iter().zip(out.chunks_exact_mut(4)) {
            // SAFETY: `out` has 4 elements.
            unsafe {
                vst1q_f32(out.as_mut_ptr(), vaddq_f32(vld1q_f32(out.as_ptr()), sum));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load(line: &Line) -> [uint32x4_t; 4] {
    let mut words = [vdupq_n_u32(0); 4];
    for (word, line) in words.iter_mut().zip(line.chunks_exact(4)) {
        // SAFETY: a register holds 4 words.
        *word = unsafe { vld1q_u32(line.as_ptr()) };
    }
    words
}

/// How the codes in the lowest bits of words are converted to numbers.
#[derive(Clone, Copy)]
enum Decoder {
    /// Integers: the mask of a code's bits, and the first number.
    Integers(uint32x4_t, f32),
    /// The bytes of 16 levels.
    Table(uint8x16x4_t),
    /// The mask of a byte's shifted bits, the shift, and the unit.
    Floats(uint32x4_t, int32x4_t, f32),
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "neon")]
    fn new(panel: &Panel<'_>) -> Self {
        match panel.levels {
            Levels::Integers { first } => Self::Integers(vdupq_n_u32((1 << panel.bits) - 1), first),
            // SAFETY: the table has 64 bytes.
            Levels::Table(table) => Self::Table(unsafe { vld1q_u8_x4(table.as_ptr().cast()) }),
            Levels::Float8(kind) => {
                let (shift, mask) = float8_bits(kind);
                let right = vdupq_n_s32(-(shift as i32));
                Self::Floats(vdupq_n_u32(mask), right, float8_unit(kind))
            }
        }
    }

    #[inline]
    #[target_feature(enable = "neon")]
    fn decode(self, codes: [uint32x4_t; 4], scale: f32, zero: f32) -> [float32x4_t; 4] {
        let number = |code: uint32x4_t| match self {
            Self::Integers(mask, _) => vcvtq_f32_u32(vandq_u32(code, mask)),
            Self::Table(table) => {
                // The four bytes of a level are adjacent.
                let code = vandq_u32(code, vdupq_n_u32(15));
                let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), code, 0x0404_0404);
                let level = vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes));
                vreinterpretq_f32_u8(level)
            }
            Self::Floats(mask, right, _) => {
                let byte = vreinterpretq_s32_u32(vshlq_n_u32::<24>(code));
                let moved = vreinterpretq_u32_s32(vshlq_s32(byte, right));
                vreinterpretq_f32_u32(vandq_u32(moved, mask))
            }
        };
        let (scale, zero) = match self {
            Self::Integers(_, first) => (scale, zero + first * scale),
            Self::Table(_) => (scale, zero),
            Self::Floats(_, _, unit) => (scale * unit, zero),
        };
        codes.map(|code| vfmaq_n_f32(vdupq_n_f32(zero), number(code), scale))
    }
}
