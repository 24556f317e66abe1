//! RWKV-6's time mixing ("Finch", arXiv 2404.05892): RWKV-5's with token shifts and decays that
//! depend on the tokens.

use super::mix::{differences, mix};
use super::wkv::{Inputs, wkv};
use super::{GROUP_EPS, Names, heads, load_mix, state_arrays};
use crate::checkpoint::Checkpoint;
use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Recurrent, Span, StateArray};
use crate::norm::layer_groups;
use crate::simd::{MulSilu, Tanh, UnaryFn, exp, map, zip};
use crate::workspace::Workspace;
use candle_core::{Device, Tensor};
use longctx_core::{Error, Result};
use pulp::Simd;
use rayon::prelude::*;

/// Decay, key, value, receptance and gate, in the order of the checkpoint.
const MIXES: [&str; 5] = ["w", "k", "v", "r", "g"];

#[derive(Debug)]
pub struct V6 {
    pub hidden: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// The token shift of the input of the other shifts' weights.
    pub shift_mix: Vec<f32>,
    /// Projects to the low-rank inputs of all five shifts, concatenated.
    pub shift_in: Matrix,
    /// Projects from the low-rank input of each shift.
    pub shift_out: Vec<Matrix>,
    pub mixes: Vec<Vec<f32>>,
    pub decay: Vec<f32>,
    pub decay_in: Matrix,
    pub decay_out: Matrix,
    pub bonus: Vec<f32>,
    /// Projections of key, value, receptance and gate.
    pub maps: [Matrix; 4],
    pub group_norm: (Vec<f32>, Vec<f32>),
    pub output: Matrix,
}

impl V6 {
    pub fn load(w: &Checkpoint, names: &Names, layer: usize, hidden: usize) -> Result<Self> {
        let name = |part: &str| names.time(layer, part);
        let (heads, head_dim) = heads(w, &name("time_faaaa"), hidden)?;
        let (shift_in, shift_out) = (name("time_maa_w1"), name("time_maa_w2"));
        let rank = |name: &str, dim: usize| match w.required_shape(name)? {
            shape if shape.len() > dim => Ok(shape[dim]),
            shape => {
                Err(Error::mismatch(format!("tensor {name:?}"), "a matrix", format!("{shape:?}")))
            }
        };
        let shift_rank = rank(&shift_out, 1)?;
        let decay_rank = rank(&name("time_decay_w1"), 1)?;
        let all_out = w.tensor(&shift_out, &[MIXES.len(), shift_rank, hidden])?;
        let out = |data: &[f32]| -> Result<Matrix> {
            w.in_dtype(&Tensor::from_slice(data, (shift_rank, hidden), &Device::Cpu)?.t()?)
        };
        let mix = |part: &&str| load_mix(w, &name(&format!("time_maa_{part}")), hidden, 6);
        let map = |part: &str| w.matrix(&name(part), hidden, hidden);
        let norm = |part: &str| w.tensor(&name(part), &[hidden]);
        Ok(Self {
            hidden,
            heads,
            head_dim,
            shift_mix: mix(&"x")?,
            shift_in: w.transposed(&shift_in, MIXES.len() * shift_rank, hidden)?,
            shift_out: all_out.chunks(shift_rank * hidden).map(out).collect::<Result<_>>()?,
            mixes: MIXES.iter().map(mix).collect::<Result<_>>()?,
            decay: w.tensor(&name("time_decay"), &[hidden])?,
            decay_in: w.transposed(&name("time_decay_w1"), decay_rank, hidden)?,
            decay_out: w.transposed(&name("time_decay_w2"), hidden, decay_rank)?,
            bonus: w.tensor(&name("time_faaaa"), &[heads, head_dim])?,
            maps: [
                map("key.weight")?,
                map("value.weight")?,
                map("receptance.weight")?,
                map("gate.weight")?,
            ],
            group_norm: (norm("ln_x.weight")?, norm("ln_x.bias")?),
            output: map("output.weight")?,
        })
    }

    /// Writes the decays e^−e^(decay + low-rank function of the row) to `w`.
    fn decays(&self, mixed: &[f32], workspace: &mut Workspace, w: &mut [f32]) {
        let mut bottleneck = workspace.acquire(mixed.len() / self.hidden * self.decay_in.out());
        self.decay_in.apply(Rows::new(mixed, self.hidden), &mut bottleneck);
        map(Tanh, &mut bottleneck);
        self.decay_out.apply(Rows::new(&bottleneck, self.decay_in.out()), w);
        w.par_chunks_exact_mut(self.hidden).for_each(|row| {
            row.iter_mut().zip(&self.decay).for_each(|(w, decay)| *w += decay);
            map(Forget, row);
        });
        workspace.release(bottleneck);
    }
}

/// Computes e^−e^x.
#[derive(Clone, Copy)]
struct Forget;

impl UnaryFn for Forget {
    #[inline(always)]
    fn at<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        exp(simd, simd.neg_f32s(exp(simd, x)))
    }
}

impl Recurrent for V6 {
    fn state(&self) -> Vec<StateArray> {
        state_arrays(self.hidden, self.heads, self.head_dim)
    }

    fn forward(
        &self,
        x: Input<'_>,
        states: &mut [&mut [f32]],
        workspace: &mut Workspace,
        out: &mut [f32],
    ) {
        let (rows, hidden) = (x.rows(), self.hidden);
        let [mut shift, mut mixed] = [0; 2].map(|_| workspace.acquire(rows * hidden));
        let mut maps = [0; 5].map(|_| workspace.acquire(rows * hidden));
        let mut bottleneck = workspace.acquire(rows * self.shift_in.out());
        differences(x, hidden, states, &mut shift);
        mix(x.x, &shift, &self.shift_mix, &mut mixed);
        self.shift_in.apply(Rows::new(&mixed, hidden), &mut bottleneck);
        map(Tanh, &mut bottleneck);
        let rank = self.shift_in.out() / MIXES.len();
        let bottlenecks = Rows::new(&bottleneck, self.shift_in.out());
        for (i, y) in maps.iter_mut().enumerate() {
            self.shift_out[i].apply(bottlenecks.columns(i * rank, rank), &mut mixed);
            let parts = mixed.par_chunks_exact_mut(hidden).zip(x.x.par_chunks_exact(hidden));
            parts.zip(shift.par_chunks_exact(hidden)).for_each(|((mixed, x), d)| {
                let of_mix = mixed.iter_mut().zip(&self.mixes[i]);
                for ((mixed, mix), (x, d)) in of_mix.zip(x.iter().zip(d)) {
                    *mixed = x + d * (mix + *mixed);
                }
            });
            match i.checked_sub(1) {
                None => self.decays(&mixed, workspace, y),
                Some(map) => self.maps[map].apply(Rows::new(&mixed, hidden), y),
            }
        }
        let [w, k, v, r, gate] = &maps;
        let y = &mut mixed;
        for (span, state) in x.spans.iter().zip(states) {
            let Span { row, tokens, .. } = *span;
            let of_span = |data| Rows::new(data, hidden).part(row, tokens);
            let (r, k, v, w) = (of_span(r), of_span(k), of_span(v), of_span(w));
            let y = &mut y[row * hidden..][..tokens * hidden];
            let inputs = Inputs { r, k, v, w, u: &self.bonus };
            wkv(inputs, self.head_dim, tokens, &mut state[hidden..], y);
        }
        let (weight, bias) = &self.group_norm;
        layer_groups(y, weight, bias, self.head_dim, GROUP_EPS);
        zip(MulSilu, y, gate);
        self.output.apply(Rows::new(y, hidden), out);
        workspace.release(bottleneck);
        for buffer in maps.into_iter().rev().chain([mixed, shift]) {
            workspace.release(buffer);
        }
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>> {
        Ok(Box::new(crate::cuda::V6::new(self, to)?))
    }
}
