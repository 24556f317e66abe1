//! TurboQuant's codes (arXiv 2504.19874): rotated numbers divided by their norm, each rounded to
//! the nearest Lloyd-Max level of a normal distribution.

use super::Quantizer;
use crate::Scheme;
use crate::levels;
use half::f16;
use longctx_simd::{dot, wide};

impl Quantizer {
    /// Quantizes the rows in `x`, with groups along channels.
    pub(super) fn lloyd_max(&mut self, columns: usize, scheme: Scheme, norm_correction: bool) {
        let Self { x, codes, scales, .. } = self;
        let levels = levels::lloyd_max(scheme.bits);
        for (x, codes) in Self::groups(x, codes, columns, scheme.group) {
            let norm = dot(x, x).sqrt();
            let root = (x.len() as f32).sqrt();
            // Levels have a variance of one; the mean square of the numbers is one divided by their
            // count.
            let mut middles = [f32::INFINITY; 15];
            for (middle, pair) in middles.iter_mut().zip(levels.windows(2)) {
                *middle = (pair[0] / root + pair[1] / root) / 2.0;
            }
            encode(x, norm + 1e-8, &middles, codes);
            let held = if norm_correction { norm_of(codes, levels) } else { root };
            scales.push(f16::from_f32(norm / held).min(f16::MAX));
        }
    }
}

/// Returns the norm of the codes' levels.
fn norm_of(codes: &[u8], levels: &[f32]) -> f32 {
    let square = |code: &u8| levels[usize::from(*code)] * levels[usize::from(*code)];
    codes.iter().map(square).sum::<f32>().sqrt()
}

wide! {
    /// Counts the midpoints between levels that are not above each number.
    fn encode(x: &'a [f32], norm: f32, middles: &'a [f32; 15], codes: &'a mut [u8]) -> () {
        for (x, code) in x.iter().zip(codes) {
            let y = *x / norm;
            *code = middles.iter().map(|middle| u8::from(y >= *middle)).sum();
        }
    }
}
