//! Tokenizers.

use std::path::Path;

use crate::gguf_file::GgufFile;
use crate::gguf_tokenizer;
use crate::sentence_piece_model;
use crate::text_stream::TextStream;
use longctx_checkpoint::{files, unpanicked};
use longctx_core::{Error, Result};
use tokenizers::Tokenizer as Inner;

/// A model's tokenizer, from `tokenizer.json`, `tokenizer.model` or a GGUF file's metadata.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Inner,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. Its truncation and padding sections are ignored: they are for
    /// training.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = files::read_text(path)?;
        // A truncated file makes the parser of `tokenizers` panic.
        serde_json::from_str::<serde::de::IgnoredAny>(&text).map_err(|e| Error::file(path, e))?;
        let mut inner: Inner = unpanicked(|| text.parse()).map_err(|e| Error::file(path, e))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::file(path, e))?;
        Ok(Self { inner })
    }

    /// Reads a folder's `tokenizer.json`. If there is none, reads its `tokenizer.model`
    /// (SentencePiece's format) with the tokens that `tokenizer_config.json` or `added_tokens.json`
    /// adds.
    ///
    /// # Errors
    /// [`Error::File`] if the files cannot be read; [`Error::Unsupported`] for a SentencePiece
    /// model that is not BPE.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let json = folder.join("tokenizer.json");
        if json.exists() || !folder.join("tokenizer.model").exists() {
            return Self::from_file(&json);
        }
        Ok(Self { inner: sentence_piece_model::tokenizer(folder)? })
    }

    /// Builds the tokenizer of a GGUF file: byte-level BPE ("gpt2": Llama 3, Qwen, SmolLM) or
    /// SentencePiece BPE ("llama": Llama 2, Mistral), with the pre-tokenizer that the file names.
    ///
    /// # Errors
    /// [`Error::File`] naming missing or invalid metadata; [`Error::Unsupported`] naming an unknown
    /// model or pre-tokenizer.
    pub fn from_gguf(path: &Path) -> Result<Self> {
        Self::from_gguf_file(&GgufFile::open(path)?)
    }

    pub(crate) fn from_gguf_file(file: &GgufFile) -> Result<Self> {
        Ok(Self { inner: gguf_tokenizer::tokenizer(file)? })
    }

    /// Returns the tokens of a text. `special` adds the special tokens that the model expects,
    /// usually a first token.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the tokenizer's own message.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = unpanicked(|| self.inner.encode_fast(text, special))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns the text of tokens, without special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the tokenizer's own message.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        unpanicked(|| self.inner.decode(tokens, true))
    }

    /// Returns the text of one token in the vocabulary, also for special tokens.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Returns the id of a token of the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns a stream that decodes tokens one at a time and holds back incomplete characters.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// Returns whether a token never has a text: a special token, or an unknown id.
    pub(crate) fn is_silent(&self, id: u32) -> bool {
        let special = |token: String| self.inner.get_added_vocabulary().is_special_token(&token);
        self.inner.id_to_token(id).is_none_or(special)
    }

    /// Returns the underlying tokenizer of the `tokenizers` crate.
    pub fn inner(&self) -> &Inner {
        &self.inner
    }
}
