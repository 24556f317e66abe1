#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod chat;
mod config;
mod decoder;
mod folder;
mod gguf;
#[cfg(feature = "hub")]
mod hub;
mod linear;
mod pretrained;
mod quantized;
mod random;
mod session;
mod tokenizer;
mod weights;

pub use chat::{ChatTemplate, Message};
pub use config::Config;
pub use decoder::Transformer;
pub use pretrained::Pretrained;
pub use session::Decoder;
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::LoadOptions;
