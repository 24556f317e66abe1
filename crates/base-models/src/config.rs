//! The configuration of a decoder.

use std::path::Path;

use crate::architectures;
use crate::json::Fields;
use crate::rope_settings::RopeSettings;
use longctx_checkpoint::files;
use longctx_core::{AttentionShape, Error, Result};

/// The largest accepted number of layers. It bounds allocations for invalid files.
const MAX_LAYERS: usize = 10_000;
/// The largest accepted number of channels, heads or tokens. Products of two sizes fit 64 bits.
const MAX_SIZE: usize = 1 << 31;

/// The activation function of a gated feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Activation {
    /// x · sigmoid(x).
    #[default]
    Silu,
    /// x · Φ(x), exact.
    Gelu,
    /// GELU approximated with tanh.
    GeluTanh,
}

/// The RMS norms of queries and keys, before the rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum QkNorm {
    /// None.
    #[default]
    None,
    /// Over each head's channels (Qwen3, Gemma 3).
    PerHead,
    /// Over the channels of all heads (OLMo-2).
    AllHeads,
}

/// A mixture of experts: a router chooses some feed-forward blocks for each token.
#[derive(Debug, Clone, PartialEq)]
pub struct Experts {
    /// Number of experts of a layer.
    pub count: usize,
    /// Number of experts per token.
    pub per_token: usize,
    /// Channels inside an expert.
    pub intermediate_size: usize,
    /// How the router scores experts.
    pub scoring: Scoring,
    /// Groups of experts that limit the choice (DeepSeek); `None`: no limit.
    pub groups: Option<ExpertGroups>,
    /// Whether the weights of a token's experts are normalised to sum to 1.
    pub normalize: bool,
    /// Factor of the weights.
    pub scale: f64,
    /// Channels inside the shared expert, which processes all tokens; 0: there is none.
    pub shared_size: usize,
    /// Layers with a dense feed-forward block instead of experts.
    pub dense_layers: Vec<usize>,
}

/// The conversion of a router's logits to scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Scoring {
    /// Softmax over all experts. A group's score is that of its best expert (DeepSeek-V2).
    #[default]
    Softmax,
    /// Sigmoid. A learned bias is added to the scores for the choice, but not to the weights. A
    /// group's score is the sum of its two best experts (DeepSeek-V3).
    BiasedSigmoid,
}

/// Groups of consecutive experts: a token's experts come from its best groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Number of groups.
    pub count: usize,
    /// Number of groups per token.
    pub per_token: usize,
}

impl Default for Experts {
    /// Softmax scoring without groups, with all sizes zero.
    fn default() -> Self {
        Self {
            count: 0,
            per_token: 0,
            intermediate_size: 0,
            scoring: Scoring::Softmax,
            groups: None,
            normalize: false,
            scale: 1.0,
            shared_size: 0,
            dense_layers: Vec::new(),
        }
    }
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). The keys and values of all heads
/// are computed from one latent per token. In addition, keys have a rotated part that all heads
/// share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latent {
    /// Channels of the latent.
    pub rank: usize,
    /// Channels of the queries' latent; `None`: queries are computed from the layer's input.
    pub query_rank: Option<usize>,
    /// Rotated channels of a query or key.
    pub rotated: usize,
    /// Unrotated channels of a query or key.
    pub unrotated: usize,
    /// Channels of a head's value.
    pub value_dim: usize,
    /// Whether the checkpoint pairs channel 2i with 2i + 1 for rotation, instead of i with i +
    /// `rotated` / 2.
    pub interleaved: bool,
}

/// The configuration of a decoder: everything that differs between architectures. The default is
/// Llama's, with sizes of zero.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The family: a `config.json`'s `model_type` or a GGUF file's `general.architecture`.
    pub family: String,
    /// Size of the vocabulary.
    pub vocab_size: usize,
    /// Channels between layers.
    pub hidden_size: usize,
    /// Channels inside the feed-forward block.
    pub intermediate_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of query heads of a layer.
    pub heads: usize,
    /// Number of kv heads of a layer; with [latent attention](Self::latent), 1.
    pub kv_heads: usize,
    /// Channels of a key; with latent attention, the rotated channels and the latent.
    pub head_dim: usize,
    /// Multi-head latent attention, in the absorbed form: the latent is the key and the value of
    /// all heads.
    pub latent: Option<Latent>,
    /// Epsilon of RMS norms.
    pub norm_eps: f64,
    /// Whether norms multiply by their weights plus 1 (Gemma's checkpoints).
    pub norm_offset: bool,
    /// Whether the inputs of attention and of the feed-forward block are normalised.
    pub pre_norms: bool,
    /// Whether the outputs of attention and of the feed-forward block are normalised.
    pub post_norms: bool,
    /// The rotary embedding.
    pub rope: RopeSettings,
    /// The rotary embedding of layers with a sliding window, if it differs.
    pub windowed_rope: Option<RopeSettings>,
    /// Layers without a rotary embedding.
    pub unrotated: Vec<usize>,
    /// The context length of the model, in tokens.
    pub context_length: usize,
    /// The sliding window of each layer; empty if no layer has one.
    pub windows: Vec<Option<usize>>,
    /// Softmax scale, if it is not `head_dim^-0.5`.
    pub attention_scale: Option<f64>,
    /// Attention scores s become `cap * tanh(s / cap)`.
    pub attention_soft_cap: Option<f64>,
    /// Queries, keys and values are clamped to this magnitude.
    pub clamp_qkv: Option<f64>,
    /// Whether the query, key and value projections add a bias (Qwen2).
    pub qkv_bias: bool,
    /// Whether the projection of the attention's output adds a bias.
    pub out_bias: bool,
    /// Whether the projections of the feed-forward block add biases.
    pub mlp_bias: bool,
    /// How queries and keys are normalised.
    pub qk_norm: QkNorm,
    /// The activation function of feed-forward blocks.
    pub activation: Activation,
    /// The mixture of experts, if there is one.
    pub experts: Option<Experts>,
    /// Factor of the embeddings.
    pub embedding_scale: f64,
    /// Factor of the blocks' outputs before the residual addition.
    pub residual_scale: f64,
    /// Factor of the logits.
    pub logit_scale: f64,
    /// Logits x become `cap * tanh(x / cap)`.
    pub logit_soft_cap: Option<f64>,
    /// Whether the output head is the embedding's matrix.
    pub tied_embeddings: bool,
    /// The token at the start of a text, if the model's tokenizer adds one.
    pub bos: Option<u32>,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            family: "llama".into(),
            vocab_size: 0,
            hidden_size: 0,
            intermediate_size: 0,
            layers: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            latent: None,
            norm_eps: 1e-6,
            norm_offset: false,
            pre_norms: true,
            post_norms: false,
            rope: RopeSettings::default(),
            windowed_rope: None,
            unrotated: Vec::new(),
            context_length: 0,
            windows: Vec::new(),
            attention_scale: None,
            attention_soft_cap: None,
            clamp_qkv: None,
            qkv_bias: false,
            out_bias: false,
            mlp_bias: false,
            qk_norm: QkNorm::None,
            activation: Activation::Silu,
            experts: None,
            embedding_scale: 1.0,
            residual_scale: 1.0,
            logit_scale: 1.0,
            logit_soft_cap: None,
            tied_embeddings: false,
            bos: None,
            eos: Vec::new(),
        }
    }
}

impl Config {
    /// Reads a `config.json`. Missing fields have `transformers`' defaults.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read or a field is missing; [`Error::Unsupported`] for
    /// another architecture.
    pub fn from_file(path: &Path) -> Result<Self> {
        let json = files::read_json(path)?;
        architectures::read(&Fields::new(path, &json)?)
    }

    /// Reads the metadata of a GGUF file, without its weights.
    ///
    /// # Errors
    /// As [`Pretrained::from_gguf`](crate::Pretrained::from_gguf), except those about weights and
    /// the tokenizer.
    pub fn from_gguf(path: &Path) -> Result<Self> {
        crate::gguf::Gguf::open(path, &crate::LoadOptions::default())?.config()
    }

    /// Reads a folder's `config.json` and, if it exists, `generation_config.json`, whose end tokens
    /// take precedence.
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

    /// Checks the sizes before memory is allocated for them.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first invalid size.
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
        self.check_scales()?;
        self.latent.as_ref().map_or(Ok(()), |latent| latent.check(self))?;
        self.experts.as_ref().map_or(Ok(()), Experts::check)
    }

    fn check_scales(&self) -> Result<()> {
        let positive = [
            ("attention scale", self.attention_scale),
            ("attention soft cap", self.attention_soft_cap),
            ("clamp of queries, keys and values", self.clamp_qkv),
            ("embedding scale", Some(self.embedding_scale)),
            ("residual scale", Some(self.residual_scale)),
            ("logit scale", Some(self.logit_scale)),
            ("logit soft cap", self.logit_soft_cap),
        ];
        let wrong = |x: f64| !(x.is_finite() && x > 0.0);
        match positive.into_iter().find_map(|(name, x)| Some((name, x.filter(|&x| wrong(x))?))) {
            Some((name, x)) => Err(Error::setting(name, "a positive number", x)),
            None => Ok(()),
        }
    }

    /// Returns the attention shape of one layer.
    ///
    /// # Errors
    /// [`Error::Setting`] if the numbers of heads are not valid.
    pub fn attention(&self, layer: usize) -> Result<AttentionShape> {
        let shape = AttentionShape::new(self.heads, self.kv_heads, self.head_dim)?;
        Ok(AttentionShape {
            value_dim: self.latent.map_or(self.head_dim, |latent| latent.rank),
            window: self.window(layer),
            soft_cap: self.attention_soft_cap.map(|cap| cap as f32),
            scale: self.attention_scale.map_or(shape.scale, |scale| scale as f32),
            ..shape
        })
    }

    fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }

    /// Returns the rotary embedding of one layer; `None` for a layer without one.
    pub fn layer_rope(&self, layer: usize) -> Option<&RopeSettings> {
        if self.unrotated.contains(&layer) {
            return None;
        }
        match self.window(layer) {
            Some(_) => Some(self.windowed_rope.as_ref().unwrap_or(&self.rope)),
            None => Some(&self.rope),
        }
    }

    /// Returns the experts of one layer; `None` for a layer with a dense feed-forward block.
    pub(crate) fn layer_experts(&self, layer: usize) -> Option<&Experts> {
        self.experts.as_ref().filter(|experts| !experts.dense_layers.contains(&layer))
    }

    /// Returns the configuration for sequences of at most `length` tokens.
    pub(crate) fn for_length(self, length: usize) -> Self {
        let of =
            |rope: RopeSettings| RopeSettings { scaling: rope.scaling.for_length(length), ..rope };
        Self {
            context_length: length,
            rope: of(self.rope),
            windowed_rope: self.windowed_rope.map(of),
            ..self
        }
    }
}

impl Experts {
    fn check(&self) -> Result<()> {
        if !(1..=MAX_LAYERS).contains(&self.count) {
            let expected = format!("1 to {MAX_LAYERS}");
            return Err(Error::setting("number of experts", expected, self.count));
        }
        if !(1..=self.count).contains(&self.per_token) {
            let expected = format!("1 to the {} experts", self.count);
            return Err(Error::setting("experts per token", expected, self.per_token));
        }
        if !(1..=MAX_SIZE).contains(&self.intermediate_size) {
            let expected = format!("1 to {MAX_SIZE}");
            return Err(Error::setting("moe_intermediate_size", expected, self.intermediate_size));
        }
        if self.shared_size > MAX_SIZE {
            let expected = format!("at most {MAX_SIZE} channels");
            return Err(Error::setting("n_shared_experts", expected, self.shared_size));
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return Err(Error::setting("routed_scaling_factor", "a positive number", self.scale));
        }
        self.check_groups()
    }

    fn check_groups(&self) -> Result<()> {
        let Some(ExpertGroups { count, per_token }) = self.groups else { return Ok(()) };
        let least = match self.scoring {
            Scoring::Softmax => 1,
            Scoring::BiasedSigmoid => 2,
        };
        if count == 0 || !self.count.is_multiple_of(count) || self.count / count < least {
            let expected = format!("a divisor of {} experts into {least} or more", self.count);
            return Err(Error::setting("n_group", expected, count));
        }
        let needed = self.per_token.div_ceil(self.count / count);
        if !(needed..=count).contains(&per_token) {
            let expected = format!("{needed} to {count}: a token's experts come from them");
            return Err(Error::setting("topk_group", expected, per_token));
        }
        Ok(())
    }
}

impl Latent {
    fn check(&self, config: &Config) -> Result<()> {
        let sizes = [
            ("kv_lora_rank", self.rank),
            ("q_lora_rank", self.query_rank.unwrap_or(1)),
            ("qk_rope_head_dim", self.rotated),
            ("qk_nope_head_dim", self.unrotated),
            ("v_head_dim", self.value_dim),
        ];
        for (name, size) in sizes {
            if !(1..=MAX_SIZE).contains(&size) {
                return Err(Error::setting(name, format!("1 to {MAX_SIZE}"), size));
            }
        }
        if !self.rotated.is_multiple_of(2) {
            return Err(Error::setting("qk_rope_head_dim", "an even number", self.rotated));
        }
        let (heads, key) = (config.kv_heads, config.head_dim);
        if heads != 1 || key != self.rank + self.rotated {
            let expected = format!("one of {} channels", self.rank + self.rotated);
            let got = format!("{heads} of {key}");
            return Err(Error::mismatch("keys of latent attention", expected, got));
        }
        Ok(())
    }
}
