#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod architectures;
mod block_formats;
mod chat;
mod config;
mod decoder;
mod feed_forward;
mod folder;
mod fp8;
mod ggml_types;
mod gguf;
mod gguf_file;
mod gguf_header;
mod gguf_settings;
mod gguf_tokenizer;
#[cfg(feature = "hub")]
mod hub;
mod json;
mod latent_attention;
mod layer;
mod linear;
mod mixture;
mod names;
mod pre_tokenizers;
mod pretrained;
mod python_json;
mod quantized;
mod random;
mod rope_settings;
mod router;
mod sentence_piece;
mod sentence_piece_model;
mod session;
mod template;
mod template_source;
mod text_stream;
mod tokenizer;
mod weights;

pub use longctx_core;

pub use chat::{ChatOptions, ChatTemplate, Message};
pub use config::{Activation, Config, ExpertGroups, Experts, Latent, QkNorm, Scoring};
pub use decoder::Transformer;
pub use pretrained::Pretrained;
pub use rope_settings::RopeSettings;
pub use session::Session;
pub use text_stream::TextStream;
pub use tokenizer::Tokenizer;
pub use weights::LoadOptions;
