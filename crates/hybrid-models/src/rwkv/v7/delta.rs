//! The delta rule's recurrence, token by token, with vectors along the values.
//!
//! The state is `[heads, keys, values]`. A token reads a head's state twice from the L1 cache: once
//! for its product with the removal key, once to update it and compute the output.

use crate::matrix::Rows;
use crate::split_columns::{Columns, UnitMatrix, split_columns};
use pulp::{Arch, Scalar, Simd, WithSimd};

/// Smallest number of tokens x channels for which several threads are used.
const PARALLEL: usize = 1 << 11;

/// The inputs of the recurrence, as rows of all heads' channels.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    pub r: Rows<'a>,
    pub k: Rows<'a>,
    pub v: Rows<'a>,
    pub w: Rows<'a>,
    /// κ̂.
    pub removal_key: Rows<'a>,
    /// a ∘ κ̂.
    pub scaled_removal_key: Rows<'a>,
}

/// Updates the state of one sequence and writes `y` `[tokens, heads, values]`.
pub fn delta_rule(
    inputs: Inputs<'_>,
    head_dim: usize,
    tokens: usize,
    state: &mut [f32],
    y: &mut [f32],
) {
    let heads = inputs.r.width / head_dim;
    let matrices = [
        UnitMatrix { data: y, per_unit: head_dim },
        UnitMatrix { data: state, per_unit: head_dim * head_dim },
    ];
    let parallel = tokens * heads * head_dim >= PARALLEL;
    split_columns(heads, 1, parallel, matrices, |head, [y, mut state]| {
        let start = head.start * head_dim;
        let inputs = Inputs {
            r: inputs.r.columns(start, head_dim),
            k: inputs.k.columns(start, head_dim),
            v: inputs.v.columns(start, head_dim),
            w: inputs.w.columns(start, head_dim),
            removal_key: inputs.removal_key.columns(start, head_dim),
            scaled_removal_key: inputs.scaled_removal_key.columns(start, head_dim),
        };
        Arch::new().dispatch(Head { inputs, tokens, state: state.row(0), y });
    });
}

struct Head<'a> {
    inputs: Inputs<'a>,
    tokens: usize,
    state: &'a mut [f32],
    y: Columns<'a>,
}

impl WithSimd for Head<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for t in 0..self.tokens {
            let token = Token {
                r: self.inputs.r.row(t),
                k: self.inputs.k.row(t),
                w: self.inputs.w.row(t),
                removal_key: self.inputs.removal_key.row(t),
                scaled_removal_key: self.inputs.scaled_removal_key.row(t),
            };
            let (v, v_tail) = S::as_simd_f32s(self.inputs.v.row(t));
            let (y, y_tail) = S::as_mut_simd_f32s(self.y.row(t));
            let mut at = 0;
            // Four vectors of values at a time stay in registers.
            while at + 4 <= v.len() {
                token.columns::<S, 4>(simd, at, 0, self.state, v, y);
                at += 4;
            }
            while at < v.len() {
                token.columns::<S, 1>(simd, at, 0, self.state, v, y);
                at += 1;
            }
            let done = v.len() * S::F32_LANES;
            for at in 0..v_tail.len() {
                token.columns::<Scalar, 1>(Scalar, at, done, self.state, v_tail, y_tail);
            }
        }
    }
}

/// A token's elements along the keys.
struct Token<'a> {
    r: &'a [f32],
    k: &'a [f32],
    w: &'a [f32],
    removal_key: &'a [f32],
    scaled_removal_key: &'a [f32],
}

impl Token<'_> {
    /// Processes `M` vectors of values from `at` on. Vectors begin at offset `skip` in a row of the
    /// state.
    #[inline(always)]
    fn columns<S: Simd, const M: usize>(
        &self,
        simd: S,
        at: usize,
        skip: usize,
        state: &mut [f32],
        v: &[S::f32s],
        y: &mut [S::f32s],
    ) {
        let d = self.r.len();
        let mut found = [simd.splat_f32s(0.0); M];
        for (s, &removal_key) in state.chunks_exact(d).zip(self.removal_key) {
            let s = &S::as_simd_f32s(&s[skip..]).0[at..at + M];
            for m in 0..M {
                found[m] = simd.mul_add_f32s(s[m], simd.splat_f32s(-removal_key), found[m]);
            }
        }
        let v: [S::f32s; M] = std::array::from_fn(|m| v[at + m]);
        let mut sum = [simd.splat_f32s(0.0); M];
        let keys = self.r.iter().zip(self.k).zip(self.w).zip(self.scaled_removal_key);
        for (s, (((&r, &k), &w), &scaled_removal_key)) in state.chunks_exact_mut(d).zip(keys) {
            let s = &mut S::as_mut_simd_f32s(&mut s[skip..]).0[at..at + M];
            for m in 0..M {
                let new = simd.mul_f32s(v[m], simd.splat_f32s(k));
                let new = simd.mul_add_f32s(found[m], simd.splat_f32s(scaled_removal_key), new);
                s[m] = simd.mul_add_f32s(s[m], simd.splat_f32s(w), new);
                sum[m] = simd.mul_add_f32s(s[m], simd.splat_f32s(r), sum[m]);
            }
        }
        y[at..at + M].copy_from_slice(&sum);
    }
}
