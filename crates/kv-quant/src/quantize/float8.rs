//! 8-bit floating-point codes: PyTorch's casts from f32, except that numbers beyond the largest
//! saturate.

use super::Quantizer;
use crate::{Float8, StaticScale};
use half::f16;
use longctx_simd::{fold_lanes, wide};

impl Quantizer {
    /// Quantizes the rows in `x`, with groups along channels.
    pub(super) fn float8(
        &mut self,
        columns: usize,
        group: usize,
        kind: Float8,
        scale: Option<StaticScale>,
    ) {
        let Self { x, codes, scales, .. } = self;
        if let Some(scale) = scale {
            return encode(x, scale.get(), kind, codes);
        }
        for (x, codes) in Self::groups(x, codes, columns, group) {
            let scale = f16::from_f32(magnitude(x) / kind.max());
            // A group that is too small for a scale becomes zeros.
            let divisor = if scale == f16::ZERO { f32::INFINITY } else { scale.to_f32() };
            encode(x, divisor, kind, codes);
            scales.push(scale);
        }
    }
}

wide! {
    /// Returns the largest magnitude.
    fn magnitude(x: &'a [f32]) -> f32 {
        fold_lanes(x, 0.0, |a, b| if b.abs() > a.abs() { b.abs() } else { a.abs() })
    }
}

wide! {
    fn encode(x: &'a [f32], divisor: f32, kind: Float8, codes: &'a mut [u8]) -> () {
        match kind {
            Float8::E4m3 => {
                for (x, code) in x.iter().zip(codes) {
                    *code = cast::<3, 7>(*x / divisor, 448.0);
                }
            }
            Float8::E5m2 => {
                for (x, code) in x.iter().zip(codes) {
                    *code = cast::<2, 15>(*x / divisor, 57344.0);
                }
            }
        }
    }
}

/// Rounds to the nearest number with `MANTISSA` bits of mantissa and an exponent bias of `BIAS`,
/// ties to even.
#[inline(always)]
fn cast<const MANTISSA: u32, const BIAS: u32>(x: f32, largest: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let x = x.abs();
    let x = if x > largest { largest } else { x };
    // Subnormal numbers are multiples of the smallest one; adding this constant makes it the last
    // place.
    let magic = f32::from_bits((127 + 23 + 1 - BIAS - MANTISSA) << 23) * 1.5;
    let small = (x + magic).to_bits() as u8;
    let cut = 23 - MANTISSA;
    let bits = x.to_bits();
    let rounded = bits.wrapping_add((1 << (cut - 1)) - 1 + (bits >> cut & 1)) >> cut;
    let normal = rounded.wrapping_sub((127 - BIAS) << MANTISSA) as u8;
    let min_normal = f32::from_bits((128 - BIAS) << 23);
    sign | if x < min_normal { small & 0x7f } else { normal }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::levels::float8;

    /// Every finite code's number gives the code back, and numbers between are rounded to the
    /// nearest.
    #[test]
    fn casts_are_to_the_nearest() {
        for kind in [Float8::E4m3, Float8::E5m2] {
            let of = |x: f32| {
                let mut code = [0];
                encode(&[x], 1.0, kind, &mut code);
                code[0]
            };
            let last = of(kind.max());
            for code in 0..last {
                let (a, b) = (float8(kind, code), float8(kind, code + 1));
                assert!(a < b, "{code}");
                assert_eq!((of(a), of(-a)), (code, code | 0x80));
                let (tie, even) = ((a + b) / 2.0, code + code % 2);
                assert_eq!(of(tie), even, "{kind:?} {code}");
                assert_eq!(of(tie * (1.0 - f32::EPSILON)), code, "{kind:?} {code}");
                assert_eq!(of(tie * (1.0 + f32::EPSILON)), code + 1, "{kind:?} {code}");
            }
            assert_eq!(of(1e9), last);
            assert_eq!(float8(kind, last), kind.max());
        }
    }
}
