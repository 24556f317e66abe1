//! Mamba language models: their configurations and the names in their checkpoints.
//!
//! Two layouts are in use: that of the authors' `mamba_ssm` (`d_model`, `backbone.embedding`) and that of Hugging Face's
//! `transformers` (`hidden_size`, `backbone.embeddings`). The layers' tensors have the same names in both.

use crate::checkpoint::Checkpoint;
use crate::config::{ids, positive};
use crate::host::Host;
use crate::mamba::{Mamba, MambaShape};
use crate::mamba2::{Mamba2, Mamba2Shape};
use crate::mixer::{Mixer, Recurrent, Residual};
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
    /// The authors' layout rounds the vocabulary up to a multiple of it.
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
    #[serde(default)]
    use_bias: bool,
    #[serde(default = "yes")]
    use_conv_bias: bool,
    #[serde(default = "yes")]
    rms_norm: bool,
    hidden_act: Option<String>,
    head_dim: Option<usize>,
    num_heads: Option<usize>,
    n_groups: Option<usize>,
    time_step_limit: Option<(Value, Value)>,
    eos_token_id: Option<Value>,
}

/// What the authors' layout says of the mixers.
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
}

fn one() -> usize {
    1
}

fn two() -> f64 {
    2.0
}

fn four() -> usize {
    4
}

fn yes() -> bool {
    true
}

fn default_eps() -> f64 {
    1e-5
}

/// Whether a `config.json` of the authors' layout, which names no family, is of Mamba-2.
pub fn is_mamba2(config: &Value) -> bool {
    config["ssm_cfg"]["layer"] == "Mamba2"
}

/// Builds a model of Mamba-1 from its `config.json`.
pub fn load(config: &Value, w: &Checkpoint) -> Result<Host> {
    let c = Config::parse(config)?;
    let shape = c.mamba()?;
    c.model("mamba", w, |name| Ok(Box::new(Mamba::load(w, name, shape)?)))
}

/// Builds a model of Mamba-2 from its `config.json`.
pub fn load2(config: &Value, w: &Checkpoint) -> Result<Host> {
    let c = Config::parse(config)?;
    let shape = c.mamba2()?;
    c.model("mamba2", w, |name| Ok(Box::new(Mamba2::load(w, name, shape)?)))
}

/// The shape of a Mamba mixer in a stack; `settings` are the mixer's fields of `config.json`.
pub fn shape(settings: &Map<String, Value>, hidden: usize) -> Result<MambaShape> {
    Config::of_mixer(settings, hidden)?.mamba()
}

/// The shape of a Mamba-2 mixer in a stack whose norms have this epsilon.
pub fn shape2(settings: &Map<String, Value>, hidden: usize, eps: f32) -> Result<Mamba2Shape> {
    Ok(Mamba2Shape { norm_eps: eps, ..Config::of_mixer(settings, hidden)?.mamba2()? })
}

impl Config {
    fn of_mixer(settings: &Map<String, Value>, hidden: usize) -> Result<Self> {
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
        if !c.rms_norm {
            return Err(Error::Unsupported("Mamba with layer norms in place of RMS norms".into()));
        }
        match c.hidden_act.as_deref() {
            None | Some("silu" | "swish") => Ok(c),
            Some(other) => Err(Error::Unsupported(format!("activation {other:?}"))),
        }
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
            conv_bias: self.use_conv_bias,
            bias: self.use_bias,
        };
        for (name, value) in [
            ("hidden_size", shape.hidden),
            ("expand", shape.inner),
            ("state_size", shape.states),
            ("time_step_rank", shape.rank),
            ("conv_kernel", shape.taps),
        ] {
            positive(name, value)?;
        }
        Ok(shape)
    }

    fn mamba2(&self) -> Result<Mamba2Shape> {
        let inner = self.inner();
        let head_dim = self.ssm_cfg.headdim.or(self.head_dim).unwrap_or(64);
        let heads = self.num_heads.unwrap_or(inner / head_dim.max(1));
        let limit = self.ssm_cfg.dt_limit.as_ref().or(self.time_step_limit.as_ref());
        let number = |limit: &Value| limit.as_f64().map_or(f32::INFINITY, |x| x as f32);
        let shape = Mamba2Shape {
            hidden: self.hidden_size,
            heads,
            head_dim,
            groups: self.ssm_cfg.ngroups.or(self.n_groups).unwrap_or(1),
            states: self.ssm_cfg.d_state.or(self.state_size).unwrap_or(128),
            taps: self.ssm_cfg.d_conv.unwrap_or(self.conv_kernel),
            conv_bias: self.use_conv_bias,
            bias: self.use_bias,
            time_step_limit: limit.map_or((0.0, f32::INFINITY), |(a, b)| (number(a), number(b))),
            norm_eps: self.layer_norm_epsilon as f32,
        };
        for (name, value) in [
            ("hidden_size", shape.hidden),
            ("head_dim", shape.head_dim),
            ("n_groups", shape.groups),
            ("state_size", shape.states),
            ("conv_kernel", shape.taps),
        ] {
            positive(name, value)?;
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
    ) -> Result<Host> {
        let hidden = self.hidden_size;
        let vocab = self.vocab_size.next_multiple_of(self.pad_vocab_size_multiple.max(1));
        positive("vocab_size", vocab)?;
        let embeddings = w.any_of(&[
            "backbone.embeddings.weight",
            "backbone.embedding.weight",
            "model.backbone.embedding.weight",
        ])?;
        let backbone = embeddings.split_once(".embedding").map_or("", |(backbone, _)| backbone);
        let norm = |name: String| -> Result<Norm> {
            let eps = self.layer_norm_epsilon as f32;
            Ok(Norm::Rms { weight: w.tensor(&format!("{name}.weight"), &[hidden])?, eps })
        };
        let residual = |layer: usize| -> Result<Residual> {
            let name = format!("{backbone}.layers.{layer}");
            Ok(Residual {
                layer,
                name: "mixer",
                norm: norm(format!("{name}.norm"))?,
                mixer: Mixer::Recurrent(mixer(&format!("{name}.mixer"))?),
            })
        };
        let head = ["lm_head.weight", "model.lm_head.weight"].into_iter().find(|name| w.has(name));
        Ok(Host {
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
