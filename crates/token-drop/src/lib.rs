#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod budget;
mod cache;
mod entries;
mod group;
mod inf_llm;
mod part;
mod policy;
mod prompt;
mod quest;
mod scores;
mod select;
mod sequences;
mod settings;
mod sharing;
mod storage;
mod streaming_llm;

pub use budget::Budget;
pub use cache::PolicyCache;
pub use group::Group;
pub use inf_llm::{InfLlm, InfLlmSettings};
pub use policy::{
    EvictionPolicy, LayerView, Needs, ObservedQueries, duo_attention::DuoAttention,
    expected_attention::ExpectedAttention, finch::Finch, h2o::H2o, k_norm::KNorm,
    key_diff::KeyDiff, lag_kv::LagKv, random::Random, recent::Recent, snap_kv::SnapKv, tova::Tova,
};
pub use quest::Quest;
pub use select::{Granularity, Protected};
pub use settings::{Prefill, Settings};
pub use sharing::{HeadBudgets, LayerBudgets};
pub use streaming_llm::StreamingLlm;
