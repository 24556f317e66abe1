#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

#[cfg(feature = "gemm")]
pub mod matrix;
pub mod vector;

pub use pulp;

/// Defines a public function whose body is compiled for each instruction set and dispatched to the
/// widest one of the CPU. References have the lifetime `'a`.
///
/// `fn name[simd](…)` names the instruction set, a [`Simd`](pulp::Simd), for functions of
/// [`vector`].
///
/// Only code that is inlined into `with_simd` of a struct is compiled for wide registers; the body
/// of a closure is compiled for the baseline target.
#[macro_export]
macro_rules! wide {
    ($(#[$doc:meta])* fn $name:ident $([$simd:ident])? ($($arg:ident: $type:ty),* $(,)?) -> $out:ty $body:block) => {
        $(#[$doc])*
        pub fn $name<'a>($($arg: $type),*) -> $out {
            struct Loop<'a>($($type),*);
            impl<'a> $crate::pulp::WithSimd for Loop<'a> {
                type Output = $out;

                #[inline(always)]
                fn with_simd<S: $crate::pulp::Simd>(self, _simd: S) -> $out {
                    $(let $simd = _simd;)?
                    let Self($($arg),*) = self;
                    $body
                }
            }
            $crate::pulp::Arch::new().dispatch(Loop($($arg),*))
        }
    };
}

wide! {
    /// Returns `a · b` of slices of equal length.
    fn dot[simd](a: &'a [f32], b: &'a [f32]) -> f32 {
        vector::dot(simd, a, b)
    }
}

wide! {
    /// Computes `out += weight * x`. Elements beyond the shorter slice are ignored.
    fn add_scaled(weight: f32, x: &'a [f32], out: &'a mut [f32]) -> () {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += weight * x);
    }
}

wide! {
    /// Computes `out += x`. Elements beyond the shorter slice are ignored.
    fn add(x: &'a [f32], out: &'a mut [f32]) -> () {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += x);
    }
}

wide! {
    /// Multiplies every element of `x` by `factor`.
    fn scale(x: &'a mut [f32], factor: f32) -> () {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

wide! {
    /// Returns the sum of `x`.
    fn sum(x: &'a [f32]) -> f32 {
        fold_lanes(x, 0.0, |a, b| a + b)
    }
}

wide! {
    /// Returns the maximum of `x`; -inf if it is empty.
    fn max(x: &'a [f32]) -> f32 {
        fold_lanes(x, f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }
}

wide! {
    /// Replaces each x by `exp(x - shift)` and returns their sum.
    fn exp_sum[simd](x: &'a mut [f32], shift: f32) -> f32 {
        vector::exp_sum(simd, x, shift)
    }
}

/// Folds `x` with 32 independent accumulators. The compiler may not reorder float operations, so
/// this order is one that vectorizes.
#[inline(always)]
pub fn fold_lanes(x: &[f32], start: f32, fold: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
    let mut acc = [start; 32];
    let chunks = x.chunks_exact(32);
    let tail = chunks.remainder().iter().copied().fold(start, fold);
    for chunk in chunks {
        for (a, &x) in acc.iter_mut().zip(chunk) {
            *a = fold(*a, x);
        }
    }
    fold(tail, halve(acc, fold))
}

/// Reduces 32 numbers to one by repeatedly folding the upper half onto the lower, an order that
/// vectorizes.
#[inline(always)]
fn halve(mut acc: [f32; 32], fold: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            acc[i] = fold(acc[i], acc[i + half]);
        }
    }
    acc[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_lengths_have_no_lost_tail() {
        let x: Vec<f32> = (0..77).map(|i| i as f32).collect();
        assert_eq!(max(&x), 76.0);
        assert_eq!(sum(&x), 76.0 * 77.0 / 2.0);
        assert_eq!(dot(&x, &x), x.iter().map(|x| x * x).sum::<f32>());
        let mut exponentials: Vec<f32> = x.iter().map(|x| -x).collect();
        let sum = exp_sum(&mut exponentials, 1.0);
        assert!(exponentials.iter().zip(&x).all(|(y, x)| (y - (-x - 1.0).exp()).abs() < 1e-6));
        assert!((sum - exponentials.iter().sum::<f32>()).abs() < 1e-6);
    }
}
