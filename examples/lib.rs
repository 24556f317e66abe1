//! What several examples need: a model that fetches itself, and the process's memory.

pub mod memory;
pub mod model;
