//! Elementwise functions on vectors of the CPU's width.
//!
//! Everything here is generic over [`Simd`] and always inlined: only code that is inlined into
//! `WithSimd::with_simd` is compiled for wide registers.

use pulp::{Arch, Scalar, Simd, WithSimd};
use rayon::prelude::*;

pub use longctx_simd::vector::{dot, exp, sigmoid, silu};

/// Smallest number of elements for which an elementwise function uses several threads.
const PARALLEL: usize = 1 << 15;

/// Returns ln(1 + e^x), as max(x, 0) + ln(1 + u) with u = e^-|x|, and ln(1 + u) = 2 artanh(u / (2 +
/// u)).
#[inline(always)]
pub fn softplus<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let c = |x| simd.splat_f32s(x);
    let u = exp(simd, simd.neg_f32s(simd.abs_f32s(x)));
    let s = simd.div_f32s(u, simd.add_f32s(u, c(2.0)));
    let square = simd.mul_f32s(s, s);
    let mut series = c(1.0 / 15.0);
    for odd in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = simd.mul_add_f32s(series, square, c(1.0 / odd));
    }
    let log = simd.mul_f32s(simd.add_f32s(s, s), series);
    simd.add_f32s(simd.max_f32s(x, c(0.0)), log)
}

/// A function of one number.
pub trait UnaryFn: Copy + Send + Sync {
    fn at<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s;
}

/// A function of two numbers.
pub trait BinaryFn: Copy + Send + Sync {
    fn at<S: Simd>(self, simd: S, a: S::f32s, b: S::f32s) -> S::f32s;
}

/// Declares functions of one or two numbers as types for [`map`] and [`zip`].
macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident: $trait:ident |$simd:ident, $($x:ident),+| $body:expr;)+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $name;

        impl $trait for $name {
            #[inline(always)]
            fn at<S: Simd>(self, $simd: S, $($x: S::f32s),+) -> S::f32s {
                $body
            }
        }
    )+};
}

functions! {
    /// e^x.
    Exp: UnaryFn |simd, x| exp(simd, x);
    /// tanh x = 2 / (1 + e^-2x) − 1.
    Tanh: UnaryFn |simd, x| {
        let gate = sigmoid(simd, simd.add_f32s(x, x));
        simd.mul_add_f32s(gate, simd.splat_f32s(2.0), simd.splat_f32s(-1.0))
    };
    /// ln(1 + e^x).
    Softplus: UnaryFn |simd, x| softplus(simd, x);
    /// 1 / (1 + e^-x).
    Sigmoid: UnaryFn |simd, x| sigmoid(simd, x);
    /// max(x, 0)².
    SquaredRelu: UnaryFn |simd, x| {
        let x = simd.max_f32s(x, simd.splat_f32s(0.0));
        simd.mul_f32s(x, x)
    };
    /// a + b.
    Add: BinaryFn |simd, a, b| simd.add_f32s(a, b);
    /// a b.
    Mul: BinaryFn |simd, a, b| simd.mul_f32s(a, b);
    /// a / (1 + e^-b).
    MulSigmoid: BinaryFn |simd, a, b| simd.mul_f32s(a, sigmoid(simd, b));
    /// a silu(b).
    MulSilu: BinaryFn |simd, a, b| simd.mul_f32s(a, silu(simd, b));
    /// a gelu(b), in the tanh approximation, written as a sigmoid: (1 + tanh y) / 2 = 1 / (1 +
    /// e^-2y).
    MulGelu: BinaryFn |simd, a, b| {
        let cubic = simd.mul_f32s(simd.mul_f32s(b, b), simd.splat_f32s(0.044715));
        let inner = simd.mul_add_f32s(cubic, b, b);
        let y = simd.mul_f32s(inner, simd.splat_f32s(1.595_769));
        simd.mul_f32s(a, simd.mul_f32s(b, sigmoid(simd, y)))
    };
}

/// c tanh(x / c), by tanh y = 2 / (1 + e^-2y) − 1.
#[derive(Clone, Copy)]
pub struct SoftCap(pub f32);

impl UnaryFn for SoftCap {
    #[inline(always)]
    fn at<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        let gate = sigmoid(simd, simd.mul_f32s(x, simd.splat_f32s(2.0 / self.0)));
        simd.mul_add_f32s(gate, simd.splat_f32s(2.0 * self.0), simd.splat_f32s(-self.0))
    }
}

/// Computes `x[i] = f(x[i])`.
pub fn map(f: impl UnaryFn, x: &mut [f32]) {
    let run = |x: &mut [f32]| Arch::new().dispatch(MapAll { f, x });
    match x.len() > PARALLEL {
        true => x.par_chunks_mut(PARALLEL / 2).for_each(run),
        false => run(x),
    }
}

/// Computes `a[i] = f(a[i], b[i])`.
pub fn zip(f: impl BinaryFn, a: &mut [f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "two slices of one length");
    let run = |a: &mut [f32], b: &[f32]| Arch::new().dispatch(ZipAll { f, a, b });
    match a.len() > PARALLEL {
        true => {
            let chunks = a.par_chunks_mut(PARALLEL / 2).zip(b.par_chunks(PARALLEL / 2));
            chunks.for_each(|(a, b)| run(a, b));
        }
        false => run(a, b),
    }
}

struct MapAll<'a, F> {
    f: F,
    x: &'a mut [f32],
}

impl<F: UnaryFn> WithSimd for MapAll<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (head, tail) = S::as_mut_simd_f32s(self.x);
        for x in head {
            *x = self.f.at(simd, *x);
        }
        for x in tail {
            *x = self.f.at(Scalar, *x);
        }
    }
}

struct ZipAll<'a, F> {
    f: F,
    a: &'a mut [f32],
    b: &'a [f32],
}

impl<F: BinaryFn> WithSimd for ZipAll<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (a, a_tail) = S::as_mut_simd_f32s(self.a);
        let (b, b_tail) = S::as_simd_f32s(self.b);
        for (a, &b) in a.iter_mut().zip(b) {
            *a = self.f.at(simd, *a, b);
        }
        for (a, &b) in a_tail.iter_mut().zip(b_tail) {
            *a = self.f.at(Scalar, *a, b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Vec<f32> {
        (-3000..3000).map(|i| i as f32 * 0.0297).collect()
    }

    /// Checks a function on full vectors and on the remainder.
    fn check(f: impl UnaryFn, want: impl Fn(f64) -> f64, tolerance: f64) {
        for len in [6000, 5] {
            let x = &grid()[..len];
            let mut got = x.to_vec();
            map(f, &mut got);
            for (&x, &got) in x.iter().zip(&got) {
                let want = want(x.into());
                let error = (f64::from(got) - want).abs();
                assert!(error <= tolerance * want.abs() + 1e-37, "at {x}: {got}, not {want}");
            }
        }
    }

    #[test]
    fn functions_are_close_to_f64() {
        let bound = |x: f64| x.min(88.0).exp() * f64::from(u8::from(x >= -87.0));
        check(Exp, bound, 3e-7);
        check(
            Softplus,
            |x| if x < -87.0 { 0.0 } else { x.max(0.0) + (-x.abs()).exp().ln_1p() },
            4e-7,
        );
        check(Sigmoid, |x| 1.0 / (1.0 + (-x).min(88.0).exp()), 4e-7);
        check(SoftCap(30.0), |x| 30.0 * (x / 30.0).tanh(), 1e-4);
        let mut small = grid();
        map(Tanh, &mut small);
        assert!(grid().iter().zip(&small).all(|(x, y)| (x.tanh() - y).abs() < 1e-6));
        check(SquaredRelu, |x| x.max(0.0).powi(2), 2e-7);
    }

    #[test]
    fn gates_equal_their_definitions() {
        let b = grid();
        let mut a = vec![2.0; b.len()];
        zip(MulGelu, &mut a, &b);
        for (&got, &b) in a.iter().zip(&b) {
            let b = f64::from(b);
            let y = (2.0 / std::f64::consts::PI).sqrt() * (b + 0.044715 * b.powi(3));
            assert!((f64::from(got) - b * (1.0 + y.tanh())).abs() < 1e-4);
        }
        let mut a = vec![2.0; b.len()];
        zip(MulSilu, &mut a, &b);
        for (&got, &b) in a.iter().zip(&b) {
            let b = f64::from(b);
            assert!((f64::from(got) - 2.0 * b / (1.0 + (-b).exp())).abs() < 1e-4);
        }
    }
}
