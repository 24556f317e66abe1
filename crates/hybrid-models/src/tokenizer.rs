//! Tokenizers.

use std::path::Path;

use crate::world::World;
use longctx_checkpoint::{open_tokenizer, unpanicked};
use longctx_core::{Error, Result};

/// A model's tokenizer: a `tokenizer.json`, or the vocabulary of RWKV's World models.
#[derive(Debug, Clone)]
pub enum Tokenizer {
    /// A tokenizer of the `tokenizers` crate.
    Json(Box<tokenizers::Tokenizer>),
    /// RWKV's World tokenizer.
    World(World),
}

impl Tokenizer {
    /// Loads `tokenizer.json` from a folder, or else a World vocabulary: `rwkv_vocab_v20230424.txt`
    /// or another `*vocab*.txt`.
    ///
    /// # Errors
    /// [`Error::File`] if there is neither, or it cannot be read.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let json = folder.join("tokenizer.json");
        if json.exists() {
            return Ok(Self::Json(Box::new(open_tokenizer(&json)?)));
        }
        let entries = std::fs::read_dir(folder).map_err(|e| Error::file(folder, e))?;
        let is_vocabulary = |path: &std::path::PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.contains("vocab") && name.ends_with(".txt")
        };
        match entries.flatten().map(|entry| entry.path()).find(is_vocabulary) {
            Some(path) => Ok(Self::World(World::from_file(&path)?)),
            None => {
                let reason = "there is neither tokenizer.json nor a World vocabulary (*vocab*.txt)";
                Err(Error::file(folder, reason))
            }
        }
    }

    /// Returns the tokens of a text. `special` adds the special tokens that the model expects,
    /// usually a first token.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the tokenizer's own message.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        match self {
            Self::Json(inner) => {
                let encoding = unpanicked(|| inner.encode_fast(text, special))?;
                Ok(encoding.get_ids().to_vec())
            }
            Self::World(world) => world.encode(text.as_bytes()),
        }
    }

    /// Returns the text of tokens, without special tokens. Invalid UTF-8 becomes replacement
    /// characters.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the tokenizer's own message.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        match self {
            Self::Json(inner) => unpanicked(|| inner.decode(tokens, true)),
            Self::World(world) => Ok(String::from_utf8_lossy(&world.decode(tokens)).into_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_exceeds_the_limit_of_a_pattern_is_an_error() {
        let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": false},
            "post_processor": null, "decoder": null, "model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}"#;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(tokenizer.encode("xx", true).unwrap(), [0, 0]);
        let message = tokenizer.encode(&"x".repeat(60), true).unwrap_err().to_string();
        assert!(message.contains("retry"), "{message}");
    }
}
