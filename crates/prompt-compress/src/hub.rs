//! Checkpoints from the Hugging Face Hub.

use std::path::PathBuf;

use longctx_checkpoint::HubRepo;
use longctx_core::Result;

/// Downloads the three files of a checkpoint unless they are cached; returns their folder.
pub fn download(name: &str) -> Result<PathBuf> {
    let hub = HubRepo::model(name)?;
    hub.get("tokenizer.json")?;
    hub.get("model.safetensors")?;
    hub.folder()
}
