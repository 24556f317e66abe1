//! Models from the Hugging Face Hub.

use std::path::PathBuf;

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use longctx_checkpoint::shard_names;
use longctx_core::{Error, Result};

/// Downloads the files for [`Pretrained::from_folder`](crate::Pretrained::from_folder) unless they
/// are cached; returns their folder.
pub fn download(name: &str) -> Result<PathBuf> {
    let api = ApiBuilder::from_env().build().map_err(|e| Error::file(name, e))?;
    let repo = api.model(name.to_owned());
    let config = fetch(&repo, name, "config.json")?;
    fetch(&repo, name, "tokenizer.json")
        .or_else(|_| fetch(&repo, name, "rwkv_vocab_v20230424.txt"))?;
    match repo.get("model.safetensors.index.json") {
        Ok(index) => {
            for shard in shard_names(&index)? {
                fetch(&repo, name, &shard)?;
            }
        }
        Err(_) => {
            fetch(&repo, name, "model.safetensors")
                .or_else(|_| fetch(&repo, name, "pytorch_model.bin"))?;
        }
    }
    let folder = config.parent().map(Into::into);
    folder.ok_or_else(|| Error::file(name, "config.json lies in no folder"))
}

fn fetch(repo: &ApiRepo, name: &str, file: &str) -> Result<PathBuf> {
    repo.get(file).map_err(|e| Error::file(format!("{name}/{file}"), e))
}
