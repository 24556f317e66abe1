//! Opens LLMLingua-2's encoder by name.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use prompt_compress::{LlmLingua2, llmlingua2};

/// The Hub name of the paper's encoder.
pub const PUBLISHED: &str = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank";

/// Opens the encoder `name`: a folder with a checkpoint, or a model of the Hub.
pub fn open(name: &str, settings: llmlingua2::Settings) -> Result<LlmLingua2> {
    let folder = Path::new(name);
    if folder.join("config.json").exists() {
        return Ok(LlmLingua2::from_folder(folder, settings, &Device::Cpu)?);
    }
    ensure!(!folder.is_dir(), "{name}: no config.json in it");
    LlmLingua2::from_hub(name, settings, &Device::Cpu).with_context(|| {
        format!(
            "{name}: no folder with a checkpoint, and not to be had from the Hub; see --encoder"
        )
    })
}
