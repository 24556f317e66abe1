//! RWKV-5's time mixing ("Eagle", Peng et al., arXiv 2404.05892): a matrix state per head that
//! decays per key channel.

use super::mix::{differences, mix};
use super::wkv::{Inputs, wkv};
use super::{GROUP_EPS, heads, load_mix, state_arrays};
use crate::checkpoint::Checkpoint;
use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Recurrent, Span, StateArray};
use crate::norm::layer_groups;
use crate::simd::{MulSilu, zip};
use crate::workspace::Workspace;
use longctx_core::Result;

#[derive(Debug)]
pub struct V5 {
    pub hidden: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// Token shift and projection of receptance, key, value and gate.
    pub maps: [(Vec<f32>, Matrix); 4],
    /// e^−e^decay.
    pub decay: Vec<f32>,
    pub bonus: Vec<f32>,
    pub group_norm: (Vec<f32>, Vec<f32>),
    pub output: Matrix,
}

impl V5 {
    /// Loads the layer. `name` returns a tensor's full name.
    pub fn load(w: &Checkpoint, name: impl Fn(&str) -> String, hidden: usize) -> Result<Self> {
        let (heads, head_dim) = heads(w, &name("time_faaaa"), hidden)?;
        let map = |mix: &str, matrix: &str| -> Result<(Vec<f32>, Matrix)> {
            let matrix = w.matrix(&name(matrix), hidden, hidden)?;
            Ok((load_mix(w, &name(mix), hidden, 5)?, matrix))
        };
        let decay = w.tensor(&name("time_decay"), &[heads, head_dim])?;
        let norm = |part: &str| w.tensor(&name(part), &[hidden]);
        Ok(Self {
            hidden,
            heads,
            head_dim,
            maps: [
                map("time_mix_r", "receptance.weight")?,
                map("time_mix_k", "key.weight")?,
                map("time_mix_v", "value.weight")?,
                map("time_mix_g", "gate.weight")?,
            ],
            decay: decay.iter().map(|x| (-x.exp()).exp()).collect(),
            bonus: w.tensor(&name("time_faaaa"), &[heads, head_dim])?,
            group_norm: (norm("ln_x.weight")?, norm("ln_x.bias")?),
            output: w.matrix(&name("output.weight"), hidden, hidden)?,
        })
    }
}

impl Recurrent for V5 {
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
        let mut maps = [0; 4].map(|_| workspace.acquire(rows * hidden));
        differences(x, hidden, states, &mut shift);
        for ((weights, matrix), y) in self.maps.iter().zip(&mut maps) {
            mix(x.x, &shift, weights, &mut mixed);
            matrix.apply(Rows::new(&mixed, hidden), y);
        }
        let [r, k, v, gate] = &maps;
        let y = &mut mixed;
        for (span, state) in x.spans.iter().zip(states) {
            let Span { row, tokens, .. } = *span;
            let of_span = |data| Rows::new(data, hidden).part(row, tokens);
            let w = Rows { data: &self.decay, stride: 0, width: hidden };
            let inputs = Inputs { r: of_span(r), k: of_span(k), v: of_span(v), w, u: &self.bonus };
            let y = &mut y[row * hidden..][..tokens * hidden];
            wkv(inputs, self.head_dim, tokens, &mut state[hidden..], y);
        }
        let (weight, bias) = &self.group_norm;
        layer_groups(y, weight, bias, self.head_dim, GROUP_EPS);
        zip(MulSilu, y, gate);
        self.output.apply(Rows::new(y, hidden), out);
        for buffer in maps.into_iter().rev().chain([mixed, shift]) {
            workspace.release(buffer);
        }
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>> {
        Ok(Box::new(crate::cuda::V5::new(self, to)?))
    }
}
