//! Models from the Hugging Face Hub.

use std::path::PathBuf;

use crate::folder::WEIGHTS;
use longctx_checkpoint::HubRepo;
use longctx_core::Result;

const OPTIONAL: [&str; 4] =
    ["generation_config.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"];

/// Downloads the files for [`Pretrained::from_folder`](crate::Pretrained::from_folder) unless they
/// are cached; returns their folder.
pub(crate) fn download(name: &str) -> Result<PathBuf> {
    let hub = HubRepo::model(name)?;
    let folder = hub.folder()?;
    for file in OPTIONAL {
        hub.get_optional(file)?;
    }
    hub.get_first(&["tokenizer.json", "tokenizer.model"])?;
    hub.get_first(&WEIGHTS)?;
    Ok(folder)
}
