//! RWKV's token shift on the device: each row mixed with the row before it.

use super::Input;
use super::target::Target;
use candle_core::Tensor;
use longctx_core::Result;

/// Several mixes of the same rows, each with a weight per channel.
#[derive(Debug)]
pub struct Shift {
    /// Of the row before, `[mixes, 1, hidden]`.
    weights: Tensor,
}

impl Shift {
    pub fn new<'a>(mixes: impl IntoIterator<Item = &'a Vec<f32>>, to: &Target) -> Result<Self> {
        let mixes = mixes.into_iter().map(|mix| to.vector(mix)).collect::<Result<Vec<_>>>()?;
        Ok(Self { weights: Tensor::stack(&mixes, 0)?.unsqueeze(1)? })
    }

    /// The mixes `[mixes, rows, hidden]` in f32, of rows and their [`differences`] to those before.
    pub fn apply(&self, x: &Tensor, differences: &Tensor) -> Result<Tensor> {
        mix(x, differences, &self.weights)
    }

    /// The same, with something added to the weights for each row: `[mixes, rows, hidden]`.
    pub fn apply_with(&self, x: &Tensor, differences: &Tensor, more: &Tensor) -> Result<Tensor> {
        mix(x, differences, &more.broadcast_add(&self.weights)?)
    }
}

fn mix(x: &Tensor, differences: &Tensor, weights: &Tensor) -> Result<Tensor> {
    Ok(weights.broadcast_mul(&differences.unsqueeze(0)?)?.broadcast_add(&x.unsqueeze(0)?)?)
}

/// The row before minus the row, for every row. The state `[batch, hidden]` is the row before each entry's first, and then its last.
pub fn differences(x: &Input<'_>, state: &mut Tensor) -> Result<Tensor> {
    let rows = x.x.reshape((x.batch, x.tokens, ()))?;
    let before = state.unsqueeze(1)?;
    let before = match x.tokens {
        1 => before,
        tokens => Tensor::cat(&[before, rows.narrow(1, 0, tokens - 1)?], 1)?,
    };
    // A copy: a view would keep all rows.
    *state = rows.narrow(1, x.tokens - 1, 1)?.squeeze(1)?.force_contiguous()?;
    Ok((before - &rows)?.reshape(x.x.shape())?)
}
