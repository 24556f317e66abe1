#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod budget;
mod cache;
mod group;
mod ledger;
mod policy;
mod streaming_llm;

pub use budget::Budget;
pub use cache::{PolicyCache, Prefill};
pub use group::Group;
pub use policy::{
    h2o::H2o, k_norm::KNorm, random::Random, recent::Recent, snap_kv::SnapKv, tova::Tova,
};
pub use streaming_llm::StreamingLlm;
