//! What a decoder looks like, read from a `config.json` in Hugging Face's format.

use std::path::Path;

use longctx_core::{AttentionShape, Error, Result, RopeScaling};
use serde::Deserialize;
use serde_json::Value;

/// The shape of a Llama-like decoder: all that differs between the families.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The family: "llama", "mistral", "qwen2", "qwen3".
    pub family: String,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Channels between layers.
    pub hidden_size: usize,
    /// Channels inside the feed-forward block.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads of a layer.
    pub heads: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Added to the mean square in RMS norms.
    pub norm_eps: f64,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// The longest context, in tokens, that the model was made for.
    pub context_length: usize,
    /// The sliding window of each layer, if it has one.
    pub windows: Vec<Option<usize>>,
    /// Whether the query, key and value projections add a bias (Qwen2).
    pub qkv_bias: bool,
    /// Whether queries and keys are normalised per head (Qwen3).
    pub qk_norm: bool,
    /// Whether the output head is the embedding's matrix.
    pub tied_embeddings: bool,
    /// The token put before a text, if the model's tokenizer does so.
    pub bos: Option<u32>,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
}

impl Config {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error::File`] if it can't be read or a field is missing; [`Error::Unsupported`] for another architecture.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        let raw: Raw = serde_json::from_str(&text).map_err(|e| Error::file(path, e))?;
        raw.into_config()
    }

    /// The attention of one layer.
    ///
    /// # Errors
    /// [`Error::Setting`] if the numbers of heads don't fit each other.
    pub fn attention(&self, layer: usize) -> Result<AttentionShape> {
        let shape = AttentionShape::new(self.heads, self.kv_heads, self.head_dim)?;
        Ok(AttentionShape { window: self.windows[layer], ..shape })
    }
}

/// `config.json` as it is written: version 5 of `transformers` moved the rotary settings into `rope_parameters`.
#[derive(Deserialize)]
struct Raw {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_norm_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    #[serde(default = "default_context")]
    max_position_embeddings: usize,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Value>,
}

#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

fn default_norm_eps() -> f64 {
    1e-6
}

fn default_context() -> usize {
    2048
}

impl Raw {
    fn into_config(self) -> Result<Config> {
        let family = self.model_type.clone();
        if !["llama", "mistral", "qwen2", "qwen3"].contains(&family.as_str()) {
            return Err(unknown_architecture(&family));
        }
        if self.mlp_bias || (self.attention_bias && family != "qwen2") {
            return Err(Error::Unsupported(format!("biases in a model of type {family:?}")));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|&act| act != "silu") {
            return Err(Error::Unsupported(format!("activation {act:?} (known: \"silu\")")));
        }
        let heads = self.num_attention_heads;
        let head_dim = match self.head_dim {
            Some(d) => d,
            None if heads > 0 => self.hidden_size / heads,
            None => return Err(Error::setting("num_attention_heads", "at least 1", 0)),
        };
        let theta = self.rope_theta.or_else(|| self.rope_parameters.as_ref()?.rope_theta);
        let rope = self.rope_scaling.as_ref().or(self.rope_parameters.as_ref());
        Ok(Config {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            layers: self.num_hidden_layers,
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim,
            norm_eps: self.rms_norm_eps,
            rope_theta: theta.unwrap_or(10_000.0),
            rope_scaling: rope.map_or(Ok(RopeScaling::None), RawRope::scaling)?,
            context_length: self.max_position_embeddings,
            windows: self.windows(),
            qkv_bias: family == "qwen2",
            qk_norm: family == "qwen3",
            tied_embeddings: self.tie_word_embeddings,
            bos: self.bos_token_id,
            eos: ids(self.eos_token_id.as_ref()),
            family,
        })
    }

    /// Qwen configurations name a window that is not in use unless they say so, and then only from some layer on.
    fn windows(&self) -> Vec<Option<usize>> {
        let used = self.use_sliding_window.unwrap_or(self.model_type == "mistral");
        let window = self.sliding_window.filter(|_| used);
        let full = self.max_window_layers.filter(|_| self.use_sliding_window.is_some());
        let slides = |layer: usize| match &self.layer_types {
            Some(types) => types.get(layer).is_some_and(|t| t == "sliding_attention"),
            None => layer >= full.unwrap_or(0),
        };
        (0..self.num_hidden_layers).map(|layer| window.filter(|_| slides(layer))).collect()
    }
}

impl RawRope {
    fn scaling(&self) -> Result<RopeScaling> {
        let need = |name: &str, value: Option<f64>| {
            value.ok_or_else(|| {
                Error::setting(format!("rope_scaling.{name}"), "a number", "nothing")
            })
        };
        match self.rope_type.as_deref() {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear(need("factor", self.factor)?)),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: need("factor", self.factor)?,
                low_freq_factor: need("low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", self.high_freq_factor)?,
                original_context: self.original_max_position_embeddings.unwrap_or(8192),
            }),
            Some(other) => Err(Error::Unsupported(format!(
                "rope scaling {other:?} (known: default, linear, llama3)"
            ))),
        }
    }
}

/// One id or a list of them.
pub(crate) fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}

pub(crate) fn unknown_architecture(name: &str) -> Error {
    Error::Unsupported(format!("architecture {name:?} (known: llama, mistral, qwen2, qwen3)"))
}
