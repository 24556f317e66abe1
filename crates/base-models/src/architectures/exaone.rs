//! EXAONE 4: OLMo-2's norms, and layers with a sliding window. In models with windows, full layers
//! have no rotary embedding.

use super::{
    Architecture, DEFAULTS, Defaults, GGUF_WINDOW, olmo, rope, window, windows_by_period,
    windows_by_type,
};
use crate::config::{Config, QkNorm};
use crate::gguf_settings::Settings;
use crate::json::Fields;
use longctx_core::Result;

/// Every `PERIOD`-th layer is full; the others have a sliding window.
const PERIOD: usize = 4;

pub(super) const EXAONE4: Architecture = Architecture {
    name: "exaone4",
    defaults: Defaults { kv_heads: Some(32), norm_eps: 1e-5, bos: Some(0), ..DEFAULTS },
    read: exaone4,
    read_gguf,
    ..olmo::OLMO2
};

fn exaone4(raw: &Fields, config: &mut Config) -> Result<()> {
    config.rope = rope(raw, config, &EXAONE4.defaults)?;
    if let Some(window) = window(raw, Some(4096))? {
        let period = raw.number("sliding_window_pattern")?.unwrap_or(PERIOD);
        let windows = windows_by_type(raw, config.layers, Some(window))?;
        set_windows(
            config,
            windows.unwrap_or_else(|| windows_by_period(config.layers, window, period)),
        );
    }
    norms(config);
    Ok(())
}

fn norms(config: &mut Config) {
    (config.pre_norms, config.post_norms) = (false, true);
    config.qk_norm = QkNorm::PerHead;
}

/// In models with windows, full layers have no rotary embedding.
fn set_windows(config: &mut Config, windows: Vec<Option<usize>>) {
    config.unrotated = (0..windows.len()).filter(|&layer| windows[layer].is_none()).collect();
    config.windows = windows;
}

fn read_gguf(file: &Settings, config: &mut Config) -> Result<()> {
    if let Some(window) = file.number(GGUF_WINDOW)?.filter(|&window| window > 0) {
        set_windows(config, windows_by_period(config.layers, window, PERIOD));
    }
    norms(config);
    Ok(())
}
