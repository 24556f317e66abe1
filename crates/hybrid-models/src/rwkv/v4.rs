//! RWKV-4's time mixing (Peng et al., arXiv 2305.13048): a mean of the values, weighted by e^key,
//! that decays per channel.
//!
//! Numerator and denominator are relative to the largest exponent so far, so that nothing
//! overflows.

use super::Names;
use super::mix::{differences, mix};
use crate::checkpoint::Checkpoint;
use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Recurrent, Span, StateArray};
use crate::simd::{MulSigmoid, exp, zip};
use crate::split_columns::{Columns, UnitMatrix, split_columns};
use crate::workspace::Workspace;
use longctx_core::Result;
use pulp::{Arch, Scalar, Simd, WithSimd};

/// Channels per task.
const BLOCK: usize = 64;
/// Smallest number of tokens x channels for which several threads are used.
const PARALLEL: usize = 1 << 13;
/// The initial largest exponent.
const LOWEST: f32 = -1e38;

#[derive(Debug)]
pub struct V4 {
    pub hidden: usize,
    /// Channels of the recurrence.
    pub inner: usize,
    /// Token shifts of key, value and receptance.
    pub mixes: [Vec<f32>; 3],
    pub key: Matrix,
    pub value: Matrix,
    pub receptance: Matrix,
    pub output: Matrix,
    /// −e^decay.
    pub decay: Vec<f32>,
    pub first: Vec<f32>,
}

impl V4 {
    pub fn load(w: &Checkpoint, names: &Names, layer: usize, hidden: usize) -> Result<Self> {
        let name = |part: &str| names.time(layer, part);
        let key = name("key.weight");
        let [inner, _] = w.matrix_dims(&key, "[inner, hidden]")?;
        let mix = |part: &str| super::load_mix(w, &name(part), hidden, 4);
        let decay = w.tensor(&name("time_decay"), &[inner])?;
        Ok(Self {
            hidden,
            inner,
            mixes: [mix("time_mix_k")?, mix("time_mix_v")?, mix("time_mix_r")?],
            key: w.matrix(&key, inner, hidden)?,
            value: w.matrix(&name("value.weight"), inner, hidden)?,
            receptance: w.matrix(&name("receptance.weight"), inner, hidden)?,
            output: w.matrix(&name("output.weight"), hidden, inner)?,
            decay: decay.iter().map(|x| -x.exp()).collect(),
            first: w.tensor(&name("time_first"), &[inner])?,
        })
    }
}

impl Recurrent for V4 {
    fn state(&self) -> Vec<StateArray> {
        let part = |name| StateArray::new(name, &[self.inner]);
        let largest = StateArray { start: LOWEST, ..part("largest") };
        let shift = StateArray::new("shift", &[self.hidden]);
        vec![shift, part("numerator"), part("denominator"), largest]
    }

    fn forward(
        &self,
        x: Input<'_>,
        states: &mut [&mut [f32]],
        workspace: &mut Workspace,
        out: &mut [f32],
    ) {
        let (rows, hidden, inner) = (x.rows(), self.hidden, self.inner);
        let mut shift = workspace.acquire(rows * hidden);
        let mut mixed = workspace.acquire(rows * hidden);
        let [mut k, mut v, mut r] = [0; 3].map(|_| workspace.acquire(rows * inner));
        differences(x, hidden, states, &mut shift);
        let maps = [(&self.key, &mut k), (&self.value, &mut v), (&self.receptance, &mut r)];
        for (weights, (matrix, y)) in self.mixes.iter().zip(maps) {
            mix(x.x, &shift, weights, &mut mixed);
            matrix.apply(Rows::new(&mixed, hidden), y);
        }
        for (span, state) in x.spans.iter().zip(states) {
            let Span { row, tokens, .. } = *span;
            let range = row * inner..(row + tokens) * inner;
            let keys = Rows::new(&k[range.clone()], inner);
            let matrices = [
                UnitMatrix { data: &mut v[range], per_unit: 1 },
                UnitMatrix { data: &mut state[hidden..], per_unit: 1 },
            ];
            let parallel = tokens * inner >= PARALLEL;
            split_columns(inner, BLOCK, parallel, matrices, |part, [values, state]| {
                let (decay, first) = (&self.decay[part.clone()], &self.first[part.clone()]);
                let keys = keys.columns(part.start, part.len());
                Arch::new().dispatch(Wkv { keys, values, state, decay, first, tokens });
            });
        }
        zip(MulSigmoid, &mut v, &r);
        self.output.apply(Rows::new(&v, inner), out);
        for buffer in [r, v, k, mixed, shift] {
            workspace.release(buffer);
        }
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>> {
        Ok(Box::new(crate::cuda::V4::new(self, to)?))
    }
}

/// The recurrence of some channels. Outputs replace the values.
struct Wkv<'a> {
    keys: Rows<'a>,
    values: Columns<'a>,
    /// Rows of numerators, denominators and largest exponents.
    state: Columns<'a>,
    decay: &'a [f32],
    first: &'a [f32],
    tokens: usize,
}

impl WithSimd for Wkv<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.decay.len().is_multiple_of(S::F32_LANES) {
            true => self.run(simd),
            false => self.run(Scalar),
        }
    }
}

impl Wkv<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (decay, first) = (S::as_simd_f32s(self.decay).0, S::as_simd_f32s(self.first).0);
        // Computes e^a n + e^b v, with the larger of both exponents subtracted.
        let add = |[n, a, b, v]: [S::f32s; 4]| {
            let kept = simd.mul_f32s(exp(simd, a), n);
            simd.mul_add_f32s(exp(simd, b), v, kept)
        };
        let one = simd.splat_f32s(1.0);
        for v in 0..decay.len() {
            let mut load = |row: usize| S::as_simd_f32s(self.state.row(row)).0[v];
            let (mut num, mut den, mut max) = (load(0), load(1), load(2));
            for t in 0..self.tokens {
                let key = S::as_simd_f32s(self.keys.row(t)).0[v];
                let place = &mut S::as_mut_simd_f32s(self.values.row(t)).0[v];
                let value = *place;
                let own = simd.add_f32s(key, first[v]);
                let top = simd.max_f32s(max, own);
                let (a, b) = (simd.sub_f32s(max, top), simd.sub_f32s(own, top));
                *place = simd.div_f32s(add([num, a, b, value]), add([den, a, b, one]));
                let old = simd.add_f32s(max, decay[v]);
                max = simd.max_f32s(old, key);
                let (a, b) = (simd.sub_f32s(old, max), simd.sub_f32s(key, max));
                num = add([num, a, b, value]);
                den = add([den, a, b, one]);
            }
            let mut store = |row: usize, x| S::as_mut_simd_f32s(self.state.row(row)).0[v] = x;
            store(0, num);
            store(1, den);
            store(2, max);
        }
    }
}
