//! An OpenAI-compatible server over any model and cache of the workspace, and its scheduler for
//! programs that serve without HTTP.

mod answer;
mod api;
mod command;
pub mod metrics;
mod prefixes;
mod routes;
pub mod scheduler;
mod text;

pub use command::{Args, serve};
