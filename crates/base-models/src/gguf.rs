//! Models in GGUF files (llama.cpp's format): weights, configuration, tokenizer, chat template.

use std::path::Path;

use crate::account::Account;
use crate::config::{Config, unknown_architecture};
use crate::gguf_file::GgufFile;
use crate::gguf_header::Value;
use crate::gguf_tokenizer;
use crate::linear::Weight;
use crate::quantized::QuantizedMatrix;
use crate::weights::{LoadOptions, Weights};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use longctx_core::{Error, Result, RopeScaling};

/// Settings of an architecture that are read, or don't change what the model computes.
const READ: [&str; 17] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
];

/// Settings that change what a model computes, and are not read: with a value other than the
/// neutral one they are refused.
const REFUSED: [(&str, f64); 24] = [
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.kv_lora_rank", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.output_scale", 1.0),
    ("attention.q_lora_rank", 0.0),
    ("attention.scale", 0.0),
    ("attention.shared_kv_layers", 0.0),
    ("attention.sliding_window_pattern", 0.0),
    ("attention.temperature_length", 0.0),
    ("attention.temperature_scale", 0.0),
    ("attention.value_scale", 1.0),
    ("attn_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("rope.dimension_sections", 0.0),
    ("rope.freq_base_swa", 0.0),
    ("rope.scaling.alpha", 0.0),
    ("rope.scaling.attn_factor", 1.0),
    ("use_parallel_residual", 0.0),
];

/// Tensors that can be computed from the settings.
const HARMLESS: [&str; 1] = ["attn_rot_embd"];

/// An open GGUF file as a model.
pub(crate) struct Gguf {
    file: GgufFile,
    options: LoadOptions,
    account: Account,
    /// Query and key/value heads, where rows of these projections are interleaved for llama.cpp's
    /// rotary embedding.
    interleaved: Option<(usize, usize)>,
}

impl Gguf {
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let options = options.clone();
        Ok(Self { file, options, account: Account::default(), interleaved: None })
    }

    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// The model's shape, from the file's metadata.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with each setting that changes what the model computes and is not
    /// read.
    pub fn config(&mut self) -> Result<Config> {
        let family = self.file.text("general.architecture")?;
        let family = family.ok_or_else(|| self.missing("general.architecture"))?.to_owned();
        if !["llama", "qwen2", "qwen3"].contains(&family.as_str()) {
            return Err(unknown_architecture(&family));
        }
        self.check_settings(&family)?;
        let key = |name: &str| format!("{family}.{name}");
        let optional = |name: &str| self.file.number(&key(name));
        let number = |name: &str| optional(name)?.ok_or_else(|| self.missing(&key(name)));
        let (heads, hidden) = (number("attention.head_count")?, number("embedding_length")?);
        let head_dim = match optional("attention.key_length")? {
            Some(d) => d,
            None => hidden / heads.max(1),
        };
        for name in ["rope.dimension_count", "attention.value_length"] {
            if let Some(other) = optional(name)?.filter(|&d| d != head_dim) {
                let what = format!("{} of {other}, with heads of {head_dim}", key(name));
                return Err(self.unsupported(what));
            }
        }
        let layers = number("block_count")?;
        let embedding = self.info("token_embd.weight")?;
        let eps = key("attention.layer_norm_rms_epsilon");
        let bias = |part: &str| self.has(&format!("model.layers.0.{part}.bias"));
        let config = Config {
            vocab_size: embedding.first().copied().unwrap_or(0),
            hidden_size: hidden,
            intermediate_size: number("feed_forward_length")?,
            layers,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            norm_eps: self.file.float(&eps)?.ok_or_else(|| self.missing(&eps))?,
            rope_theta: self.file.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: self.rope_scaling(&family)?,
            context_length: number("context_length")?,
            windows: Vec::new(),
            qkv_bias: ["q", "k", "v"].iter().any(|p| bias(&format!("self_attn.{p}_proj"))),
            out_bias: bias("self_attn.o_proj"),
            mlp_bias: ["gate", "up", "down"].iter().any(|p| bias(&format!("mlp.{p}_proj"))),
            qk_norm: family == "qwen3",
            tied_embeddings: !self.has("lm_head.weight"),
            bos: gguf_tokenizer::token_id(&self.file, "bos_token_id")?,
            eos: gguf_tokenizer::end_tokens(&self.file)?,
            family,
        };
        config.check()?;
        let windows = vec![self.window(&config)?; layers];
        self.interleaved = (config.family == "llama").then_some((heads, config.kv_heads));
        Ok(Config { windows, ..config })
    }

    /// Llama files have a window for all layers or none; a Qwen model uses its window in some
    /// layers, which files don't tell.
    fn window(&self, config: &Config) -> Result<Option<usize>> {
        let key = format!("{}.attention.sliding_window", config.family);
        let window = self.file.number(&key)?.filter(|&w| w > 0);
        match window {
            Some(window) if config.family != "llama" && window < config.context_length => {
                Err(self.unsupported(format!("{key} of {window}")))
            }
            window => Ok(window.filter(|_| config.family == "llama")),
        }
    }

    /// Linear is what a factor means unless the file names a type; "none" means that there is no
    /// factor.
    fn rope_scaling(&self, family: &str) -> Result<RopeScaling> {
        let key = |name: &str| format!("{family}.rope.{name}");
        let factor = match self.file.float(&key("scaling.factor"))? {
            Some(factor) => Some(factor),
            None => self.file.float(&key("scale_linear"))?,
        };
        match self.file.text(&key("scaling.type"))? {
            Some("none") => Ok(RopeScaling::None),
            None | Some("linear") => match factor {
                None | Some(0.0 | 1.0) => Ok(RopeScaling::None),
                Some(factor) => Ok(RopeScaling::Linear(factor)),
            },
            Some(other) => {
                Err(self.unsupported(format!("rope scaling {other:?} (known: none, linear)")))
            }
        }
    }

    fn check_settings(&self, family: &str) -> Result<()> {
        let mut unknown = Vec::new();
        for key in self.file.keys() {
            let Some(name) = key.strip_prefix(family).and_then(|k| k.strip_prefix('.')) else {
                continue;
            };
            if READ.contains(&name) {
                continue;
            }
            match REFUSED.iter().find(|(refused, _)| *refused == name) {
                None => unknown.push(key),
                Some((_, neutral)) => {
                    let value = self.file.get(key);
                    let same = match value {
                        Some(Value::Integer(n)) => *n as f64 == *neutral,
                        Some(Value::Float(x)) => x == neutral || *x == 0.0,
                        Some(Value::Bool(on)) => f64::from(u8::from(*on)) == *neutral,
                        _ => false,
                    };
                    if !same {
                        let value = value.map_or_else(String::new, |v| format!(" = {v:?}"));
                        return Err(self.unsupported(format!("setting {key:?}{value}")));
                    }
                }
            }
        }
        if !unknown.is_empty() {
            let path = self.file.path().display();
            log::warn!("{path}: settings without effect here: {}", unknown.join(", "));
        }
        Ok(())
    }

    fn missing(&self, key: &str) -> Error {
        Error::file(self.file.path(), format!("there is no metadata {key:?}"))
    }

    fn unsupported(&self, what: String) -> Error {
        Error::Unsupported(format!("{}: {what}", self.file.path().display()))
    }

    fn info(&self, name: &str) -> Result<&[usize]> {
        let missing = || Error::file(self.file.path(), format!("there is no tensor {name:?}"));
        Ok(self.file.info(name).ok_or_else(missing)?.dims.as_slice())
    }

    fn read(&self, name: &str, shape: &[usize], device: &Device) -> Result<QTensor> {
        let gguf_name = gguf_name(name);
        let got = self.info(&gguf_name)?;
        if got != shape {
            let what = format!("tensor {gguf_name:?} in {}", self.file.path().display());
            return Err(Error::mismatch(what, format!("{shape:?}"), format!("{got:?}")));
        }
        self.account.used(&gguf_name);
        self.file.read(&gguf_name, device)
    }

    /// The heads of a projection whose rows are interleaved.
    fn interleaved_heads(&self, name: &str) -> Option<usize> {
        let (heads, kv_heads) = self.interleaved?;
        if name.contains("q_proj") {
            Some(heads)
        } else if name.contains("k_proj") {
            Some(kv_heads)
        } else {
            None
        }
    }
}

/// llama.cpp rotates channel 2i with 2i+1, Hugging Face i with i + d/2: the row of llama.cpp's that
/// is row `row` here.
fn interleaved_row(row: usize, d: usize) -> usize {
    let (head, channel) = (row / d, row % d);
    head * d + 2 * (channel % (d / 2)) + channel / (d / 2)
}

impl Weights for Gguf {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.read(name, shape, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        let tensor = match self.interleaved_heads(name) {
            None => tensor,
            Some(heads) => {
                let d = shape[0] / heads;
                let rows: Vec<_> = (0..shape[0]).map(|i| interleaved_row(i, d) as u32).collect();
                tensor.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?
            }
        };
        Ok(tensor.to_dtype(self.options.dtype)?.to_device(&self.options.device)?)
    }

    fn matrix(&self, name: &str, out: usize, inner: usize) -> Result<Weight> {
        // Rows are reordered on the CPU, where their bytes are at hand.
        let tensor = self.read(name, &[out, inner], &Device::Cpu)?;
        let mut matrix = QuantizedMatrix::new(&gguf_name(name), tensor)?;
        if let Some(heads) = self.interleaved_heads(name) {
            matrix = matrix.reorder(|row| interleaved_row(row, out / heads))?;
        }
        let float = matches!(matrix.dtype(), GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        if self.options.expand || float {
            let dense = matrix.expand()?.to_dtype(self.options.dtype)?;
            return Ok(Weight::Dense(dense.to_device(&self.options.device)?));
        }
        Ok(Weight::Quantized(matrix.to_device(&self.options.device)?))
    }

    fn has(&self, name: &str) -> bool {
        self.file.info(&gguf_name(name)).is_some()
    }

    fn finish(&self) -> Result<()> {
        let harmless = |name: &str| HARMLESS.iter().any(|part| name.contains(part));
        self.account.close(self.file.path(), self.file.tensor_names(), harmless)
    }
}

/// Hugging Face's name of a tensor in llama.cpp's words.
fn gguf_name(name: &str) -> String {
    let renamed = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("rope.factors", "rope_freqs"),
    ];
    renamed.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}
