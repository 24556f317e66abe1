//! Asymmetric integers in f32 arithmetic, rounding half up, as vLLM's TurboQuant quantizes values.

use super::Quantizer;
use crate::{Axis, Scheme};
use half::f16;
use longctx_simd::{fold_lanes, wide};

/// The smallest scale.
const MIN_SCALE: f32 = 1e-8;

impl Quantizer {
    /// Quantizes the rows in `x`.
    pub(super) fn uniform(&mut self, columns: usize, scheme: Scheme) {
        let largest = scheme.bits.max_code() as f32;
        if scheme.axis == Axis::Tokens {
            return self.uniform_columns(columns, largest);
        }
        let Self { x, codes, scales, zero_points, .. } = self;
        for (x, codes) in Self::groups(x, codes, columns, scheme.group) {
            let (min, max) = extremes(x);
            let scale = ((max - min) / largest).max(MIN_SCALE);
            encode_row(x, min, scale, largest, codes);
            scales.push(f16::from_f32(scale));
            zero_points.push(f16::from_f32(min));
        }
    }

    fn uniform_columns(&mut self, columns: usize, largest: f32) {
        let Self { x, codes, scales, zero_points, .. } = self;
        for column in 0..columns {
            let numbers = || x[column..].iter().step_by(columns);
            let min = numbers().copied().fold(f32::INFINITY, f32::min);
            let max = numbers().copied().fold(f32::NEG_INFINITY, f32::max);
            let scale = ((max - min) / largest).max(MIN_SCALE);
            let codes = codes[column..].iter_mut().step_by(columns);
            numbers().zip(codes).for_each(|(x, code)| *code = encode(*x, min, scale, largest));
            scales.push(f16::from_f32(scale));
            zero_points.push(f16::from_f32(min));
        }
    }
}

wide! {
    /// Returns the minimum and maximum.
    fn extremes(x: &'a [f32]) -> (f32, f32) {
        let min = fold_lanes(x, f32::INFINITY, |a, b| if b < a { b } else { a });
        (min, fold_lanes(x, f32::NEG_INFINITY, |a, b| if b > a { b } else { a }))
    }
}

wide! {
    fn encode_row(x: &'a [f32], zero: f32, scale: f32, largest: f32, codes: &'a mut [u8]) -> () {
        for (x, code) in x.iter().zip(codes) {
            *code = encode(*x, zero, scale, largest);
        }
    }
}

#[inline(always)]
fn encode(x: f32, zero: f32, scale: f32, largest: f32) -> u8 {
    let step = (x - zero) / scale + 0.5;
    let step = if step > largest { largest } else { step };
    step as i32 as u8
}
