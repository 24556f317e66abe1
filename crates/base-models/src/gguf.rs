//! Models in one GGUF file (llama.cpp's format): weights, configuration, tokenizer, chat template.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::config::{Config, unknown_architecture};
use crate::linear::Weight;
use crate::quantized::QuantizedMatrix;
use crate::weights::{LoadOptions, Weights};
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use longctx_core::{Error, Result, RopeScaling};

/// An open GGUF file.
pub(crate) struct Gguf {
    path: PathBuf,
    content: Content,
    reader: Mutex<BufReader<File>>,
    options: LoadOptions,
    /// Query and key/value heads, where rows of these projections are interleaved for llama.cpp's rotary embedding.
    interleaved: Option<(usize, usize)>,
}

impl Gguf {
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::file(path, e))?;
        let size = file.metadata().map_err(|e| Error::file(path, e))?.len();
        let mut reader = BufReader::new(file);
        let content = Content::read(&mut reader).map_err(|e| Error::file(path, e))?;
        check_size(path, &content, size)?;
        let options = options.clone();
        Ok(Self {
            path: path.into(),
            content,
            reader: Mutex::new(reader),
            options,
            interleaved: None,
        })
    }

    pub fn content(&self) -> &Content {
        &self.content
    }

    /// The model's shape, from the file's metadata.
    pub fn config(&mut self) -> Result<Config> {
        let family = self.text("general.architecture")?.to_owned();
        if !["llama", "qwen2", "qwen3"].contains(&family.as_str()) {
            return Err(unknown_architecture(&family));
        }
        let key = |name: &str| format!("{family}.{name}");
        let number = |name: &str| self.number(&key(name));
        let (heads, hidden) = (number("attention.head_count")?, number("embedding_length")?);
        let layers = number("block_count")?;
        let kv_heads = self.optional(&key("attention.head_count_kv"))?.unwrap_or(heads);
        let head_dim = match self.optional(&key("attention.key_length"))? {
            Some(d) => d,
            None if heads > 0 => hidden / heads,
            None => return Err(Error::file(&self.path, "no attention heads")),
        };
        let window = self.optional(&key("attention.sliding_window"))?.filter(|&w| w > 0);
        let embedding = self.info("token_embd.weight")?;
        let config = Config {
            vocab_size: embedding.first().copied().unwrap_or(0),
            hidden_size: hidden,
            intermediate_size: number("feed_forward_length")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            norm_eps: self.float(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-5),
            rope_theta: self.float(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: self.rope_scaling(&family)?,
            context_length: number("context_length")?,
            windows: vec![window; layers],
            qkv_bias: family == "qwen2",
            qk_norm: family == "qwen3",
            tied_embeddings: !self.has("lm_head.weight"),
            bos: self.token("tokenizer.ggml.bos_token_id")?,
            eos: self.end_tokens()?,
            family,
        };
        self.interleaved = (config.family == "llama").then_some((heads, kv_heads));
        Ok(config)
    }

    /// The chat template, if the file has one.
    pub fn chat_template(&self) -> Option<&str> {
        let template = self.content.metadata.get("tokenizer.chat_template")?;
        template.to_string().ok().map(String::as_str)
    }

    fn end_tokens(&self) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            tokens.extend(self.token(&format!("tokenizer.ggml.{key}"))?);
        }
        tokens.dedup();
        Ok(tokens)
    }

    fn rope_scaling(&self, family: &str) -> Result<RopeScaling> {
        let key = format!("{family}.rope.scaling.type");
        let kind = self.content.metadata.get(&key).and_then(|v| v.to_string().ok());
        match kind.map(String::as_str) {
            None | Some("none") => Ok(RopeScaling::None),
            Some("linear") => {
                let factor = self.float(&format!("{family}.rope.scaling.factor"))?.unwrap_or(1.0);
                Ok(RopeScaling::Linear(factor))
            }
            Some(other) => {
                Err(Error::Unsupported(format!("rope scaling {other:?} (known: none, linear)")))
            }
        }
    }

    fn value(&self, key: &str) -> Result<&Value> {
        let missing = || Error::file(&self.path, format!("there is no metadata {key:?}"));
        self.content.metadata.get(key).ok_or_else(missing)
    }

    fn text(&self, key: &str) -> Result<&str> {
        Ok(self.value(key)?.to_string().map_err(|e| self.bad(key, e))?)
    }

    fn number(&self, key: &str) -> Result<usize> {
        self.value(key)?;
        self.optional(key).map(|n| n.unwrap_or(0))
    }

    fn optional(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        let n = match value {
            Value::I32(n) => u64::try_from(*n).map_err(|e| self.bad(key, e))?,
            other => other.to_u64().map_err(|e| self.bad(key, e))?,
        };
        usize::try_from(n).map(Some).map_err(|e| self.bad(key, e))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.content.metadata.get(key) else { return Ok(None) };
        value.to_f32().map(|x| Some(f64::from(x))).map_err(|e| self.bad(key, e))
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        let Some(id) = self.optional(key)? else { return Ok(None) };
        u32::try_from(id).map(Some).map_err(|e| self.bad(key, e))
    }

    fn bad(&self, key: &str, reason: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("metadata {key:?}: {reason}"))
    }

    fn info(&self, name: &str) -> Result<Vec<usize>> {
        let missing = || Error::file(&self.path, format!("there is no tensor {name:?}"));
        Ok(self.content.tensor_infos.get(name).ok_or_else(missing)?.shape.dims().to_vec())
    }

    fn read(&self, name: &str, shape: &[usize], device: &Device) -> Result<QTensor> {
        let gguf_name = gguf_name(name);
        let got = self.info(&gguf_name)?;
        if got != shape {
            let what = format!("tensor {gguf_name:?} in {}", self.path.display());
            return Err(Error::mismatch(what, format!("{shape:?}"), format!("{got:?}")));
        }
        let mut reader = self.reader.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let read = self.content.tensor(&mut *reader, &gguf_name, device);
        read.map_err(|e| Error::file(&self.path, format!("tensor {gguf_name:?}: {e}")))
    }

    /// llama.cpp rotates channel 2i with 2i+1, Hugging Face i with i + d/2: the rows of these projections differ in order.
    fn restore_rows(&self, name: &str, matrix: QuantizedMatrix) -> Result<QuantizedMatrix> {
        let heads = match self.interleaved {
            Some((heads, _)) if name.contains("q_proj") => heads,
            Some((_, kv_heads)) if name.contains("k_proj") => kv_heads,
            _ => return Ok(matrix),
        };
        let d = matrix.dims()?.0 / heads;
        matrix.reorder(|row| {
            let (head, channel) = (row / d, row % d);
            head * d + 2 * (channel % (d / 2)) + channel / (d / 2)
        })
    }
}

impl Weights for Gguf {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let device = &self.options.device;
        Ok(self.read(name, shape, device)?.dequantize(device)?.to_dtype(self.options.dtype)?)
    }

    fn matrix(&self, name: &str, out: usize, inner: usize) -> Result<Weight> {
        // Rows are reordered on the CPU, where their bytes are at hand.
        let matrix =
            QuantizedMatrix::new(&gguf_name(name), self.read(name, &[out, inner], &Device::Cpu)?)?;
        let matrix = self.restore_rows(name, matrix)?;
        let float = matches!(matrix.dtype(), GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        if self.options.expand || float {
            let dense = matrix.expand()?.to_dtype(self.options.dtype)?;
            return Ok(Weight::Dense(dense.to_device(&self.options.device)?));
        }
        Ok(Weight::Quantized(matrix.to_device(&self.options.device)?))
    }

    fn has(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(&gguf_name(name))
    }
}

/// A truncated file is found out before anything is loaded, by the first tensor that goes past its end.
fn check_size(path: &Path, content: &Content, size: u64) -> Result<()> {
    let mut tensors: Vec<_> = content.tensor_infos.iter().collect();
    tensors.sort_by_key(|(_, info)| info.offset);
    for (name, info) in tensors {
        let blocks = info.shape.elem_count().div_ceil(info.ggml_dtype.block_size());
        let bytes = (blocks * info.ggml_dtype.type_size()) as u64;
        let end = content.tensor_data_offset.saturating_add(info.offset).saturating_add(bytes);
        if end > size {
            let reason =
                format!("truncated: tensor {name:?} ends at byte {end}, the file at {size}");
            return Err(Error::file(path, reason));
        }
    }
    Ok(())
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
