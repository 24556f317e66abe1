//! Linear maps with optional biases.

use crate::checkpoint::Checkpoint;
use crate::matrix::{Matrix, Rows};
use crate::simd::{Add, zip};
use longctx_core::Result;

/// A linear map with an optional bias.
#[derive(Debug)]
pub struct Linear {
    pub matrix: Matrix,
    pub bias: Option<Vec<f32>>,
}

impl Linear {
    pub fn load(w: &Checkpoint, name: &str, out: usize, inner: usize, bias: bool) -> Result<Self> {
        let matrix = w.matrix(&format!("{name}.weight"), out, inner)?;
        let bias = bias.then(|| w.tensor(&format!("{name}.bias"), &[out])).transpose()?;
        Ok(Self { matrix, bias })
    }

    /// Concatenates several maps of one input. All have a bias, or none.
    pub fn concat(
        w: &Checkpoint,
        names: &[String],
        out: usize,
        inner: usize,
        bias: bool,
    ) -> Result<Self> {
        let weights: Vec<_> = names.iter().map(|name| (format!("{name}.weight"), out)).collect();
        let of_map = |name: &String| w.tensor(&format!("{name}.bias"), &[out]);
        let biases = || names.iter().map(of_map).collect::<Result<Vec<_>>>();
        let bias = bias.then(biases).transpose()?.map(|biases| biases.concat());
        Ok(Self { matrix: w.concat(&weights, inner)?, bias })
    }

    pub fn apply(&self, x: Rows<'_>, y: &mut [f32]) {
        self.matrix.apply(x, y);
        if let Some(bias) = &self.bias {
            y.chunks_exact_mut(bias.len()).for_each(|row| zip(Add, row, bias));
        }
    }
}
