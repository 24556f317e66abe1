//! Operations on vectors of the CPU's width, for loops within [`WithSimd`](pulp::WithSimd).
//!
//! All are always inlined: only code that is inlined into `with_simd` is compiled for wide
//! registers.

use pulp::Simd;

/// Returns e^x with an error of about 2 units in the last place: x = n ln 2 + r, a polynomial of
/// degree 6 in r, and n added to the exponent bits. Zero below -87, where the result would be
/// subnormal, and at most e^88.
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let c = |x| simd.splat_f32s(x);
    // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let clamped = simd.min_f32s(simd.max_f32s(x, c(-87.0)), c(88.0));
    let shifted = simd.mul_add_f32s(clamped, c(std::f32::consts::LOG2_E), c(MAGIC));
    let n = simd.sub_f32s(shifted, c(MAGIC));
    // ln 2 is split into two parts so that the subtraction of n ln 2 is accurate.
    let r = simd.mul_add_f32s(n, c(-0.693_359_4), clamped);
    let r = simd.mul_add_f32s(n, c(2.121_944_4e-4), r);
    let mut poly = c(1.0 / 720.0);
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        poly = simd.mul_add_f32s(poly, r, c(coefficient));
    }
    let exponent =
        simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    let value = simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(poly), exponent));
    let tiny = simd.less_than_f32s(x, c(-87.0));
    simd.select_f32s(tiny, c(0.0), value)
}

/// Returns 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    simd.div_f32s(one, simd.add_f32s(one, exp(simd, simd.neg_f32s(x))))
}

/// Returns x / (1 + e^-x).
#[inline(always)]
pub fn silu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // The exponential of a number ≤ 0 cannot overflow.
    let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
    let t = exp(simd, simd.neg_f32s(simd.abs_f32s(x)));
    let numerator = simd.select_f32s(simd.less_than_f32s(zero, x), one, t);
    simd.div_f32s(simd.mul_f32s(x, numerator), simd.add_f32s(one, t))
}

/// Returns `a · b` of slices of equal length, with four accumulators.
#[inline(always)]
pub fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len(), "lengths of a dot product");
    let (a, a_tail) = S::as_simd_f32s(a);
    let (b, b_tail) = S::as_simd_f32s(b);
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (a_four, a_rest) = a.as_chunks::<4>();
    let (b_four, b_rest) = b.as_chunks::<4>();
    for (a, b) in a_four.iter().zip(b_four) {
        for i in 0..4 {
            sums[i] = simd.mul_add_f32s(a[i], b[i], sums[i]);
        }
    }
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        sums[0] = simd.mul_add_f32s(a, b, sums[0]);
    }
    sum(simd, sums) + a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum::<f32>()
}

/// Replaces each x by `exp(x - shift)` and returns their sum.
#[inline(always)]
pub(crate) fn exp_sum<S: Simd>(simd: S, x: &mut [f32], shift: f32) -> f32 {
    let (head, tail) = S::as_mut_simd_f32s(x);
    let shifts = simd.splat_f32s(shift);
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (four, rest) = head.as_chunks_mut::<4>();
    for x in four {
        for i in 0..4 {
            x[i] = exp(simd, simd.sub_f32s(x[i], shifts));
            sums[i] = simd.add_f32s(sums[i], x[i]);
        }
    }
    for x in rest {
        *x = exp(simd, simd.sub_f32s(*x, shifts));
        sums[0] = simd.add_f32s(sums[0], *x);
    }
    let mut total = sum(simd, sums);
    for x in tail {
        *x = exp(pulp::Scalar, *x - shift);
        total += *x;
    }
    total
}

#[inline(always)]
fn sum<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; 4]) -> f32 {
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::Scalar;

    #[test]
    fn exp_is_close_to_the_standard_library() {
        let count = if cfg!(miri) { 1000 } else { 100_000 };
        for i in 0..count {
            let x = 88.0 - 175.0 * i as f32 / count as f32;
            let (got, want) = (exp(Scalar, x), x.exp());
            assert!((got - want).abs() <= 4.0 * f32::EPSILON * want, "exp({x}): {got}, not {want}");
        }
        assert_eq!(exp(Scalar, f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(Scalar, 0.0), 1.0);
    }

    #[test]
    fn silu_is_close_to_f64_and_does_not_overflow() {
        for i in -800..800 {
            let x = i as f32 / 10.0;
            let want = f64::from(x) / (1.0 + f64::from(-x).exp());
            let got = f64::from(silu(Scalar, x));
            assert!((got - want).abs() <= 1e-6 * want.abs() + 1e-30, "silu({x}): {got}");
        }
        assert_eq!((silu(Scalar, -1e38), silu(Scalar, 1e38)), (0.0, 1e38));
    }
}
