//! Loops over slices, written once and compiled for the widest instructions that the machine has.

use pulp::{Arch, Simd, WithSimd};

/// Defines a function whose body is compiled once for each instruction set, and run with the widest that the machine has. Only what is
/// inlined into `with_simd` of a struct is; the body of a closure would be compiled for the oldest processors alone.
macro_rules! wide {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) -> $out:ty $body:block) => {
        $(#[$doc])*
        pub fn $name<'a>($($arg: $type),*) -> $out {
            struct Loop<'a>($($type),*);
            impl<'a> WithSimd for Loop<'a> {
                type Output = $out;

                #[inline(always)]
                fn with_simd<S: Simd>(self, _: S) -> $out {
                    let Self($($arg),*) = self;
                    $body
                }
            }
            Arch::new().dispatch(Loop($($arg),*))
        }
    };
}
pub(crate) use wide;

wide! {
    /// `out += sums * scales + total * zeros`.
    fn scale_and_add(sums: &'a [f32], scales: &'a [f32], zeros: &'a [f32], total: f32, out: &'a mut [f32]) -> () {
        for (((out, sum), scale), zero) in out.iter_mut().zip(sums).zip(scales).zip(zeros) {
            *out += sum * scale + total * zero;
        }
    }
}

wide! {
    /// `out += sums * factors`.
    fn multiply_and_add(sums: &'a [f32], factors: &'a [f32], out: &'a mut [f32]) -> () {
        for ((out, sum), factor) in out.iter_mut().zip(sums).zip(factors) {
            *out += sum * factor;
        }
    }
}

wide! {
    /// `a · b`.
    fn dot(a: &'a [f32], b: &'a [f32]) -> f32 {
        dot_lanes(a, b)
    }
}

wide! {
    /// `out += weight * x`.
    fn add_scaled(weight: f32, x: &'a [f32], out: &'a mut [f32]) -> () {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += weight * x);
    }
}

wide! {
    /// `out += x`.
    fn add(x: &'a [f32], out: &'a mut [f32]) -> () {
        out.iter_mut().zip(x).for_each(|(out, x)| *out += x);
    }
}

wide! {
    /// Multiplies each of `x` by `factor`.
    fn scale(x: &'a mut [f32], factor: f32) -> () {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

wide! {
    /// The sum of `x`.
    fn sum(x: &'a [f32]) -> f32 {
        lanes(x, 0.0, |a, b| a + b)
    }
}

wide! {
    /// The largest of `x`; -inf if there is none.
    fn max(x: &'a [f32]) -> f32 {
        lanes(x, f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }
}

wide! {
    /// Replaces each x by `exp(x - shift)` and returns their sum.
    fn exp_sum(x: &'a mut [f32], shift: f32) -> f32 {
        x.iter_mut().for_each(|x| *x = exp(*x - shift));
        lanes(x, 0.0, |a, b| a + b)
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

/// Folds with 32 independent accumulators: the compiler may not reorder float operations, so the order is made one that
/// vectors can follow.
#[inline(always)]
pub fn lanes(x: &[f32], start: f32, fold: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
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

/// Folds 32 numbers into one, half onto half: the order that vectors can follow.
#[inline(always)]
fn halve(mut acc: [f32; 32], fold: impl Fn(f32, f32) -> f32) -> f32 {
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            acc[i] = fold(acc[i], acc[i + half]);
        }
    }
    acc[0]
}

/// e^x for x ≤ 0 to about 2 units in the last place: x = n ln 2 + r, a polynomial of degree 6 in r, and n added to the
/// exponent's bits. Below -87, where the result would be no normal number, it is zero.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 in two parts, so that n ln 2 is exact enough to subtract.
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
