//! Vector loops of attention, written once and dispatched to the widest instruction set of the CPU.

use longctx_simd::vector::{dot, silu};
use pulp::{Arch, Scalar, Simd, WithSimd};

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
    fn with_simd<S: Simd>(self, simd: S) {
        let (gate, gate_tail) = S::as_simd_f32s(self.gate);
        let (up, up_tail) = S::as_simd_f32s(self.up);
        let (out, out_tail) = S::as_mut_simd_f32s(self.out);
        for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
            *out = simd.mul_f32s(silu(simd, gate), up);
        }
        for ((out, &gate), &up) in out_tail.iter_mut().zip(gate_tail).zip(up_tail) {
            *out = silu(Scalar, gate) * up;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_lengths_have_no_lost_tail() {
        let x: Vec<f32> = (0..77).map(|i| i as f32).collect();
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
