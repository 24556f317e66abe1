//! The models on candle's CUDA device.
//!
//! Matrix products use cuBLAS. Convolutions, scans, recurrences, norms, token shifts and gates,
//! fused with adjacent operations, are kernels/*.cu. A call does not synchronize with the device
//! between its ids and its logits.
//!
//! Activations between layers are f32, inputs and outputs of matrix products have the dtype of the
//! weights, and states are f32 and updated in place.

mod args;
mod attention;
mod channel_mix;
mod conv;
mod device_context;
mod gate;
mod gated_norm;
mod head_norm;
mod kernels;
mod linear;
mod mamba;
mod mamba2;
mod mlp;
mod model;
mod norm;
mod product;
mod rg_lru;
mod selective_scan;
mod shift;
mod ssd;
mod state_pool;
mod v4;
mod v5;
mod v6;
mod v7;
mod wkv;

pub use channel_mix::ChannelMix;
pub use device_context::DeviceContext;
pub use mamba::Mamba;
pub use mamba2::Mamba2;
pub use mlp::Mlp;
pub use model::{Call, OnDevice};
pub use rg_lru::RgLru;
pub use state_pool::StatePool;
pub use v4::V4;
pub use v5::V5;
pub use v6::V6;
pub use v7::V7;

use candle_core::Tensor;
use longctx_core::{Error, Result};
use std::collections::BTreeMap;
use std::fmt::Debug;

/// The input rows of a mixer.
pub struct Input<'a> {
    /// `[batch * tokens, hidden]`, normalised, in the dtype of the weights, or in f32 for mixers
    /// that [require](Mixer::reads_f32) it.
    pub x: &'a Tensor,
    /// Number of sequences, with equally many tokens each.
    pub batch: usize,
    pub tokens: usize,
    /// Whether the tokens are the first ones of their sequences.
    pub first: bool,
}

/// Values passed from a layer to those above it for the same rows: RWKV-7's values of the first
/// layer. All layers process the same blocks of tokens.
#[derive(Default)]
pub struct Carried {
    /// The first token of the block that a mixer is called with.
    pub block: usize,
    /// The values of each block, by its first token.
    pub first_values: BTreeMap<usize, Tensor>,
}

/// The device version of a [`Recurrent`](crate::mixer::Recurrent) mixer, with its weights on the
/// device.
pub trait Mixer: Debug + Send + Sync {
    /// Returns whether it reads f32 rows. A token shift subtracts adjacent rows, and the difference
    /// would lose most of its precision after rounding.
    fn reads_f32(&self) -> bool {
        false
    }

    /// Reads the state, one tensor `[batch, …]` per array, and updates it to the state after the
    /// last token. Returns `[batch * tokens, hidden]` in the dtype of the weights.
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], carried: &mut Carried) -> Result<Tensor>;
}

/// Returns the arrays of a mixer's state.
///
/// # Errors
/// [`Error::Mismatch`] if there are not `N`.
fn arrays<const N: usize>(state: &mut [Tensor]) -> Result<&mut [Tensor; N]> {
    let got = state.len();
    state.try_into().map_err(|_| Error::mismatch("arrays of a mixer's state", N, got))
}
