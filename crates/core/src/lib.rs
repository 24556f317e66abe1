#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod attention;
mod cache;
mod compress;
mod dense;
mod error;
mod footprint;
mod generate;
mod lm;
mod policy;
mod rope;
mod shape;
mod store;

pub use cache::{KvCache, Step};
pub use compress::{Compressed, Piece, Prompt, PromptCompressor, Rate};
pub use dense::{DenseCache, DenseStore};
pub use error::{Error, Result};
pub use footprint::Footprint;
pub use generate::{GenerateOptions, Generation, Sampler, Sampling, StopReason, generate, prefill};
pub use lm::{CausalLm, Logits};
pub use policy::{EvictionPolicy, Held, HeldHead, Mass, Needs, Protected};
pub use rope::{Rope, RopeScaling};
pub use shape::{AttentionShape, LayerShape};
pub use store::{KvStore, Partial, Selection, Visible};
