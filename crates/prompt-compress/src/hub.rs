//! Checkpoints from the Hugging Face Hub.

use std::path::PathBuf;

use hf_hub::api::sync::ApiBuilder;
use longctx_core::{Error, Result};

/// Downloads the three files of a checkpoint unless they are cached; returns their folder.
pub fn download(name: &str) -> Result<PathBuf> {
    let api = ApiBuilder::from_env().build().map_err(|e| Error::file(name, e))?;
    let repo = api.model(name.to_owned());
    let fetch = |file: &str| {
        let lacking = |e| format!("not in the Hub's cache, and not to be fetched: {e}");
        repo.get(file).map_err(|e| Error::file(format!("{name}/{file}"), lacking(e)))
    };
    fetch("tokenizer.json")?;
    fetch("model.safetensors")?;
    let config = fetch("config.json")?;
    let folder = config.parent().map(Into::into);
    folder.ok_or_else(|| Error::file(name, "config.json lies in no folder"))
}
