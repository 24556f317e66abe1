//! The recurrence of RWKV-5 and 6: per head, y = Sᵀ r + (r · (u ∘ k)) v, then S ← diag(w) S + k vᵀ.
//!
//! A head's state stays in the L1 cache over all tokens, with vectors along the values. The chunked
//! matrix form needs w to the power of minus the chunk's length, which overflows for fast decay;
//! and this recurrence takes only a few percent of a layer's time.

use crate::matrix::Rows;
use crate::split_columns::{Columns, UnitMatrix, split_columns};
use pulp::{Arch, Simd, WithSimd};

/// Smallest number of tokens x channels for which several threads are used.
const PARALLEL: usize = 1 << 11;

/// The inputs of the recurrence, as rows of all heads' channels.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    pub r: Rows<'a>,
    pub k: Rows<'a>,
    pub v: Rows<'a>,
    /// The decay w, between 0 and 1.
    pub w: Rows<'a>,
    /// The weight u of the token's own key.
    pub u: &'a [f32],
}

/// Updates the state `[heads, keys, values]` of one sequence and writes `y` `[tokens, heads,
/// values]`.
pub fn wkv(inputs: Inputs<'_>, head_dim: usize, tokens: usize, state: &mut [f32], y: &mut [f32]) {
    let heads = inputs.u.len() / head_dim;
    let matrices = [
        UnitMatrix { data: y, per_unit: head_dim },
        UnitMatrix { data: state, per_unit: head_dim * head_dim },
    ];
    let parallel = tokens * heads * head_dim >= PARALLEL;
    split_columns(heads, 1, parallel, matrices, |head, [y, mut state]| {
        let channels = head.start * head_dim;
        let inputs = Inputs {
            r: inputs.r.columns(channels, head_dim),
            k: inputs.k.columns(channels, head_dim),
            v: inputs.v.columns(channels, head_dim),
            w: inputs.w.columns(channels, head_dim),
            u: &inputs.u[channels..channels + head_dim],
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
        let d = self.inputs.u.len();
        let vectors = d / S::F32_LANES;
        for t in 0..self.tokens {
            let (r, k, w) = (self.inputs.r.row(t), self.inputs.k.row(t), self.inputs.w.row(t));
            let bonus: f32 = r.iter().zip(k).zip(self.inputs.u).map(|((r, k), u)| r * k * u).sum();
            let (v, v_tail) = S::as_simd_f32s(self.inputs.v.row(t));
            let (y, y_tail) = S::as_mut_simd_f32s(self.y.row(t));
            let mut at = 0;
            // Four vectors of outputs at a time stay in registers.
            while at + 4 <= vectors {
                columns::<S, 4>(simd, [r, k, w], bonus, at, self.state, v, y);
                at += 4;
            }
            while at < vectors {
                columns::<S, 1>(simd, [r, k, w], bonus, at, self.state, v, y);
                at += 1;
            }
            let rest = vectors * S::F32_LANES;
            for (j, (y, &v)) in y_tail.iter_mut().zip(v_tail).enumerate() {
                *y = bonus * v;
                for (i, s) in self.state.chunks_exact_mut(d).enumerate() {
                    *y += r[i] * s[rest + j];
                    s[rest + j] = w[i] * s[rest + j] + k[i] * v;
                }
            }
        }
    }
}

/// Processes one token, for `M` vectors of values from `at` on.
#[inline(always)]
fn columns<S: Simd, const M: usize>(
    simd: S,
    [r, k, w]: [&[f32]; 3],
    bonus: f32,
    at: usize,
    state: &mut [f32],
    v: &[S::f32s],
    y: &mut [S::f32s],
) {
    let v: [S::f32s; M] = std::array::from_fn(|m| v[at + m]);
    let mut sum = v.map(|v| simd.mul_f32s(v, simd.splat_f32s(bonus)));
    for (((s, &r), &k), &w) in state.chunks_exact_mut(r.len()).zip(r).zip(k).zip(w) {
        let s = &mut S::as_mut_simd_f32s(s).0[at..at + M];
        let (r, k, w) = (simd.splat_f32s(r), simd.splat_f32s(k), simd.splat_f32s(w));
        for m in 0..M {
            sum[m] = simd.mul_add_f32s(r, s[m], sum[m]);
            s[m] = simd.mul_add_f32s(w, s[m], simd.mul_f32s(k, v[m]));
        }
    }
    y[at..at + M].copy_from_slice(&sum);
}
