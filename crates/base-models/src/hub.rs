//! Models from the Hugging Face Hub.

use std::path::PathBuf;

use crate::folder::LAYOUTS;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use longctx_checkpoint::shard_names;
use longctx_core::{Error, Result};

const OPTIONAL: [&str; 3] =
    ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"];

/// Downloads the files for [`Pretrained::from_folder`](crate::Pretrained::from_folder) unless they
/// are cached; returns their folder.
pub(crate) fn download(name: &str) -> Result<PathBuf> {
    let api = ApiBuilder::from_env().build().map_err(|e| Error::file(name, e))?;
    let repo = api.model(name.to_owned());
    let config = fetch(&repo, name, "config.json")?;
    let folder = config.parent().map(PathBuf::from);
    let folder = folder.ok_or_else(|| Error::file(name, "config.json lies in no folder"))?;
    // Models without a chat template have none of these.
    for file in OPTIONAL {
        let _ = repo.get(file);
    }
    if let Err(e) = fetch(&repo, name, "tokenizer.json") {
        repo.get("tokenizer.model").map_err(|_| e)?;
        let _ = repo.get("added_tokens.json");
    }
    for (single, index) in LAYOUTS {
        if repo.get(single).is_ok() {
            return Ok(folder);
        }
        let Ok(index) = repo.get(index) else { continue };
        for shard in shard_names(&index)? {
            fetch(&repo, name, &shard)?;
        }
        return Ok(folder);
    }
    fetch(&repo, name, LAYOUTS[0].0)?;
    Ok(folder)
}

fn fetch(repo: &ApiRepo, name: &str, file: &str) -> Result<PathBuf> {
    repo.get(file).map_err(|e| Error::file(format!("{name}/{file}"), e))
}
