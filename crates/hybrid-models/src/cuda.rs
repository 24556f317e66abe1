//! The models on candle's CUDA device. Products with matrices are cuBLAS's; convolutions, scans, recurrences, and norms, token shifts and gates
//! with what surrounds them are kernels/*.cu. Nothing waits for the device between a call's ids and its logits.
//!
//! Rows between layers are f32, what goes into and out of products is in the format of the weights, states are f32 and change in place.

mod args;
mod attention;
mod channel_mix;
mod conv;
mod gate;
mod gated_norm;
mod groups;
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
mod target;
mod v4;
mod v5;
mod v6;
mod v7;
mod wkv;

pub use channel_mix::ChannelMix;
pub use groups::Groups;
pub use mamba::Mamba;
pub use mamba2::Mamba2;
pub use mlp::Mlp;
pub use model::{Call, OnDevice};
pub use rg_lru::RgLru;
pub use target::Target;
pub use v4::V4;
pub use v5::V5;
pub use v6::V6;
pub use v7::V7;

use candle_core::Tensor;
use longctx_core::Result;
use std::fmt::Debug;

/// Rows that a mixer reads.
pub struct Input<'a> {
    /// `[batch * tokens, hidden]`, normalised, in the format of the weights, or in f32 for mixers that [read](Mixer::reads_f32) that.
    pub x: &'a Tensor,
    /// Sequences, of equally many tokens.
    pub batch: usize,
    pub tokens: usize,
    /// Whether they are the sequences' first.
    pub first: bool,
}

/// What layers hand to those above them for the same rows: RWKV-7's values of the first layer.
#[derive(Default)]
pub struct Carried {
    pub first_values: Option<Tensor>,
}

/// A mixer of [`Recurrent`](crate::mixer::Recurrent)'s kind, its weights on the device.
pub trait Mixer: Debug + Send + Sync {
    /// Whether it reads its rows in f32. A token shift takes differences of rows, which would keep little of them after a rounding.
    fn reads_f32(&self) -> bool {
        false
    }

    /// Reads the state, one tensor `[batch, …]` for each of its arrays, leaves the one after the last token and gives
    /// `[batch * tokens, hidden]` in the format of the weights.
    fn forward(&self, x: Input<'_>, state: &mut [Tensor], carried: &mut Carried) -> Result<Tensor>;
}
