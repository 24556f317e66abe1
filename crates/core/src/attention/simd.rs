//! Vector loops of attention, written once and dispatched to the widest instruction set of the CPU.

use pulp::{Arch, Simd, WithSimd};

/// Computes `out[r * stride + j] = q[r] · k[j]` for a few query rows. Each key is loaded once for
/// all rows.
pub fn scores(q: &[f32], k: &[f32], head_dim: usize, out: &mut [f32], stride: usize) {
    Arch::new().dispatch(Scores { q, k, head_dim, out, stride });
}

struct Scores<'a> {
    q: &'a [f32],
    k: &'a [f32],
    head_dim: usize,
    out: &'a mut [f32],
    stride: usize,
}

impl WithSimd for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (j, k) in self.k.chunks_exact(self.head_dim).enumerate() {
            for (r, q) in self.q.chunks_exact(self.head_dim).enumerate() {
                self.out[r * self.stride + j] = dot(simd, q, k);
            }
        }
    }
}

#[inline(always)]
fn dot<S: Simd>(simd: S, a: &[f32], b: &[f32]) -> f32 {
    let (a_head, a_tail) = S::as_simd_f32s(a);
    let (b_head, b_tail) = S::as_simd_f32s(b);
    // Two accumulators, so that a multiply-add does not wait for the previous one.
    let mut sums = [simd.splat_f32s(0.0); 2];
    for (i, (&x, &y)) in a_head.iter().zip(b_head).enumerate() {
        sums[i % 2] = simd.mul_add_f32s(x, y, sums[i % 2]);
    }
    let head = simd.reduce_sum_f32s(simd.add_f32s(sums[0], sums[1]));
    head + a_tail.iter().zip(b_tail).map(|(x, y)| x * y).sum::<f32>()
}

/// Computes `out[r] += Σ_j p[r * stride + j] v[j]` for a few query rows. Each value is loaded once
/// for all rows.
pub fn accumulate(p: &[f32], stride: usize, v: &[f32], head_dim: usize, out: &mut [f32]) {
    Arch::new().dispatch(Accumulate { p, stride, v, head_dim, out });
}

struct Accumulate<'a> {
    p: &'a [f32],
    stride: usize,
    v: &'a [f32],
    head_dim: usize,
    out: &'a mut [f32],
}

impl WithSimd for Accumulate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (j, v) in self.v.chunks_exact(self.head_dim).enumerate() {
            let (v_head, v_tail) = S::as_simd_f32s(v);
            for (r, out) in self.out.chunks_exact_mut(self.head_dim).enumerate() {
                let p = self.p[r * self.stride + j];
                let weight = simd.splat_f32s(p);
                let (out_head, out_tail) = S::as_mut_simd_f32s(out);
                for (o, &x) in out_head.iter_mut().zip(v_head) {
                    *o = simd.mul_add_f32s(weight, x, *o);
                }
                for (o, &x) in out_tail.iter_mut().zip(v_tail) {
                    *o += p * x;
                }
            }
        }
    }
}

/// Returns the maximum of `x`; -inf if it is empty.
pub fn max(x: &[f32]) -> f32 {
    Arch::new().dispatch(Max(x))
}

// These are structs and not closures: only code that is inlined into `with_simd` is compiled for
// wide registers. The body of a closure was measured to be compiled for the baseline target.
struct Max<'a>(&'a [f32]);

impl WithSimd for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        fold_lanes(self.0, f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }
}

/// Replaces each x by `exp(x - shift)` and returns their sum.
pub fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    Arch::new().dispatch(ExpSum(x, shift))
}

struct ExpSum<'a>(&'a mut [f32], f32);

impl WithSimd for ExpSum<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        let ExpSum(x, shift) = self;
        for x in x.iter_mut() {
            *x = exp(*x - shift);
        }
        fold_lanes(x, 0.0, |a, b| a + b)
    }
}

/// Computes `out[i] = silu(gate[i]) * up[i]`.
pub fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    Arch::new().dispatch(SiluMul { gate, up, out });
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for ((out, &x), &up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            // The exponential of a number ≤ 0 cannot overflow.
            let t = exp(-x.abs());
            let numerator = if x > 0.0 { 1.0 } else { t };
            *out = x * numerator / (1.0 + t) * up;
        }
    }
}

/// Multiplies every element of `x` by `factor`.
pub fn scale(x: &mut [f32], factor: f32) {
    Arch::new().dispatch(Scale(x, factor));
}

struct Scale<'a>(&'a mut [f32], f32);

impl WithSimd for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for x in self.0 {
            *x *= self.1;
        }
    }
}

/// Adds `x` to `sums` element by element.
pub fn add(sums: &mut [f32], x: &[f32]) {
    Arch::new().dispatch(Add(sums, x));
}

struct Add<'a>(&'a mut [f32], &'a [f32]);

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (sum, x) in self.0.iter_mut().zip(self.1) {
            *sum += x;
        }
    }
}

/// Folds `x` with 32 independent accumulators. The compiler may not reorder float operations, so
/// this order is one that vectorizes.
#[inline(always)]
fn fold_lanes(x: &[f32], start: f32, fold: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
    let mut acc = [start; 32];
    let chunks = x.chunks_exact(32);
    let tail = chunks.remainder().iter().copied().fold(start, fold);
    for chunk in chunks {
        for (a, &x) in acc.iter_mut().zip(chunk) {
            *a = fold(*a, x);
        }
    }
    acc.into_iter().fold(tail, fold)
}

/// Returns e^x for x ≤ 0 with an error of about 2 units in the last place. x = n ln 2 + r, a
/// polynomial of degree 6 in r, and n added to the exponent bits. Below e^-87, near the smallest
/// normal number, the result is zero.
#[inline(always)]
fn exp(x: f32) -> f32 {
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
        for i in 0..100_000 {
            let x = -87.0 * i as f32 / 100_000.0;
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
        assert_eq!(fold_lanes(&x, 0.0, |a, b| a + b), 76.0 * 77.0 / 2.0);
        let (q, k) = (&x[..2 * 7], &x[7..5 * 7]);
        let mut out = [0.0; 8];
        scores(q, k, 7, &mut out, 4);
        for (r, q) in q.chunks(7).enumerate() {
            for (j, k) in k.chunks(7).enumerate() {
                let want: f32 = q.iter().zip(k).map(|(a, b)| a * b).sum();
                assert_eq!(out[r * 4 + j], want);
            }
        }
        let mut sum = [1.0; 14];
        accumulate(&out, 4, k, 7, &mut sum);
        let want =
            |r: usize, c: usize| 1.0 + (0..4).map(|j| out[r * 4 + j] * k[j * 7 + c]).sum::<f32>();
        assert!((sum[9] - want(1, 2)).abs() <= 1e-6 * sum[9]);
    }
}
