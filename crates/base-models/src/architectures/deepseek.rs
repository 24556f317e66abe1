//! DeepSeek-V2 and DeepSeek-V3: multi-head latent attention, shared and routed experts.

use super::{Architecture, DEFAULTS, Defaults, llama};
use crate::config::{Config, ExpertGroups, Experts, Latent, Scoring};
use crate::json::Fields;
use crate::rope_settings::{RopeDefaults, RopeSettings};
use longctx_core::{Error, Result, RopeScaling};

pub(super) const DEEPSEEK_V2: Architecture = Architecture {
    name: "deepseek_v2",
    defaults: DEFAULTS,
    read: |raw, config| {
        latent(raw, config, true)?;
        config.mlp_bias = raw.switch("mlp_bias")?.unwrap_or(false);
        refuse_other(raw, "scoring_func", "softmax")?;
        if raw.switch("norm_topk_prob")?.unwrap_or(false) {
            // transformers does not normalize the weights; the code published with the model does.
            return Err(Error::Unsupported("norm_topk_prob in a DeepSeek-V2 model".into()));
        }
        let groups = match raw.text("topk_method")? {
            None | Some("greedy") => None,
            Some("group_limited_greedy") => {
                let need = |name: &str| raw.number(name)?.ok_or_else(|| raw.missing(name));
                Some(ExpertGroups { count: need("n_group")?, per_token: need("topk_group")? })
            }
            Some(other) => {
                let what = format!("topk_method {other:?} (known: greedy, group_limited_greedy)");
                return Err(Error::Unsupported(what));
            }
        };
        let number = |name: &str, default| Ok::<_, Error>(raw.number(name)?.unwrap_or(default));
        let inner = number("moe_intermediate_size", 1407)?;
        config.experts = Some(Experts {
            count: number("n_routed_experts", 64)?,
            per_token: number("num_experts_per_tok", 0)?,
            intermediate_size: inner,
            groups,
            scale: raw.float("routed_scaling_factor")?.unwrap_or(1.0),
            shared_size: inner.saturating_mul(number("n_shared_experts", 2)?),
            dense_layers: dense_layers(raw, config.layers, 0)?,
            ..Experts::default()
        });
        Ok(())
    },
    ..llama::LLAMA
};

pub(super) const DEEPSEEK_V3: Architecture = Architecture {
    name: "deepseek_v3",
    defaults: Defaults { context: 4096, bos: Some(0), eos: &[1], ..DEFAULTS },
    read: |raw, config| {
        latent(raw, config, raw.switch("rope_interleave")?.unwrap_or(true))?;
        refuse_other(raw, "scoring_func", "sigmoid")?;
        let number = |name: &str, default| Ok::<_, Error>(raw.number(name)?.unwrap_or(default));
        let inner = number("moe_intermediate_size", 2048)?;
        config.experts = Some(Experts {
            count: number("n_routed_experts", 256)?,
            per_token: number("num_experts_per_tok", 8)?,
            intermediate_size: inner,
            scoring: Scoring::BiasedSigmoid,
            groups: Some(ExpertGroups {
                count: number("n_group", 8)?,
                per_token: number("topk_group", 4)?,
            }),
            normalize: raw.switch("norm_topk_prob")?.unwrap_or(true),
            scale: raw.float("routed_scaling_factor")?.unwrap_or(2.5),
            shared_size: inner.saturating_mul(number("n_shared_experts", 1)?),
            dense_layers: dense_layers(raw, config.layers, 3)?,
        });
        Ok(())
    },
    ..DEEPSEEK_V2
};

/// Reads the settings of the attention and of its rotary embedding.
fn latent(raw: &Fields, config: &mut Config, interleaved: bool) -> Result<()> {
    let number = |name: &str, default| Ok::<_, Error>(raw.number(name)?.unwrap_or(default));
    let name = "num_key_value_heads";
    if let Some(other) = raw.number(name)?.filter(|&heads| heads != config.heads) {
        return Err(Error::mismatch(
            name,
            format!("as many as query heads: {}", config.heads),
            other,
        ));
    }
    let latent = Latent {
        rank: number("kv_lora_rank", 512)?,
        query_rank: match raw.has("q_lora_rank") {
            true => raw.number("q_lora_rank")?,
            false => Some(1536),
        },
        rotated: number("qk_rope_head_dim", 64)?,
        unrotated: number("qk_nope_head_dim", 128)?,
        value_dim: number("v_head_dim", 128)?,
        interleaved,
    };
    config.rope = RopeSettings::read(
        raw,
        &RopeDefaults {
            theta: DEFAULTS.theta,
            head_dim: latent.rotated,
            context: config.context_length,
            partial: false,
        },
    )?;
    let scale = ((latent.unrotated + latent.rotated) as f64).powf(-0.5);
    config.attention_scale = Some(scale * softmax_factor(raw, &config.rope.scaling)?);
    (config.kv_heads, config.head_dim) = (1, latent.rank + latent.rotated);
    config.latent = Some(latent);
    let bias = raw.switch("attention_bias")?.unwrap_or(false);
    (config.qkv_bias, config.out_bias) = (bias, bias);
    Ok(())
}

/// Returns YaRN's factor of the softmax scale, from DeepSeek's `mscale_all_dim`.
fn softmax_factor(raw: &Fields, scaling: &RopeScaling) -> Result<f64> {
    let fields = match raw.fields("rope_scaling")?.filter(|fields| !fields.is_empty()) {
        Some(fields) => Some(fields),
        None => raw.fields("rope_parameters")?,
    };
    let mscale = fields.map(|fields| fields.float("mscale_all_dim")).transpose()?.flatten();
    match (scaling, mscale.filter(|&mscale| mscale != 0.0)) {
        (RopeScaling::None, _) | (_, None) => Ok(1.0),
        (RopeScaling::Yarn { factor, .. }, Some(mscale)) => {
            Ok(RopeScaling::yarn_attention_factor(*factor, mscale).powi(2))
        }
        (_, Some(_)) => Err(Error::Unsupported("mscale_all_dim without YaRN".into())),
    }
}

/// Returns the layers with one dense feed-forward block: the first ones.
fn dense_layers(raw: &Fields, layers: usize, default: usize) -> Result<Vec<usize>> {
    if let Some(other) = raw.number("moe_layer_freq")?.filter(|&every| every != 1) {
        return Err(Error::Unsupported(format!("moe_layer_freq {other}")));
    }
    let first = raw.number("first_k_dense_replace")?.unwrap_or(default);
    Ok((0..layers.min(first)).collect())
}

fn refuse_other(raw: &Fields, name: &str, known: &str) -> Result<()> {
    match raw.text(name)?.filter(|&value| value != known) {
        Some(other) => Err(Error::Unsupported(format!("{name} {other:?} (known: {known})"))),
        None => Ok(()),
    }
}
