#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod attention;
mod batch;
mod cache;
mod compress;
#[cfg(feature = "cuda")]
pub mod cuda;
mod dense;
mod error;
mod evict_one;
mod finite;
mod footprint;
mod gated;
mod generate;
mod greedy;
mod latent;
mod layer_caches;
mod linear;
mod lm;
mod norm;
mod post_attention;
mod rope;
mod seen;
mod selection;
mod shape;
mod state;
mod step_lists;
mod store;
mod store_cache;
mod sums;
mod top;
mod window;

pub use candle_core;

pub use batch::{Batch, SeqId};
pub use cache::{KvCache, Step, check_unseen};
pub use compress::{Compressed, Piece, Prompt, PromptCompressor, Rate};
pub use dense::{DenseCache, DenseStore, DenseStrategy};
pub use error::{Error, Result};
pub use evict_one::{EvictOne, KeptEntries};
pub use footprint::Footprint;
pub use gated::silu_mul;
pub use generate::{GenerateOptions, Generation, Sampler, Sampling, StopReason, generate, prefill};
pub use greedy::{Greedy, PendingTokens};
pub use latent::{LatentCache, LatentStore, LatentStrategy};
pub use layer_caches::LayerCaches;
pub use linear::linear;
pub use lm::{CausalLm, Logits};
pub use norm::add_rms_norm;
pub use post_attention::{PostAttention, PostAttentionWeights};
pub use rope::{Rope, RopeScaling};
pub use seen::SeenTokens;
pub use selection::{Selection, check_selections};
pub use shape::{AttentionShape, LayerSpec};
pub use state::AttentionState;
pub use step_lists::{PreparedDecode, PreparedStep, StepLists};
pub use store::{EntryRanges, KvStore, Mark, Mask, check_lens, check_range};
pub use store_cache::{CacheStrategy, StoreCache, append_and_attend};
pub use sums::AttentionSums;
pub use top::{Candidates, Ranking, RowReduction, TopEntries, top_entries};
pub use window::{WindowCache, WindowStrategy, by_layer_type};
