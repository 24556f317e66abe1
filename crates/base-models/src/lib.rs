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
mod tokenizer;
mod weights;

pub use chat::{ChatTemplate, Message};
pub use config::Config;
pub use decoder::{Decoder, Transformer};
pub use pretrained::Pretrained;
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::LoadOptions;
