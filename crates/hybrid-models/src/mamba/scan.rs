//! The selective scan: h ← exp(Δ A) h + Δ B u and y = C h + D u, per channel, over the tokens.
//!
//! Vectors run across channels and threads process blocks of channels. The state of a block stays
//! in the L1 cache over all tokens. No array of size tokens x channels x states exists.

use std::ops::Range;

use crate::matrix::Rows;
use crate::simd::{exp, silu, softplus};
use crate::split_columns::{Columns, UnitMatrix, split_columns};
use pulp::{Arch, Scalar, Simd, WithSimd};

/// Channels per block.
pub const BLOCK: usize = 64;
/// Smallest number of tokens x channels for which several threads are used.
const PARALLEL: usize = 1 << 11;

/// The weights of the scan.
#[derive(Debug)]
pub struct Scan {
    /// A, `[channels, states]`, in blocks of [`BLOCK`] channels, each transposed. The state has the
    /// same layout.
    pub a: Vec<f32>,
    pub states: usize,
    /// Added to the time steps before the softplus.
    pub time_bias: Vec<f32>,
    /// D.
    pub skip: Vec<f32>,
}

/// The inputs of the scan besides `u`.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Time steps before bias and softplus, per channel.
    pub steps: Rows<'a>,
    pub b: Rows<'a>,
    pub c: Rows<'a>,
    /// The output is multiplied by the SiLU of this.
    pub gate: Rows<'a>,
}

impl Scan {
    /// Replaces the inputs `u` `[tokens, channels]` by the outputs and updates `state`.
    pub fn run(&self, inputs: Inputs<'_>, tokens: usize, state: &mut [f32], u: &mut [f32]) {
        let channels = self.skip.len();
        let matrices = [
            UnitMatrix { data: u, per_unit: 1 },
            UnitMatrix { data: state, per_unit: self.states },
        ];
        let parallel = tokens * channels >= PARALLEL;
        split_columns(channels, BLOCK, parallel, matrices, |part, [u, mut state]| {
            let state = state.row(0);
            Arch::new().dispatch(Block { scan: self, inputs, tokens, part, state, u });
        });
    }
}

struct Block<'a> {
    scan: &'a Scan,
    inputs: Inputs<'a>,
    tokens: usize,
    part: Range<usize>,
    state: &'a mut [f32],
    u: Columns<'a>,
}

impl WithSimd for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.part.len().is_multiple_of(S::F32_LANES) {
            true => self.run(simd),
            false => self.run(Scalar),
        }
    }
}

impl Block<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (Scan { a, states, time_bias, skip }, inputs, part) =
            (self.scan, self.inputs, self.part);
        let a = S::as_simd_f32s(&a[part.start * states..part.end * states]).0;
        let state = S::as_mut_simd_f32s(self.state).0;
        let time_bias = S::as_simd_f32s(&time_bias[part.clone()]).0;
        let skip = S::as_simd_f32s(&skip[part.clone()]).0;
        for t in 0..self.tokens {
            let steps = S::as_simd_f32s(&inputs.steps.row(t)[part.clone()]).0;
            let gate = S::as_simd_f32s(&inputs.gate.row(t)[part.clone()]).0;
            let (b, c) = (inputs.b.row(t), inputs.c.row(t));
            let u = S::as_mut_simd_f32s(self.u.row(t)).0;
            let vectors = u.len();
            for v in 0..vectors {
                let step = softplus(simd, simd.add_f32s(steps[v], time_bias[v]));
                let x = simd.mul_f32s(step, u[v]);
                let mut y = simd.mul_f32s(skip[v], u[v]);
                let rows = a.chunks_exact(vectors).zip(state.chunks_exact_mut(vectors));
                for ((a, h), (&b, &c)) in rows.zip(b.iter().zip(c)) {
                    let decay = exp(simd, simd.mul_f32s(step, a[v]));
                    let new = simd.mul_f32s(x, simd.splat_f32s(b));
                    h[v] = simd.mul_add_f32s(decay, h[v], new);
                    y = simd.mul_add_f32s(h[v], simd.splat_f32s(c), y);
                }
                u[v] = simd.mul_f32s(y, silu(simd, gate[v]));
            }
        }
    }
}
