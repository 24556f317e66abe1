#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod attention;
mod checkpoint;
mod config;
mod conv;
#[cfg(feature = "cuda")]
mod cuda;
mod gated_mlp;
mod host_model;
#[cfg(feature = "hub")]
mod hub;
mod linear;
mod mamba;
mod mamba2;
mod mamba_lm;
mod matrix;
mod mixer;
mod model;
mod model_spec;
mod norm;
mod pretrained;
mod recurrent_gemma;
mod recurrent_state;
mod rg_lru;
mod rwkv;
mod session;
mod simd;
mod split_columns;
mod stack;
mod state;
mod tokenizer;
mod workspace;
mod world;

pub use longctx_core;

pub use checkpoint::LoadOptions;
pub use model::Model;
pub use pretrained::Pretrained;
pub use session::Session;
pub use state::State;
pub use tokenizer::Tokenizer;
pub use world::World;
