//! What a decoder looks like, read from a `config.json` in Hugging Face's format.

use std::path::Path;

use crate::files;
use crate::json::Fields;
use longctx_core::{AttentionShape, Error, Result, RopeScaling};

/// More layers than any model has: a false number must not fill the memory.
const MAX_LAYERS: usize = 10_000;
/// More channels, heads or tokens than any model has; products of two stay within 64 bits.
const MAX_SIZE: usize = 1 << 31;

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
    /// Whether the projection of the attention's output adds a bias.
    pub out_bias: bool,
    /// Whether the projections of the feed-forward block add biases.
    pub mlp_bias: bool,
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
    /// Reads a `config.json`. Absent fields have the values that `transformers` gives them.
    ///
    /// # Errors
    /// [`Error::File`] if it can't be read or a field is missing; [`Error::Unsupported`] for
    /// another architecture.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = files::read_json(path)?;
        let config = from_fields(&Fields::new(path, &json)?)?;
        config.check()?;
        Ok(config)
    }

    /// Reads the metadata of a GGUF file; its weights are left alone.
    ///
    /// # Errors
    /// As [`Pretrained::from_gguf`](crate::Pretrained::from_gguf), but for what concerns weights and
    /// tokenizer.
    pub fn from_gguf(path: &Path) -> Result<Self> {
        crate::gguf::Gguf::open(path, &crate::LoadOptions::default())?.config()
    }

    /// Reads a folder's `config.json` and, if it is there, `generation_config.json`, whose end
    /// tokens come first.
    ///
    /// # Errors
    /// As [`from_file`](Self::from_file).
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let config = Self::from_file(&folder.join("config.json"))?;
        let path = folder.join("generation_config.json");
        let Some(text) = files::read_text_if_present(&path)? else { return Ok(config) };
        let json = serde_json::from_str(&text).map_err(|e| Error::file(&path, e))?;
        match Fields::new(&path, &json)?.ids("eos_token_id") {
            eos if eos.is_empty() => Ok(config),
            eos => Ok(Self { eos, ..config }),
        }
    }

    /// Checks the sizes: what is allocated next depends on them.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first that no model has.
    pub(crate) fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.context_length),
        ];
        for (name, size) in sizes {
            if !(1..=MAX_SIZE).contains(&size) {
                return Err(Error::setting(name, format!("1 to {MAX_SIZE}"), size));
            }
        }
        if !(1..=MAX_LAYERS).contains(&self.layers) {
            let expected = format!("1 to {MAX_LAYERS}");
            return Err(Error::setting("num_hidden_layers", expected, self.layers));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::setting("head_dim", "an even number", self.head_dim));
        }
        if !(0.0..1.0).contains(&self.norm_eps) {
            return Err(Error::setting("rms_norm_eps", "0 to 1", self.norm_eps));
        }
        if self.windows.contains(&Some(0)) {
            return Err(Error::setting("sliding_window", "at least 1", 0));
        }
        Ok(())
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

/// What `transformers` takes for fields that a `config.json` lacks.
struct Defaults {
    kv_heads: Option<usize>,
    context: usize,
    bos: Option<u32>,
    eos: &'static [u32],
}

fn defaults(family: &str) -> Result<Defaults> {
    match family {
        "llama" => Ok(Defaults { kv_heads: None, context: 2048, bos: Some(1), eos: &[2] }),
        "mistral" => Ok(Defaults { kv_heads: Some(8), context: 131_072, bos: Some(1), eos: &[2] }),
        "qwen2" | "qwen3" => {
            Ok(Defaults { kv_heads: Some(32), context: 32_768, bos: None, eos: &[] })
        }
        other => Err(unknown_architecture(other)),
    }
}

fn from_fields(raw: &Fields) -> Result<Config> {
    let family = raw.text("model_type")?.ok_or_else(|| raw.missing("model_type"))?;
    let default = defaults(family)?;
    if let Some(act) = raw.text("hidden_act")?.filter(|&act| act != "silu") {
        return Err(Error::Unsupported(format!("activation {act:?} (known: \"silu\")")));
    }
    let number = |name: &str| raw.number(name)?.ok_or_else(|| raw.missing(name));
    let (heads, hidden) = (number("num_attention_heads")?, number("hidden_size")?);
    let head_dim = match (raw.number("head_dim")?, family) {
        (Some(d), _) => d,
        (None, "qwen3") => 128,
        (None, _) => hidden / heads.max(1),
    };
    let kv_heads = match raw.number("num_key_value_heads")? {
        Some(n) => n,
        // A null means as many as queries, an absent field the family's default.
        None if raw.has("num_key_value_heads") => heads,
        None => default.kv_heads.unwrap_or(heads),
    };
    let context = raw.number("max_position_embeddings")?.unwrap_or(default.context);
    let (rope_theta, rope_scaling) = rope(raw, context)?;
    let layers = number("num_hidden_layers")?;
    let attention_bias = raw.switch("attention_bias")?.unwrap_or(false);
    let mlp_bias = raw.switch("mlp_bias")?.unwrap_or(false);
    let config = Config {
        family: family.to_owned(),
        vocab_size: number("vocab_size")?,
        hidden_size: hidden,
        intermediate_size: number("intermediate_size")?,
        layers,
        heads,
        kv_heads,
        head_dim,
        norm_eps: raw.float("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        context_length: context,
        windows: Vec::new(),
        qkv_bias: family == "qwen2" || (attention_bias && family != "mistral"),
        out_bias: attention_bias && ["llama", "qwen3"].contains(&family),
        mlp_bias: mlp_bias && family == "llama",
        qk_norm: family == "qwen3",
        tied_embeddings: raw.switch("tie_word_embeddings")?.unwrap_or(false),
        bos: match raw.has("bos_token_id") {
            true => raw.ids("bos_token_id").first().copied(),
            false => default.bos,
        },
        eos: match raw.has("eos_token_id") {
            true => raw.ids("eos_token_id"),
            false => default.eos.to_vec(),
        },
    };
    // The windows are one per layer: their number is checked before there are so many.
    config.check()?;
    Ok(Config { windows: windows(raw, family, layers)?, ..config })
}

/// Mistral's layers all have the window. Qwen's have it from some layer on, or where `layer_types`
/// says so, and only if it is in use. Llama's have none, whatever the fields say.
fn windows(raw: &Fields, family: &str, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match raw.number("sliding_window")? {
        Some(window) => Some(window),
        None if raw.has("sliding_window") => None,
        None => Some(4096),
    };
    let qwen = family.starts_with("qwen");
    let used = family == "mistral" || (qwen && raw.switch("use_sliding_window")?.unwrap_or(false));
    let Some(window) = window.filter(|_| used) else { return Ok(vec![None; layers]) };
    let types = raw.texts("layer_types")?.filter(|_| qwen);
    let Some(types) = types else {
        let first = match qwen {
            true => raw.number("max_window_layers")?.unwrap_or(28),
            false => 0,
        };
        return Ok((0..layers).map(|layer| Some(window).filter(|_| layer >= first)).collect());
    };
    if types.len() != layers {
        return Err(Error::mismatch("layer_types", format!("{layers} entries"), types.len()));
    }
    let window = |kind: &&str| match *kind {
        "sliding_attention" => Ok(Some(window)),
        "full_attention" => Ok(None),
        other => Err(Error::Unsupported(format!("a layer of type {other:?}"))),
    };
    types.iter().map(window).collect()
}

/// The base and the scaling. Version 5 of `transformers` moved both into `rope_parameters`; a
/// `rope_scaling` goes before it.
fn rope(raw: &Fields, context: usize) -> Result<(f64, RopeScaling)> {
    let scaling = raw.fields("rope_scaling")?.filter(|fields| !fields.is_empty());
    let fields = match scaling {
        Some(fields) => Some(fields),
        None => raw.fields("rope_parameters")?,
    };
    let top = raw.float("rope_theta")?.unwrap_or(10_000.0);
    for fields in fields.iter().chain([raw]) {
        if let Some(part) = fields.float("partial_rotary_factor")?.filter(|&part| part != 1.0) {
            return Err(Error::Unsupported(format!("partial_rotary_factor {part}")));
        }
    }
    let Some(fields) = fields else { return Ok((top, RopeScaling::None)) };
    let theta = fields.float("rope_theta")?.unwrap_or(top);
    let kind = match fields.text("rope_type")? {
        Some(kind) => Some(kind),
        None => fields.text("type")?,
    };
    let need = |name: &str| {
        let missing = || Error::setting(format!("rope_scaling.{name}"), "a number", "nothing");
        fields.float(name)?.ok_or_else(missing)
    };
    let scaling = match kind {
        Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear(need("factor")?),
        Some("llama3") => {
            let name = "original_max_position_embeddings";
            let original = match raw.number(name)? {
                Some(original) => Some(original),
                None => fields.number(name)?,
            };
            RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_context: original.unwrap_or(context),
            }
        }
        Some(other) => {
            let what = format!("rope scaling {other:?} (known: default, linear, llama3)");
            return Err(Error::Unsupported(what));
        }
        None if fields.has("full_attention") || fields.has("sliding_attention") => {
            return Err(Error::Unsupported("rope parameters that differ between layers".into()));
        }
        None if fields.float("factor")?.is_some_and(|factor| factor != 1.0) => {
            let what = "rope_scaling with a factor and neither \"rope_type\" nor \"type\"";
            return Err(Error::Unsupported(what.into()));
        }
        None => RopeScaling::None,
    };
    Ok((theta, scaling))
}

pub(crate) fn unknown_architecture(name: &str) -> Error {
    Error::Unsupported(format!("architecture {name:?} (known: llama, mistral, qwen2, qwen3)"))
}
