//! Phi-3, Phi-3.5 and Phi-4: fused projections and LongRoPE.

use super::{Architecture, DEFAULTS, Defaults, GGUF_WINDOW, rope_defaults, window};
use crate::config::Config;
use crate::gguf_settings::Settings;
use crate::json::Fields;
use crate::names;
use crate::rope_settings::RopeSettings;
use longctx_core::{Error, Result, RopeScaling};

pub(super) const PHI3: Architecture = Architecture {
    name: "phi3",
    defaults: Defaults {
        context: 4096,
        norm_eps: 1e-5,
        partial_rotary: true,
        eos: &[32_000],
        ..DEFAULTS
    },
    read: phi3,
    read_gguf,
    gguf_settings: &[GGUF_WINDOW],
    folder_names: names::LLAMA,
    gguf_names: names::GGUF_FUSED,
    gguf_interleaved: false,
};

fn phi3(raw: &Fields, config: &mut Config) -> Result<()> {
    let defaults = rope_defaults(config, &PHI3.defaults);
    config.rope = RopeSettings::read(raw, &defaults)?;
    if let RopeScaling::Yarn { .. } = config.rope.scaling {
        let what = "rope scaling \"yarn\" in a Phi-3 model, where it once meant \"longrope\"";
        return Err(Error::Unsupported(what.into()));
    }
    config.windows = vec![window(raw, None)?; config.layers];
    Ok(())
}

fn read_gguf(file: &Settings, config: &mut Config) -> Result<()> {
    let window = file.number(GGUF_WINDOW)?.filter(|&window| window > 0);
    config.windows = vec![window; config.layers];
    Ok(())
}
