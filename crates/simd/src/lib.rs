#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub use pulp;

/// Defines a public function whose body is compiled for each instruction set and dispatched to the
/// widest one of the CPU. References have the lifetime `'a`.
///
/// Only code that is inlined into `with_simd` of a struct is compiled for wide registers; the body
/// of a closure is compiled for the baseline target.
#[macro_export]
macro_rules! wide {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $out:ty $body:block) => {
        $(#[$doc])*
        pub fn $name<'a>($($arg: $type),*) -> $out {
            struct Loop<'a>($($type),*);
            impl<'a> $crate::pulp::WithSimd for Loop<'a> {
                type Output = $out;

                #[inline(always)]
                fn with_simd<S: $crate::pulp::Simd>(self, _: S) -> $out {
                    let Self($($arg),*) = self;
                    $body
                }
            }
            $crate::pulp::Arch::new().dispatch(Loop($($arg),*))
        }
    };
}

wide! {
    /// Returns `a · b`.
    fn dot(a: &'a [f32], b: &'a [f32]) -> f32 {
        dot_lanes(a, b)
    }
}

wide! {
    /// Computes `out += weight * x`.
    fn add_scaled(weight: f32, x: &'a [f32], out: &'a mut [f32]) -> () {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += weight * x);
    }
}

wide! {
    /// Computes `out += x`.
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
    fn exp_sum(x: &'a mut [f32], shift: f32) -> f32 {
        x.iter_mut().for_each(|x| *x = exp(*x - shift));
        fold_lanes(x, 0.0, |a, b| a + b)
    }
}

#[inline(always)]
fn dot_lanes(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0; 32];
    let (a, b) = (a.chunks_exact(32), b.chunks_exact(32));
    let tail: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        for ((acc, a), b) in acc.iter_mut().zip(a).zip(b) {
            *acc += a * b;
        }
    }
    tail + halve(acc, |a, b| a + b)
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

/// Returns e^x for x ≤ 0 with an error of about 2 units in the last place. x = n ln 2 + r, a
/// polynomial of degree 6 in r, and n added to the exponent bits. Below -87, where the result would
/// be subnormal, it is zero.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 is split into two parts so that the subtraction of n ln 2 is accurate.
    let r = (clamped - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut poly = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        poly = poly * r + c;
    }
    let value = f32::from_bits(poly.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x > -87.0 { value } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_standard_library() {
        let count = if cfg!(miri) { 1000 } else { 100_000 };
        for i in 0..count {
            let x = -87.0 * i as f32 / count as f32;
            let (got, want) = (exp(x), x.exp());
            assert!((got - want).abs() <= 4.0 * f32::EPSILON * want, "exp({x}): {got}, not {want}");
        }
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn odd_lengths_have_no_lost_tail() {
        let x: Vec<f32> = (0..77).map(|i| i as f32).collect();
        assert_eq!(max(&x), 76.0);
        assert_eq!(sum(&x), 76.0 * 77.0 / 2.0);
        assert_eq!(dot(&x, &x), x.iter().map(|x| x * x).sum::<f32>());
    }
}
