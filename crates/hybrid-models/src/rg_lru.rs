//! Griffin's recurrent block with the real-gated linear recurrent unit (De et al., arXiv
//! 2402.19427).
//!
//! Per channel, with gates r and i: a = e^(−8 r softplus(Λ)), h ← a h + √(1 − a²) i x. The first
//! token of a sequence has no past: the factor of its input is 1 instead of the root.

use crate::checkpoint::Checkpoint;
use crate::conv::Conv;
use crate::linear::Linear;
use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Recurrent, Span, StateArray};
use crate::simd::{MulGelu, Softplus, exp, map, sigmoid, zip};
use crate::split_columns::{Columns, UnitMatrix, split_columns};
use crate::workspace::Workspace;
use candle_core::{Device, Tensor};
use longctx_core::Result;
use pulp::{Arch, Scalar, Simd, WithSimd};

/// Smallest number of tokens x channels for which several threads are used.
const PARALLEL: usize = 1 << 10;

/// The dimensions of an RG-LRU block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RgLruShape {
    /// Hidden size.
    pub hidden: usize,
    /// Channels of the recurrence.
    pub width: usize,
    /// Number of blocks of the gates' block-diagonal matrices.
    pub blocks: usize,
    /// Kernel size of the convolution.
    pub taps: usize,
}

#[derive(Debug)]
pub struct RgLru {
    pub shape: RgLruShape,
    /// Projects to the output gate and the recurrence's input.
    pub project_in: Linear,
    pub conv: Conv,
    /// For each block, the recurrence gate and the input gate before the sigmoid: `[2 width /
    /// blocks, width / blocks]`.
    pub gates: Vec<Matrix>,
    /// Biases of both gates, each `[width]`.
    pub recurrent_bias: Vec<f32>,
    pub input_bias: Vec<f32>,
    /// −8 softplus(Λ).
    pub decay: Vec<f32>,
    pub project_out: Linear,
}

impl RgLru {
    /// Loads the block `name`, for example "model.layers.0.temporal_block".
    pub fn load(w: &Checkpoint, name: &str, shape: RgLruShape) -> Result<Self> {
        let RgLruShape { hidden, width, blocks, taps } = shape;
        let part = |part: &str| format!("{name}.{part}");
        let block = width / blocks;
        let gate =
            |gate: &str| w.tensor(&part(&format!("rg_lru.{gate}_weight")), &[blocks, block, block]);
        let bias = |gate: &str| w.tensor(&part(&format!("rg_lru.{gate}_bias")), &[blocks, block]);
        let (recurrent, input) = (gate("recurrent_gate")?, gate("input_gate")?);
        let size = block * block;
        let joined = |i: usize| -> Result<Matrix> {
            let both = [&recurrent, &input].map(|gates| &gates[i * size..(i + 1) * size]);
            // Stored as [in, out].
            let transposed =
                both.map(|gate| Ok(Tensor::from_slice(gate, (block, block), &Device::Cpu)?.t()?));
            let transposed = transposed.into_iter().collect::<Result<Vec<_>>>()?;
            w.in_dtype(&Tensor::cat(&transposed, 0)?)
        };
        let mut decay = w.tensor(&part("rg_lru.recurrent_param"), &[width])?;
        map(Softplus, &mut decay);
        decay.iter_mut().for_each(|x| *x *= -8.0);
        Ok(Self {
            shape,
            project_in: Linear::concat(
                w,
                &[part("linear_y"), part("linear_x")],
                width,
                hidden,
                true,
            )?,
            conv: Conv::load(w, &part("conv_1d"), width, taps, true, false)?,
            gates: (0..blocks).map(joined).collect::<Result<_>>()?,
            recurrent_bias: bias("recurrent_gate")?,
            input_bias: bias("input_gate")?,
            decay,
            project_out: Linear::load(w, &part("linear_out"), hidden, width, true)?,
        })
    }
}

impl Recurrent for RgLru {
    fn state(&self) -> Vec<StateArray> {
        let RgLruShape { width, taps, .. } = self.shape;
        let conv = StateArray::new("conv", &[taps - 1, width]);
        vec![conv, StateArray::new("lru", &[width])]
    }

    fn forward(
        &self,
        x: Input<'_>,
        states: &mut [&mut [f32]],
        workspace: &mut Workspace,
        out: &mut [f32],
    ) {
        let RgLruShape { hidden, width, blocks, .. } = self.shape;
        let rows = x.rows();
        let mut projected = workspace.acquire(rows * 2 * width);
        let mut u = workspace.acquire(rows * width);
        let longest = x.spans.iter().map(|span| span.tokens).max().unwrap_or(0);
        let mut gates = workspace.acquire(longest * 2 * width);
        let mut y = workspace.acquire(rows * width);

        self.project_in.apply(Rows::new(x.x, hidden), &mut projected);
        let projected_rows = Rows::new(&projected, 2 * width);
        for (span, state) in x.spans.iter().zip(states) {
            let Span { row, tokens, .. } = *span;
            let (conv, lru) = state.split_at_mut(self.conv.state_size());
            let of_span = projected_rows.part(row, tokens);
            let range = row * width..(row + tokens) * width;
            let (u, y) = (&mut u[range.clone()], &mut y[range]);
            self.conv.forward(of_span.columns(width, width), tokens, conv, u);
            let u = Rows::new(u, width);
            let block = width / blocks;
            let matrices = [
                UnitMatrix { data: &mut *y, per_unit: block },
                UnitMatrix { data: lru, per_unit: block },
                UnitMatrix { data: &mut gates[..tokens * 2 * width], per_unit: tokens * 2 * block },
            ];
            let first = span.position == 0;
            split_columns(
                blocks,
                1,
                tokens * width >= PARALLEL,
                matrices,
                |unit, [y, mut h, mut gates]| {
                    let channels = unit.start * block..unit.end * block;
                    let u = u.columns(channels.start, block);
                    let gates = gates.row(0);
                    self.gates[unit.start].apply_alone(u, gates);
                    let gates = Rows::new(gates, 2 * block);
                    let biases =
                        [&self.recurrent_bias, &self.input_bias].map(|b| &b[channels.clone()]);
                    let decay = &self.decay[channels];
                    Arch::new().dispatch(Scan {
                        u,
                        gates,
                        biases,
                        decay,
                        first,
                        tokens,
                        h: h.row(0),
                        y,
                    });
                },
            );
        }
        for (row, y) in y.chunks_exact_mut(width).enumerate() {
            zip(MulGelu, y, projected_rows.columns(0, width).row(row));
        }
        self.project_out.apply(Rows::new(&y, width), out);

        for buffer in [y, gates, u, projected] {
            workspace.release(buffer);
        }
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>> {
        Ok(Box::new(crate::cuda::RgLru::new(self, to)?))
    }
}

/// The recurrence of one block of channels.
struct Scan<'a> {
    u: Rows<'a>,
    /// The recurrence gate, then the input gate.
    gates: Rows<'a>,
    biases: [&'a [f32]; 2],
    decay: &'a [f32],
    first: bool,
    tokens: usize,
    h: &'a mut [f32],
    y: Columns<'a>,
}

impl WithSimd for Scan<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.h.len().is_multiple_of(S::F32_LANES) {
            true => self.run(simd),
            false => self.run(Scalar),
        }
    }
}

impl Scan<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let width = self.h.len();
        let h = S::as_mut_simd_f32s(self.h).0;
        let [recurrent_bias, input_bias] = self.biases.map(|bias| S::as_simd_f32s(bias).0);
        let decay = S::as_simd_f32s(self.decay).0;
        let one = simd.splat_f32s(1.0);
        for t in 0..self.tokens {
            let u = S::as_simd_f32s(self.u.row(t)).0;
            let (r, i) = self.gates.row(t).split_at(width);
            let (r, i) = (S::as_simd_f32s(r).0, S::as_simd_f32s(i).0);
            let y = S::as_mut_simd_f32s(self.y.row(t)).0;
            let whole = self.first && t == 0;
            for v in 0..h.len() {
                let r = sigmoid(simd, simd.add_f32s(r[v], recurrent_bias[v]));
                let i = sigmoid(simd, simd.add_f32s(i[v], input_bias[v]));
                let log = simd.mul_f32s(decay[v], r);
                let square = exp(simd, simd.add_f32s(log, log));
                let root = simd.sqrt_f32s(simd.sub_f32s(one, square));
                let root = if whole { one } else { root };
                let new = simd.mul_f32s(simd.mul_f32s(u[v], i), root);
                h[v] = simd.mul_add_f32s(exp(simd, log), h[v], new);
                y[v] = h[v];
            }
        }
    }
}
