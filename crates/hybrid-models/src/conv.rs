//! The causal depthwise convolution before a recurrence.

use crate::matrix::Rows;
use crate::simd::silu;
use crate::split_columns::{UnitMatrix, split_columns};
use longctx_core::Result;
use pulp::{Arch, Scalar, Simd, WithSimd};

use crate::checkpoint::Checkpoint;

/// Channels per task.
const CHANNELS: usize = 128;
/// Smallest number of outputs for which several threads are used.
const PARALLEL: usize = 1 << 14;

/// `y[t] = bias + Σ_j weight[j] x[t − (taps − 1) + j]` per channel, optionally followed by SiLU.
#[derive(Debug, Clone)]
pub struct Conv {
    /// `[taps, channels]`.
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub taps: usize,
    pub silu: bool,
}

impl Conv {
    /// Loads `name.weight` `[channels, 1, taps]` and, if `bias`, `name.bias`.
    pub fn load(
        w: &Checkpoint,
        name: &str,
        channels: usize,
        taps: usize,
        bias: bool,
        silu: bool,
    ) -> Result<Self> {
        let by_channel = w.tensor(&format!("{name}.weight"), &[channels, 1, taps])?;
        let weight =
            (0..taps * channels).map(|i| by_channel[i % channels * taps + i / channels]).collect();
        let bias = match bias {
            true => w.tensor(&format!("{name}.bias"), &[channels])?,
            false => vec![0.0; channels],
        };
        Ok(Self { weight, bias, taps, silu })
    }

    pub fn channels(&self) -> usize {
        self.bias.len()
    }

    /// Returns the size of the state of a sequence: its last inputs, `[taps − 1, channels]`.
    pub fn state_size(&self) -> usize {
        (self.taps - 1) * self.channels()
    }

    /// Computes the rows of one sequence. `state` holds the previous inputs and is updated to the
    /// last ones.
    pub fn forward(&self, x: Rows<'_>, tokens: usize, state: &mut [f32], y: &mut [f32]) {
        let channels = self.channels();
        let past = self.taps - 1;
        let matrices = [UnitMatrix { data: y, per_unit: 1 }];
        let old = Rows::new(state, channels);
        split_columns(
            channels,
            CHANNELS,
            tokens * channels >= PARALLEL,
            matrices,
            |part, [mut y]| {
                for t in 0..tokens {
                    let y = y.row(t);
                    y.copy_from_slice(&self.bias[part.clone()]);
                    for j in 0..self.taps {
                        let input = match (t + j).checked_sub(past) {
                            Some(i) => x.row(i),
                            None => old.row(t + j),
                        };
                        let weight = &self.weight[j * channels..][part.clone()];
                        let silu = self.silu && j == past;
                        Arch::new().dispatch(Tap { weight, x: &input[part.clone()], y, silu });
                    }
                }
            },
        );
        let kept = past.saturating_sub(tokens);
        state.copy_within((past - kept) * channels.., 0);
        for i in kept..past {
            let row = x.row(tokens + i - past);
            state[i * channels..][..channels].copy_from_slice(row);
        }
    }
}

struct Tap<'a> {
    weight: &'a [f32],
    x: &'a [f32],
    y: &'a mut [f32],
    silu: bool,
}

impl WithSimd for Tap<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        #[inline(always)]
        fn run<S: Simd>(simd: S, w: &[S::f32s], x: &[S::f32s], y: &mut [S::f32s], last: bool) {
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = simd.mul_add_f32s(w, x, *y);
            }
            if last {
                for y in y {
                    *y = silu(simd, *y);
                }
            }
        }
        let (w, w_tail) = S::as_simd_f32s(self.weight);
        let (x, x_tail) = S::as_simd_f32s(self.x);
        let (y, y_tail) = S::as_mut_simd_f32s(self.y);
        run(simd, w, x, y, self.silu);
        run(Scalar, w_tail, x_tail, y_tail, self.silu);
    }
}
