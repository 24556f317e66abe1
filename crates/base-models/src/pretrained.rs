//! A model with its tokenizer and chat template, from wherever it lies.

use std::path::Path;

use crate::chat::ChatTemplate;
use crate::decoder::Transformer;
use crate::gguf::Gguf;
use crate::tokenizer::Tokenizer;
use crate::weights::LoadOptions;
#[cfg(not(feature = "hub"))]
use longctx_core::Error;
use longctx_core::Result;

/// A transformer, its tokenizer and, if it was made for conversation, its chat template.
#[derive(Debug, Clone)]
pub struct Pretrained {
    /// The weights.
    pub model: Transformer,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Conversations to text.
    pub chat: Option<ChatTemplate>,
}

impl Pretrained {
    /// Opens what `name` names: a `.gguf` file, a folder in Hugging Face's layout, or else a model of the Hub ("org/name").
    ///
    /// # Errors
    /// As the constructor that it comes to.
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

    /// From a folder with `config.json`, `tokenizer.json` and `model.safetensors` or its shards and their index.
    ///
    /// # Errors
    /// [`Error::File`](longctx_core::Error::File) naming the file that is missing or broken; [`Error::Mismatch`](longctx_core::Error::Mismatch) naming a tensor of another shape;
    /// [`Error::Unsupported`](longctx_core::Error::Unsupported) for another architecture.
    pub fn from_folder(folder: &Path, options: &LoadOptions) -> Result<Self> {
        let model = Transformer::from_folder(folder, options)?;
        let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
        Ok(Self { model, tokenizer, chat: ChatTemplate::from_folder(folder)? })
    }

    /// From one GGUF file of the architecture llama, qwen2 or qwen3.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder); a truncated file is named with the tensor that is cut off.
    pub fn from_gguf(path: &Path, options: &LoadOptions) -> Result<Self> {
        let mut file = Gguf::open(path, options)?;
        let config = file.config()?;
        let tokenizer = Tokenizer::from_gguf(path, file.content())?;
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id)).unwrap_or_default();
        let (bos, eos) = (token(config.bos), token(config.eos.first().copied()));
        let chat = file.chat_template().map(|t| ChatTemplate::new(t, &bos, &eos)).transpose()?;
        let model = Transformer::load(config, &file, options)?;
        Ok(Self { model, tokenizer, chat })
    }

    /// From the Hugging Face Hub, by name: "HuggingFaceTB/SmolLM2-135M-Instruct". Files are kept in the Hub's usual cache.
    ///
    /// # Errors
    /// [`Error::File`](longctx_core::Error::File) naming the model and the file that could not be had; then as [`from_folder`](Self::from_folder).
    #[cfg(feature = "hub")]
    pub fn from_hub(name: &str, options: &LoadOptions) -> Result<Self> {
        Self::from_folder(&crate::hub::download(name)?, options)
    }

    /// From the Hugging Face Hub: this build has no feature `hub`.
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
