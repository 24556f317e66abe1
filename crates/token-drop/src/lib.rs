#![doc = include_str!("../README.md")]
// Only launches of kernels are unsafe.
#![cfg_attr(not(feature = "cuda"), forbid(unsafe_code))]
#![cfg_attr(feature = "cuda", deny(unsafe_code))]

mod allocation;
mod budget;
mod cache;
mod group_reduction;
mod inf_llm;
mod metadata;
mod policy;
mod prompt;
mod quest;
mod scores;
mod select;
mod sequences;
mod settings;
mod storage;
mod streaming_llm;
mod sub_batch;

pub use longctx_core;

pub use allocation::{HeadBudgets, LayerBudgets};
pub use budget::Budget;
pub use cache::PolicyCache;
pub use group_reduction::GroupReduction;
pub use inf_llm::{InfLlm, InfLlmSettings};
pub use policy::{
    EvictionPolicy, LayerView, Needs, ObservedQueries, ReducedAttention, ReducedHeads,
    duo_attention::DuoAttention, expected_attention::ExpectedAttention, finch::Finch, h2o::H2o,
    k_norm::KNorm, key_diff::KeyDiff, lag_kv::LagKv, random::Random, recent::Recent,
    snap_kv::SnapKv, tova::Tova,
};
pub use quest::Quest;
pub use select::{Granularity, Protected};
pub use settings::{Prefill, Settings};
pub use streaming_llm::StreamingLlm;
