//! Loads a model with its tokenizer and chat template.

use std::path::Path;

use crate::chat::{ChatOptions, ChatTemplate, Message};
use crate::decoder::Transformer;
use crate::gguf::Gguf;
use crate::tokenizer::Tokenizer;
use crate::weights::LoadOptions;
use longctx_core::{Error, Result};
use serde::Serialize;

/// A transformer, its tokenizer and, for chat models, its chat template.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Pretrained {
    /// The weights.
    pub model: Transformer,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template.
    pub chat: Option<ChatTemplate>,
}

impl Pretrained {
    /// Opens `name`: a `.gguf` file, a folder in Hugging Face format, or else a model of the Hub
    /// ("org/name").
    ///
    /// # Errors
    /// As the constructor that is used.
    pub fn open(name: &str, options: &LoadOptions) -> Result<Self> {
        let path = Path::new(name);
        if path.is_dir() {
            Self::from_folder(path, options)
        } else if path.is_file() || path.extension().is_some_and(|e| e == "gguf") {
            Self::from_gguf(path, options)
        } else {
            Self::from_hub(name, options)
        }
    }

    /// Loads a folder with `config.json`, `tokenizer.json` and `model.safetensors` or its shards
    /// with their index. Safetensors files are memory-mapped, so they must not be modified during
    /// the call.
    ///
    /// # Errors
    /// - [`Error::File`](longctx_core::Error::File) naming a missing or invalid file.
    /// - [`Error::Mismatch`](longctx_core::Error::Mismatch) naming a tensor of another shape.
    /// - [`Error::Unsupported`](longctx_core::Error::Unsupported) for another architecture.
    pub fn from_folder(folder: &Path, options: &LoadOptions) -> Result<Self> {
        let model = Transformer::from_folder(folder, options)?;
        let tokenizer = Tokenizer::from_folder(folder)?;
        Ok(Self { model, tokenizer, chat: ChatTemplate::from_folder(folder)? })
    }

    /// Loads a GGUF file, or the first of several parts.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder). The error of a truncated file names the first
    /// incomplete tensor.
    pub fn from_gguf(path: &Path, options: &LoadOptions) -> Result<Self> {
        let file = Gguf::open(path, options)?;
        let config = file.config()?;
        let tokenizer = Tokenizer::from_gguf_file(file.file())?;
        let ids = [("bos_token", config.bos), ("eos_token", config.eos.first().copied())];
        let token =
            |(name, id): (&str, Option<u32>)| Some((name.to_owned(), tokenizer.token(id?)?));
        let tokens = ids.into_iter().filter_map(token).collect();
        let chat = ChatTemplate::from_gguf(file.file(), tokens)?;
        let model = Transformer::load(config, &file, options)?;
        Ok(Self { model, tokenizer, chat })
    }

    /// Returns the tokens of a conversation, ending with the start of the model's answer.
    ///
    /// The template writes the token that begins a text, so none is added.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the model has no chat template; as [`ChatTemplate::render`].
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.encode_chat_with(messages, &ChatOptions::reply())
    }

    /// Returns the tokens of a conversation, with tools and other variables of its template.
    ///
    /// # Errors
    /// As [`encode_chat`](Self::encode_chat).
    pub fn encode_chat_with<M: Serialize>(
        &self,
        messages: &[M],
        options: &ChatOptions,
    ) -> Result<Vec<u32>> {
        let missing =
            || Error::Unsupported("a conversation: the model has no chat template".into());
        let chat = self.chat.as_ref().ok_or_else(missing)?;
        self.tokenizer.encode(&chat.render_with(messages, options)?, false)
    }

    /// Loads a model from the Hugging Face Hub by name: "HuggingFaceTB/SmolLM2-135M-Instruct".
    /// Downloads go to the Hub's usual cache.
    ///
    /// # Errors
    /// [`Error::File`](longctx_core::Error::File) naming the model and a file that cannot be
    /// downloaded; as [`from_folder`](Self::from_folder).
    #[cfg(feature = "hub")]
    pub fn from_hub(name: &str, options: &LoadOptions) -> Result<Self> {
        Self::from_folder(&crate::hub::download(name)?, options)
    }

    /// Returns an error: this build does not have the feature `hub`.
    ///
    /// # Errors
    /// [`Error::Unsupported`](longctx_core::Error::Unsupported), always.
    #[cfg(not(feature = "hub"))]
    pub fn from_hub(name: &str, _: &LoadOptions) -> Result<Self> {
        Err(Error::Unsupported(format!(
            "{name}: no such file, and no feature `hub` to download it"
        )))
    }
}
