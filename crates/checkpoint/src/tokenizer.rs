//! `tokenizer.json`.

use std::path::Path;

use longctx_core::{Error, Result};
use serde_json::Value;
use tokenizers::Tokenizer;

/// Opens a `tokenizer.json`. Its truncation and padding are switched off: a caller gets the tokens of the text, no fewer and no more.
///
/// # Errors
/// [`Error::File`] if the file can't be read, is no JSON, or describes no tokenizer.
pub fn open_tokenizer(path: &Path) -> Result<Tokenizer> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
    read_tokenizer(&bytes).map_err(|reason| Error::file(path, reason))
}

/// As [`open_tokenizer`], from the file's bytes.
///
/// # Errors
/// Why the bytes describe no tokenizer.
pub fn read_tokenizer(bytes: &[u8]) -> Result<Tokenizer, String> {
    // `tokenizers` panics on a decoder that is broken JSON: it only gets what is JSON from end to end.
    serde_json::from_slice::<Value>(bytes).map_err(|e| e.to_string())?;
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())?;
    tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}
