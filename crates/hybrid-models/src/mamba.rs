//! Mamba's mixer: a selective state space model (Gu and Dao, arXiv 2312.00752).

mod scan;

use crate::checkpoint::Checkpoint;
use crate::conv::Conv;
use crate::linear::Linear;
use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Recurrent, Span, StateArray, transposed};
use crate::workspace::Workspace;
use longctx_core::Result;
use scan::Scan;

/// The dimensions of a Mamba mixer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MambaShape {
    /// Hidden size.
    pub hidden: usize,
    /// Channels of the recurrence.
    pub inner: usize,
    /// States per channel.
    pub states: usize,
    /// Rank of the projection of time steps.
    pub rank: usize,
    /// Kernel size of the convolution.
    pub taps: usize,
    /// Whether the convolution has a bias.
    pub conv_bias: bool,
    /// Whether the input and output projections have biases.
    pub bias: bool,
}

#[derive(Debug)]
pub struct Mamba {
    pub shape: MambaShape,
    /// Projects to the recurrence's input and the gate.
    pub project_in: Linear,
    pub conv: Conv,
    /// Projects to the low-rank time step, B and C.
    pub select: Matrix,
    pub time_step: Matrix,
    pub scan: Scan,
    pub project_out: Linear,
}

impl Mamba {
    /// Loads the mixer `name`, for example "backbone.layers.0.mixer".
    pub fn load(w: &Checkpoint, name: &str, shape: MambaShape) -> Result<Self> {
        let MambaShape { hidden, inner, states, rank, taps, conv_bias, bias } = shape;
        let part = |part: &str| format!("{name}.{part}");
        let mut a = w.tensor(&part("A_log"), &[inner, states])?;
        a.iter_mut().for_each(|a| *a = -a.exp());
        Ok(Self {
            shape,
            project_in: Linear::load(w, &part("in_proj"), 2 * inner, hidden, bias)?,
            conv: Conv::load(w, &part("conv1d"), inner, taps, conv_bias, true)?,
            select: w.matrix(&part("x_proj.weight"), rank + 2 * states, inner)?,
            time_step: w.matrix(&part("dt_proj.weight"), inner, rank)?,
            scan: Scan {
                a: transposed(&a, scan::BLOCK, states).collect(),
                states,
                time_bias: w.tensor(&part("dt_proj.bias"), &[inner])?,
                skip: w.tensor(&part("D"), &[inner])?,
            },
            project_out: Linear::load(w, &part("out_proj"), hidden, inner, bias)?,
        })
    }
}

#[cfg(feature = "cuda")]
impl Mamba {
    /// Returns A, `[channels, states]`.
    pub fn a(&self) -> Vec<f32> {
        let mut a = Vec::new();
        let MambaShape { inner, states, .. } = self.shape;
        StateArray::in_blocks("a", [inner, states], scan::BLOCK)
            .read_host_layout(&self.scan.a, &mut a);
        a
    }
}

impl Recurrent for Mamba {
    fn state(&self) -> Vec<StateArray> {
        let MambaShape { inner, states, taps, .. } = self.shape;
        vec![
            StateArray::new("conv", &[taps - 1, inner]),
            StateArray::in_blocks("ssm", [inner, states], scan::BLOCK),
        ]
    }

    fn forward(
        &self,
        x: Input<'_>,
        states: &mut [&mut [f32]],
        workspace: &mut Workspace,
        out: &mut [f32],
    ) {
        let MambaShape { hidden, inner, states: size, rank, .. } = self.shape;
        let rows = x.rows();
        let mut projected = workspace.acquire(rows * 2 * inner);
        let mut u = workspace.acquire(rows * inner);
        let mut selected = workspace.acquire(rows * (rank + 2 * size));
        let mut steps = workspace.acquire(rows * inner);

        self.project_in.apply(Rows::new(x.x, hidden), &mut projected);
        let projected_rows = Rows::new(&projected, 2 * inner);
        for (span, state) in x.spans.iter().zip(states.iter_mut()) {
            let Span { row, tokens, .. } = *span;
            let (conv, _) = state.split_at_mut(self.conv.state_size());
            let x = projected_rows.columns(0, inner).part(row, tokens);
            let u = &mut u[row * inner..][..tokens * inner];
            self.conv.forward(x, tokens, conv, u);
        }
        self.select.apply(Rows::new(&u, inner), &mut selected);
        let selected_rows = Rows::new(&selected, rank + 2 * size);
        self.time_step.apply(selected_rows.columns(0, rank), &mut steps);
        for (span, state) in x.spans.iter().zip(states) {
            let Span { row, tokens, .. } = *span;
            let (_, ssm) = state.split_at_mut(self.conv.state_size());
            let u = &mut u[row * inner..][..tokens * inner];
            let inputs = scan::Inputs {
                steps: Rows::new(&steps, inner).part(row, tokens),
                b: selected_rows.columns(rank, size).part(row, tokens),
                c: selected_rows.columns(rank + size, size).part(row, tokens),
                gate: projected_rows.columns(inner, inner).part(row, tokens),
            };
            self.scan.run(inputs, tokens, ssm, u);
        }
        self.project_out.apply(Rows::new(&u, inner), out);

        for buffer in [steps, selected, u, projected] {
            workspace.release(buffer);
        }
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>> {
        Ok(Box::new(crate::cuda::Mamba::new(self, to)?))
    }
}
