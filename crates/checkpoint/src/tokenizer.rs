//! `tokenizer.json`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::files;
use longctx_core::{Error, Result};
use serde_json::Value;
use tokenizers::Tokenizer;

/// Opens a `tokenizer.json`, without its truncation and padding.
///
/// # Errors
/// [`Error::File`] if the file cannot be read, is not JSON, or is not a tokenizer.
pub fn open_tokenizer(path: &Path) -> Result<Tokenizer> {
    read_tokenizer(files::read_text(path)?.as_bytes()).map_err(|reason| Error::file(path, reason))
}

/// As [`open_tokenizer`], from the file's bytes.
///
/// # Errors
/// The reason why the bytes are not a tokenizer.
pub fn read_tokenizer(bytes: &[u8]) -> Result<Tokenizer, String> {
    // `tokenizers` panics on invalid JSON in a decoder, on merges of tokens shorter than the
    // continuation prefix, and, during encoding, on a template with an undefined special token. So
    // the JSON is checked first, and an empty text is encoded as a test.
    serde_json::from_slice::<Value>(bytes).map_err(|e| e.to_string())?;
    let built = catch_unwind(|| {
        let tokenizer = Tokenizer::from_bytes(bytes)?;
        drop(tokenizer.encode("", true));
        drop(tokenizer.encode(("", ""), true));
        Ok::<_, tokenizers::Error>(tokenizer)
    });
    let built = built.map_err(|_| "it makes the crate `tokenizers` panic".to_owned())?;
    let mut tokenizer = built.map_err(|e| e.to_string())?;
    tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// Calls the crate `tokenizers`, with a panic as an error: its regular expressions panic if a text
/// exceeds their limits.
///
/// # Errors
/// [`Error::Tokenizer`] with the call's own message, or that of its panic.
pub fn unpanicked<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let panicked = |payload: Box<dyn std::any::Any + Send>| {
        let message = payload.downcast_ref::<String>().cloned();
        message.or_else(|| payload.downcast_ref::<&str>().map(|&text| text.into()))
    };
    let done = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
        Err(panicked(payload).unwrap_or_else(|| "the tokenizer panicked".into()).into())
    });
    done.map_err(Error::tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_make_tokenizers_panic_are_errors() {
        let tokenizer = |merge: &str, decoder: &str| {
            format!(
                r###"{{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
                "truncation": {{"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}, "padding": null,
                "decoder": {decoder}, "model": {{"type": "BPE", "continuing_subword_prefix": "##", "vocab": {{"a": 0, "b": 1, "##b": 2,
                "ab": 3, "##a": 4}}, "merges": [{merge}]}}}}"###
            )
        };
        let right = tokenizer("\"a ##b\"", "null");
        let opened = read_tokenizer(right.as_bytes()).unwrap();
        // The file's truncation to one token is disabled.
        assert_eq!(opened.encode("abab", false).unwrap().len(), 3);
        let short = tokenizer("\"a b\"", "null");
        assert!(read_tokenizer(short.as_bytes()).unwrap_err().contains("panic"));
        let template = r#"{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x",
            "type_id": 0}}], "pair": [], "special_tokens": {}}"#;
        let undefined =
            right.replace("\"post_processor\": null", &format!("\"post_processor\": {template}"));
        assert!(read_tokenizer(undefined.as_bytes()).is_err());
        let whole = tokenizer("", "{\"type\": \"Fuse\"}");
        let decoder = whole.find("\"decoder\"").unwrap();
        for end in decoder + 10..decoder + 30 {
            assert!(read_tokenizer(&whole.as_bytes()[..end]).unwrap_err().contains("EOF"));
        }
    }
}
