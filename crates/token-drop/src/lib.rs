#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod budget;
mod cache;
mod check;
mod group;
mod inf_llm;
mod ledger;
mod policy;
mod quest;
mod rows;
mod streaming_llm;
mod wrapper;

pub use budget::Budget;
pub use cache::{PolicyCache, Prefill};
pub use group::Group;
pub use inf_llm::{InfLlm, InfLlmSettings};
pub use policy::{
    duo_attention::DuoAttention, expected_attention::ExpectedAttention, finch::Finch, h2o::H2o,
    k_norm::KNorm, key_diff::KeyDiff, lag_kv::LagKv, random::Random, recent::Recent,
    snap_kv::SnapKv, tova::Tova,
};
pub use quest::Quest;
pub use streaming_llm::StreamingLlm;
pub use wrapper::{ada_kv::AdaKv, chunk_kv::ChunkKv, pyramid_kv::PyramidKv, rerotated::Rerotated};
