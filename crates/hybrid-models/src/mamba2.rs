//! Mamba-2's mixer: a state space model with one decay per head (Dao and Gu, arXiv 2405.21060).

mod ssd;

use crate::checkpoint::Checkpoint;
use crate::conv::Conv;
use crate::linear::Linear;
use crate::matrix::Rows;
use crate::mixer::{Input, Recurrent, Span, StateArray};
use crate::norm::rms_groups;
use crate::simd::{MulSilu, zip};
use crate::workspace::Workspace;
use longctx_core::Result;
pub use ssd::Ssd;

/// The dimensions of a Mamba-2 mixer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mamba2Shape {
    /// Hidden size.
    pub hidden: usize,
    /// Heads of the recurrence.
    pub heads: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Groups of heads that share B and C.
    pub groups: usize,
    /// States per channel.
    pub states: usize,
    /// Kernel size of the convolution.
    pub taps: usize,
    /// Whether the convolution has a bias.
    pub conv_bias: bool,
    /// Whether the input and output projections have biases.
    pub bias: bool,
    /// Time steps are clamped to this range.
    pub time_step_limit: (f32, f32),
    /// Added to the mean square in the gated norm.
    pub norm_eps: f32,
}

impl Mamba2Shape {
    /// Returns the channels of the recurrence.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the channels of the convolution: those of the recurrence, B and C.
    pub fn convolved(&self) -> usize {
        self.inner() + 2 * self.groups * self.states
    }
}

#[derive(Debug)]
pub struct Mamba2 {
    pub shape: Mamba2Shape,
    /// Projects to the gate, the input of the convolution, and the time steps.
    pub project_in: Linear,
    pub conv: Conv,
    pub ssd: Ssd,
    pub norm: Vec<f32>,
    pub project_out: Linear,
}

impl Mamba2 {
    /// Loads the mixer `name`, for example "backbone.layers.0.mixer".
    pub fn load(w: &Checkpoint, name: &str, shape: Mamba2Shape) -> Result<Self> {
        let Mamba2Shape { hidden, heads, taps, conv_bias, bias, .. } = shape;
        let (inner, convolved) = (shape.inner(), shape.convolved());
        let part = |part: &str| format!("{name}.{part}");
        let a_log = w.tensor(&part("A_log"), &[heads])?;
        Ok(Self {
            shape,
            project_in: Linear::load(w, &part("in_proj"), inner + convolved + heads, hidden, bias)?,
            conv: Conv::load(w, &part("conv1d"), convolved, taps, conv_bias, true)?,
            ssd: Ssd {
                shape,
                a: a_log.iter().map(|a| -a.exp()).collect(),
                time_bias: w.tensor(&part("dt_bias"), &[heads])?,
                skip: w.tensor(&part("D"), &[heads])?,
            },
            norm: w.tensor(&part("norm.weight"), &[inner])?,
            project_out: Linear::load(w, &part("out_proj"), hidden, inner, bias)?,
        })
    }
}

impl Recurrent for Mamba2 {
    fn state(&self) -> Vec<StateArray> {
        let Mamba2Shape { heads, head_dim, states, taps, .. } = self.shape;
        let conv = StateArray::new("conv", &[taps - 1, self.shape.convolved()]);
        vec![conv, StateArray::new("ssm", &[heads, states, head_dim])]
    }

    fn forward(
        &self,
        x: Input<'_>,
        states: &mut [&mut [f32]],
        workspace: &mut Workspace,
        out: &mut [f32],
    ) {
        let Mamba2Shape { hidden, heads, groups, norm_eps, .. } = self.shape;
        let (inner, convolved) = (self.shape.inner(), self.shape.convolved());
        let rows = x.rows();
        let width = inner + convolved + heads;
        let mut projected = workspace.acquire(rows * width);
        let mut mixed = workspace.acquire(rows * convolved);
        let mut y = workspace.acquire(rows * inner);

        self.project_in.apply(Rows::new(x.x, hidden), &mut projected);
        let projected_rows = Rows::new(&projected, width);
        for (span, state) in x.spans.iter().zip(states) {
            let Span { row, tokens, .. } = *span;
            let of_span = projected_rows.part(row, tokens);
            let (conv, ssm) = state.split_at_mut(self.conv.state_size());
            let mixed = &mut mixed[row * convolved..][..tokens * convolved];
            self.conv.forward(of_span.columns(inner, convolved), tokens, conv, mixed);
            let y = &mut y[row * inner..][..tokens * inner];
            let steps = of_span.columns(inner + convolved, heads);
            self.ssd.run(Rows::new(mixed, convolved), steps, tokens, ssm, y, workspace);
        }
        for (y, row) in y.chunks_exact_mut(inner).zip(0..) {
            zip(MulSilu, y, projected_rows.columns(0, inner).row(row));
        }
        rms_groups(&mut y, &self.norm, inner / groups, norm_eps);
        self.project_out.apply(Rows::new(&y, inner), out);

        for buffer in [y, mixed, projected] {
            workspace.release(buffer);
        }
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>> {
        Ok(Box::new(crate::cuda::Mamba2::new(self, to)?))
    }
}
