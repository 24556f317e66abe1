//! The scheduler of the server, for programs that serve without HTTP.

pub mod metrics;
mod prefixes;
pub mod scheduler;
