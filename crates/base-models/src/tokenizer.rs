//! Text to tokens and back.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::files;
use crate::gguf_file::GgufFile;
use crate::gguf_tokenizer;
use crate::sentence_piece_model;
use crate::text_stream::TextStream;
use longctx_core::{Error, Result};
use tokenizers::Tokenizer as Inner;

/// A model's tokenizer, from `tokenizer.json`, `tokenizer.model` or a GGUF file's metadata.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Inner,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`. Its sections on truncation and padding are left out: they belong
    /// to training.
    ///
    /// # Errors
    /// [`Error::File`] if it can't be read.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = files::read_text(path)?;
        // A text cut off midway makes the parser of `tokenizers` panic.
        serde_json::from_str::<serde::de::IgnoredAny>(&text).map_err(|e| Error::file(path, e))?;
        let mut inner: Inner = unpanicked(|| text.parse()).map_err(|e| Error::file(path, e))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::file(path, e))?;
        Ok(Self { inner })
    }

    /// Reads a folder's `tokenizer.json` or, if there is none, its `tokenizer.model`
    /// (SentencePiece's format) with the tokens that `tokenizer_config.json` or `added_tokens.json`
    /// adds.
    ///
    /// # Errors
    /// [`Error::File`] if they can't be read; [`Error::Unsupported`] for a SentencePiece model that
    /// is not BPE.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let json = folder.join("tokenizer.json");
        if json.exists() || !folder.join("tokenizer.model").exists() {
            return Self::from_file(&json);
        }
        Ok(Self { inner: sentence_piece_model::tokenizer(folder)? })
    }

    /// Builds the tokenizer that a GGUF file describes: byte-level BPE ("gpt2": Llama 3, Qwen,
    /// SmolLM) or SentencePiece BPE ("llama": Llama 2, Mistral). Text is split by the pre-tokenizer
    /// that the file names.
    ///
    /// # Errors
    /// [`Error::File`] naming the metadata that is missing or broken; [`Error::Unsupported`] naming
    /// a model or a pre-tokenizer that is not known.
    pub fn from_gguf(path: &Path) -> Result<Self> {
        Self::from_gguf_file(&GgufFile::open(path)?)
    }

    pub(crate) fn from_gguf_file(file: &GgufFile) -> Result<Self> {
        Ok(Self { inner: gguf_tokenizer::tokenizer(file)? })
    }

    /// The tokens of a text. `special`: with what the model expects around a text, most often a
    /// first token.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the tokenizer's own message.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = unpanicked(|| self.inner.encode_fast(text, special)).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special ones left out.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the tokenizer's own message.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        unpanicked(|| self.inner.decode(tokens, true)).map_err(failed)
    }

    /// The text of one token as it stands in the vocabulary, for special tokens.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token of the vocabulary.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Turns tokens into text one at a time, holding back bytes until they make a character.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// Whether a token never has a text: special, or no token at all.
    pub(crate) fn is_silent(&self, id: u32) -> bool {
        let special = |token: String| self.inner.get_added_vocabulary().is_special_token(&token);
        self.inner.id_to_token(id).is_none_or(special)
    }

    /// The tokenizer of the `tokenizers` crate behind it.
    pub fn inner(&self) -> &Inner {
        &self.inner
    }
}

/// The regular expressions behind `tokenizers` panic when a text makes them give up.
fn unpanicked<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    let panicked = |payload: Box<dyn std::any::Any + Send>| {
        let message = payload.downcast_ref::<String>().cloned();
        message.or_else(|| payload.downcast_ref::<&str>().map(|&text| text.into()))
    };
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
        Err(panicked(payload).unwrap_or_else(|| "the tokenizer panicked".into()).into())
    })
}

fn failed(e: tokenizers::Error) -> Error {
    Error::Unsupported(format!("tokenizer: {e}"))
}
