//! Symmetric integers as in GGML's `q4_0`: the number with the largest magnitude, with its sign, is
//! mapped to the lowest code, so that all codes are used.

use super::Quantizer;
use crate::Scheme;
use half::f16;
use longctx_simd::wide;

impl Quantizer {
    /// Quantizes the rows in `x`.
    pub(super) fn symmetric(&mut self, columns: usize, scheme: Scheme) {
        let Self { x, codes, scales, .. } = self;
        let half = (1 << (scheme.bits.count() - 1)) as f32;
        for (x, codes) in Self::groups(x, codes, columns, scheme.group) {
            let scale = farthest(x) / -half;
            let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
            encode(x, inverse, half, codes);
            scales.push(f16::from_f32(scale));
        }
    }
}

/// Returns the number with the largest magnitude, the first of several.
fn farthest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |far: f32, &x| if x.abs() > far.abs() { x } else { far })
}

wide! {
    /// Rounds half up.
    fn encode(x: &'a [f32], inverse: f32, half: f32, codes: &'a mut [u8]) -> () {
        let largest = 2.0 * half - 1.0;
        for (x, code) in x.iter().zip(codes) {
            let step = *x * inverse + (half + 0.5);
            let step = if step > largest { largest } else { step };
            *code = step as i32 as u8;
        }
    }
}
