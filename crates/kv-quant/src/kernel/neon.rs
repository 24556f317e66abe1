//! The kernel with NEON: a line is four registers.

use super::{Kernels, Panel, Params, Rows, portable, prefetch};
use std::arch::aarch64::{
    vaddq_f32, vandq_u32, vcvtq_f32_u32, vdupq_n_f32, vdupq_n_s32, vdupq_n_u32, vfmaq_f32,
    vfmaq_n_f32, vld1q_f32, vld1q_u32, vshlq_u32, vst1q_f32,
};

/// Every 64-bit ARM machine has NEON.
pub const KERNELS: Kernels = Kernels { name: "NEON", accumulate, widen: portable::widen };

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
/// What [`run`](super::run) checks; `half` is below the panel's width, rows `first` to `first + R` are among `x.count`.
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
    let per_word = 32 / panel.bits;
    let mask = vdupq_n_u32((1 << panel.bits) - 1);
    let right = vdupq_n_s32(-(panel.bits as i32)); // a shift to the left by a negative number
    let mut sums = [[vdupq_n_f32(0.0); 4]; R];
    let x_first = x.data[first * x.stride..].as_ptr();
    let mut ahead = panel.ahead_by_word();
    for (word, line) in panel.codes.iter().skip(half).step_by(panel.width).enumerate() {
        let begin = word * per_word;
        if begin >= x.steps {
            break;
        }
        ahead.next().into_iter().for_each(prefetch);
        let mut words = [vdupq_n_u32(0); 4];
        for (word, line) in words.iter_mut().zip(line.chunks_exact(4)) {
            // SAFETY: a register holds 4 words.
            *word = unsafe { vld1q_u32(line.as_ptr()) };
        }
        for step in begin..x.steps.min(begin + per_word) {
            let (scale, zero) = (params.scales[step] * panel.unit, vdupq_n_f32(params.zeros[step]));
            let mut values = [zero; 4];
            for (value, word) in values.iter_mut().zip(&mut words) {
                let code = vcvtq_f32_u32(vandq_u32(*word, mask));
                *value = vfmaq_n_f32(zero, code, scale);
                *word = vshlq_u32(*word, right);
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: row first + r < x.count and step < x.steps lie in `x.data`.
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
            // SAFETY: `out` holds 4 numbers.
            unsafe {
                vst1q_f32(out.as_mut_ptr(), vaddq_f32(vld1q_f32(out.as_ptr()), sum));
            }
        }
    }
}
