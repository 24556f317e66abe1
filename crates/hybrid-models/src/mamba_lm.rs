//! Mamba language models: configurations and tensor names.
//!
//! There are two layouts: that of the authors' `mamba_ssm` (`d_model`, `backbone.embedding`) and
//! that of Hugging Face's `transformers` (`hidden_size`, `backbone.embeddings`). The tensors of the
//! layers have the same names in both.

use crate::checkpoint::Checkpoint;
use crate::config::{ids, size};
use crate::host_model::HostModel;
use crate::mamba::{Mamba, MambaShape};
use crate::mamba2::{Mamba2, Mamba2Shape};
use crate::mixer::{Mixer, Recurrent, ResidualBlock};
use crate::norm::Norm;
use longctx_core::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// `config.json`, in either layout.
#[derive(Deserialize)]
struct Config {
    #[serde(alias = "d_model")]
    hidden_size: usize,
    #[serde(alias = "n_layer")]
    num_hidden_layers: usize,
    vocab_size: usize,
    /// In the authors' layout, the vocabulary size is rounded up to a multiple of this.
    #[serde(default = "one")]
    pad_vocab_size_multiple: usize,
    #[serde(default)]
    ssm_cfg: AuthorsConfig,
    #[serde(default = "four", alias = "d_conv")]
    conv_kernel: usize,
    #[serde(default = "two")]
    expand: f64,
    state_size: Option<usize>,
    time_step_rank: Option<Value>,
    #[serde(default = "default_eps", alias = "norm_epsilon")]
    layer_norm_epsilon: f64,
    use_bias: Option<bool>,
    use_conv_bias: Option<bool>,
    rms_norm: Option<bool>,
    hidden_act: Option<String>,
    head_dim: Option<usize>,
    num_heads: Option<usize>,
    n_groups: Option<usize>,
    time_step_limit: Option<(Value, Value)>,
    #[serde(alias = "tie_embeddings")]
    tie_word_embeddings: Option<bool>,
    /// Size of feed-forward layers between the mixers.
    d_intermediate: Option<usize>,
    /// Indices of attention layers.
    attn_layer_idx: Option<Vec<Value>>,
    eos_token_id: Option<Value>,
}

/// The mixers' settings in the authors' layout.
#[derive(Deserialize, Default)]
struct AuthorsConfig {
    layer: Option<String>,
    d_state: Option<usize>,
    d_conv: Option<usize>,
    expand: Option<f64>,
    dt_rank: Option<Value>,
    headdim: Option<usize>,
    ngroups: Option<usize>,
    dt_limit: Option<(Value, Value)>,
    bias: Option<bool>,
    conv_bias: Option<bool>,
    d_ssm: Option<usize>,
    #[serde(rename = "D_has_hdim")]
    d_has_hdim: Option<bool>,
    rmsnorm: Option<bool>,
    norm_before_gate: Option<bool>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// Fields of `ssm_cfg` about the initialisation of weights or the GPU implementation. They have no
/// effect on a trained model.
const NO_EFFECT: [&str; 14] = [
    "dt_min",
    "dt_max",
    "dt_init",
    "dt_scale",
    "dt_init_floor",
    "conv_init",
    "A_init_range",
    "chunk_size",
    "use_fast_path",
    "use_mem_eff_path",
    "layer_idx",
    "device",
    "dtype",
    "sequence_parallel",
];

/// The fields of a mixer in a stack.
const OF_MIXER: [&str; 9] = [
    "state_size",
    "expand",
    "conv_kernel",
    "time_step_rank",
    "use_bias",
    "use_conv_bias",
    "head_dim",
    "n_groups",
    "time_step_limit",
];

fn one() -> usize {
    1
}

fn two() -> f64 {
    2.0
}

fn four() -> usize {
    4
}

fn default_eps() -> f64 {
    1e-5
}

/// Returns whether a `config.json` in the authors' layout, which names no family, is Mamba-2.
pub fn is_mamba2(config: &Value) -> bool {
    config["ssm_cfg"]["layer"] == "Mamba2"
}

/// Builds a Mamba-1 model from its `config.json`.
pub fn load(config: &Value, w: &Checkpoint) -> Result<HostModel> {
    let c = Config::parse(config)?;
    let shape = c.mamba()?;
    c.model("mamba", w, |name| Ok(Box::new(Mamba::load(w, name, shape)?)))
}

/// Builds a Mamba-2 model from its `config.json`.
pub fn load2(config: &Value, w: &Checkpoint) -> Result<HostModel> {
    let mut c = Config::parse(config)?;
    if config.get("d_model").is_none() {
        // The defaults of `transformers`; the authors' defaults differ.
        c.n_groups = c.n_groups.or(Some(8));
    }
    let shape = c.mamba2()?;
    c.model("mamba2", w, |name| Ok(Box::new(Mamba2::load(w, name, shape)?)))
}

/// Returns the shape of a Mamba mixer in a stack. `settings` are the mixer's fields of
/// `config.json`.
pub fn shape(settings: &Map<String, Value>, hidden: usize) -> Result<MambaShape> {
    Config::of_mixer(settings, hidden)?.mamba()
}

/// Returns the shape of a Mamba-2 mixer in a stack whose norms have this epsilon.
pub fn shape2(settings: &Map<String, Value>, hidden: usize, eps: f32) -> Result<Mamba2Shape> {
    Ok(Mamba2Shape { norm_eps: eps, ..Config::of_mixer(settings, hidden)?.mamba2()? })
}

impl AuthorsConfig {
    /// Refuses settings that change the output and are not implemented.
    fn check(&self, inner: usize) -> Result<()> {
        let unsupported = |what: String| Err(Error::Unsupported(format!("ssm_cfg.{what}")));
        if let Some(d_ssm) = self.d_ssm.filter(|&d_ssm| d_ssm != inner) {
            return unsupported(format!("d_ssm {d_ssm} beside {inner} channels"));
        }
        for (name, value, read) in [
            ("D_has_hdim", self.d_has_hdim, false),
            ("rmsnorm", self.rmsnorm, true),
            ("norm_before_gate", self.norm_before_gate, false),
        ] {
            if let Some(other) = value.filter(|&value| value != read) {
                return unsupported(format!("{name} {other}"));
            }
        }
        match self.rest.keys().find(|name| !NO_EFFECT.contains(&name.as_str())) {
            Some(other) => unsupported(format!("{other}, an unknown setting")),
            None => Ok(()),
        }
    }
}

impl Config {
    fn of_mixer(settings: &Map<String, Value>, hidden: usize) -> Result<Self> {
        if let Some(other) = settings.keys().find(|name| !OF_MIXER.contains(&name.as_str())) {
            return Err(Error::setting("field of a mixer", OF_MIXER.join(", "), other));
        }
        let mut config = settings.clone();
        for (name, value) in [("hidden_size", hidden), ("num_hidden_layers", 1), ("vocab_size", 1)]
        {
            config.insert(name.into(), json!(value));
        }
        Self::parse(&Value::Object(config))
    }

    fn parse(config: &Value) -> Result<Self> {
        let c = Self::deserialize(config)
            .map_err(|e| Error::setting("config.json", "the fields of a Mamba model", e))?;
        if c.rms_norm == Some(false) {
            return Err(Error::Unsupported("Mamba with layer norms in place of RMS norms".into()));
        }
        for (name, value) in [
            ("hidden_size", c.hidden_size),
            ("vocab_size", c.vocab_size),
            ("pad_vocab_size_multiple", c.pad_vocab_size_multiple),
        ] {
            size(name, value)?;
        }
        if let Some(inner) = c.d_intermediate.filter(|&inner| inner > 0) {
            let what = format!("d_intermediate {inner}: feed-forward blocks between the mixers");
            return Err(Error::Unsupported(what));
        }
        if let Some(layers) = c.attn_layer_idx.as_ref().filter(|layers| !layers.is_empty()) {
            let what = format!("attn_layer_idx: {} layers that are attention", layers.len());
            return Err(Error::Unsupported(what));
        }
        c.ssm_cfg.check(c.inner())?;
        match c.hidden_act.as_deref() {
            None | Some("silu" | "swish") => Ok(c),
            Some(other) => Err(Error::Unsupported(format!("activation {other:?}"))),
        }
    }

    /// Returns whether the input and output projections have biases.
    fn bias(&self) -> bool {
        self.ssm_cfg.bias.or(self.use_bias).unwrap_or(false)
    }

    /// Returns whether the convolution has a bias.
    fn conv_bias(&self) -> bool {
        self.ssm_cfg.conv_bias.or(self.use_conv_bias).unwrap_or(true)
    }

    fn inner(&self) -> usize {
        (self.ssm_cfg.expand.unwrap_or(self.expand) * self.hidden_size as f64) as usize
    }

    fn mamba(&self) -> Result<MambaShape> {
        if let Some(layer) = self.ssm_cfg.layer.as_deref().filter(|&layer| layer != "Mamba1") {
            return Err(Error::setting("ssm_cfg.layer", "Mamba1", layer));
        }
        let rank = match self.time_step_rank.as_ref().or(self.ssm_cfg.dt_rank.as_ref()) {
            Some(Value::Number(rank)) => rank.as_u64().unwrap_or(0) as usize,
            _ => self.hidden_size.div_ceil(16),
        };
        let shape = MambaShape {
            hidden: self.hidden_size,
            inner: self.inner(),
            states: self.ssm_cfg.d_state.or(self.state_size).unwrap_or(16),
            rank,
            taps: self.ssm_cfg.d_conv.unwrap_or(self.conv_kernel),
            conv_bias: self.conv_bias(),
            bias: self.bias(),
        };
        for (name, value) in [
            ("hidden_size", shape.hidden),
            ("expand", shape.inner),
            ("state_size", shape.states),
            ("time_step_rank", shape.rank),
            ("conv_kernel", shape.taps),
        ] {
            size(name, value)?;
        }
        Ok(shape)
    }

    fn mamba2(&self) -> Result<Mamba2Shape> {
        let inner = self.inner();
        let head_dim = self.ssm_cfg.headdim.or(self.head_dim).unwrap_or(64);
        let heads = self.num_heads.unwrap_or(inner / head_dim.max(1));
        size("num_heads", heads)?;
        size("head_dim", head_dim)?;
        let limit = self.ssm_cfg.dt_limit.as_ref().or(self.time_step_limit.as_ref());
        let number = |limit: &Value| limit.as_f64().map_or(f32::INFINITY, |x| x as f32);
        let shape = Mamba2Shape {
            hidden: self.hidden_size,
            heads,
            head_dim,
            groups: self.ssm_cfg.ngroups.or(self.n_groups).unwrap_or(1),
            states: self.ssm_cfg.d_state.or(self.state_size).unwrap_or(128),
            taps: self.ssm_cfg.d_conv.unwrap_or(self.conv_kernel),
            conv_bias: self.conv_bias(),
            bias: self.bias(),
            time_step_limit: limit.map_or((0.0, f32::INFINITY), |(a, b)| (number(a), number(b))),
            norm_eps: self.layer_norm_epsilon as f32,
        };
        for (name, value) in [
            ("hidden_size", shape.hidden),
            ("n_groups", shape.groups),
            ("state_size", shape.states),
            ("conv_kernel", shape.taps),
        ] {
            size(name, value)?;
        }
        if heads * head_dim != inner || !heads.is_multiple_of(shape.groups) {
            let expected = format!(
                "heads of {head_dim} channels, in {} groups, for {inner} channels",
                shape.groups
            );
            return Err(Error::setting("num_heads", expected, heads));
        }
        Ok(shape)
    }

    fn model(
        &self,
        family: &'static str,
        w: &Checkpoint,
        mixer: impl Fn(&str) -> Result<Box<dyn Recurrent>>,
    ) -> Result<HostModel> {
        let hidden = self.hidden_size;
        let vocab = self.vocab_size.next_multiple_of(self.pad_vocab_size_multiple.max(1));
        let embeddings = w.first_of(&[
            "backbone.embeddings.weight",
            "backbone.embedding.weight",
            "model.backbone.embedding.weight",
        ])?;
        let backbone = embeddings.split_once(".embedding").map_or("", |(backbone, _)| backbone);
        let norm = |name: String| -> Result<Norm> {
            let eps = self.layer_norm_epsilon as f32;
            Ok(Norm::Rms { weight: w.tensor(&format!("{name}.weight"), &[hidden])?, eps })
        };
        let residual = |layer: usize| -> Result<ResidualBlock> {
            let name = format!("{backbone}.layers.{layer}");
            Ok(ResidualBlock {
                layer,
                name: "mixer",
                norm: norm(format!("{name}.norm"))?,
                mixer: Mixer::Recurrent(mixer(&format!("{name}.mixer"))?),
            })
        };
        let heads = ["lm_head.weight", "model.lm_head.weight"];
        let head = match self.tie_word_embeddings {
            Some(false) => Some(w.first_of(&heads)?),
            _ => heads.into_iter().find(|name| w.has(name)),
        };
        Ok(HostModel {
            family,
            hidden,
            layers: self.num_hidden_layers,
            embedding: w.matrix(embeddings, vocab, hidden)?,
            embedding_scale: 1.0,
            embedding_norm: None,
            residuals: (0..self.num_hidden_layers).map(residual).collect::<Result<_>>()?,
            norm: norm(format!("{backbone}.norm_f"))?,
            head: head.map(|name| w.matrix(name, vocab, hidden)).transpose()?,
            soft_cap: None,
            eos: ids(self.eos_token_id.as_ref()),
        })
    }
}
