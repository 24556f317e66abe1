//! Token shift: mixes each row with the previous one, by a weight per channel.

use crate::mixer::Input;
use pulp::{Arch, Scalar, Simd, WithSimd};
use rayon::prelude::*;

/// Smallest number of elements for which several threads are used.
const PARALLEL: usize = 1 << 15;

/// Writes the previous row minus the current row, for every row. A sequence's state holds the row
/// before its first one and is updated to its last.
pub fn differences(x: Input<'_>, width: usize, states: &mut [&mut [f32]], out: &mut [f32]) {
    for (span, state) in x.spans.iter().zip(states) {
        let numbers = span.row * width..(span.row + span.tokens) * width;
        let (x, out) = (&x.x[numbers.clone()], &mut out[numbers]);
        let last = &mut state[..width];
        let (first, rest) = out.split_at_mut(width);
        first.iter_mut().zip(last.iter().zip(x)).for_each(|(d, (before, x))| *d = before - x);
        let pairs = x.iter().zip(&x[width..]);
        rest.iter_mut().zip(pairs).for_each(|(d, (before, x))| *d = before - x);
        last.copy_from_slice(&x[x.len() - width..]);
    }
}

/// Computes `out = x + differences ∘ weight`, with the same weights in every row.
pub fn mix(x: &[f32], differences: &[f32], weight: &[f32], out: &mut [f32]) {
    let width = weight.len();
    let run = |((out, x), d): ((&mut [f32], &[f32]), &[f32])| {
        Arch::new().dispatch(Mix { x, d, weight, out });
    };
    if out.len() <= PARALLEL {
        return run(((out, x), differences));
    }
    let rows = (PARALLEL / 2).div_ceil(width) * width;
    let parts = out.par_chunks_mut(rows).zip(x.par_chunks(rows)).zip(differences.par_chunks(rows));
    parts.for_each(run);
}

struct Mix<'a> {
    x: &'a [f32],
    d: &'a [f32],
    weight: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        #[inline(always)]
        fn run<S: Simd>(simd: S, x: &[S::f32s], d: &[S::f32s], w: &[S::f32s], out: &mut [S::f32s]) {
            for (((out, &x), &d), &w) in out.iter_mut().zip(x).zip(d).zip(w) {
                *out = simd.mul_add_f32s(d, w, x);
            }
        }
        let width = self.weight.len();
        let (w, w_tail) = S::as_simd_f32s(self.weight);
        let rows = self.x.chunks_exact(width).zip(self.d.chunks_exact(width));
        for (out, (x, d)) in self.out.chunks_exact_mut(width).zip(rows) {
            let (x, x_tail) = S::as_simd_f32s(x);
            let (d, d_tail) = S::as_simd_f32s(d);
            let (out, out_tail) = S::as_mut_simd_f32s(out);
            run(simd, x, d, w, out);
            run(Scalar, x_tail, d_tail, w_tail, out_tail);
        }
    }
}
