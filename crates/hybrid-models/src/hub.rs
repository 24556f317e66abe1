//! Models from the Hugging Face Hub.

use std::path::PathBuf;

use crate::checkpoint::WEIGHTS;
use longctx_checkpoint::HubRepo;
use longctx_core::Result;

/// Downloads the files for [`Pretrained::from_folder`](crate::Pretrained::from_folder) unless they
/// are cached; returns their folder.
pub fn download(name: &str) -> Result<PathBuf> {
    let hub = HubRepo::model(name)?;
    let folder = hub.folder()?;
    hub.get_first(&["tokenizer.json", "rwkv_vocab_v20230424.txt"])?;
    hub.get_first(&WEIGHTS)?;
    Ok(folder)
}
