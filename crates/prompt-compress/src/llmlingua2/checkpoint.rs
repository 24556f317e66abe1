//! Checkpoints in Hugging Face format: `config.json`, `tokenizer.json`, `model.safetensors`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use longctx_checkpoint::ReadTensors;
use longctx_core::{Error, Result};
use safetensors::tensor::Metadata;
use serde::Deserialize;
use serde::de::IgnoredAny;

/// The encoder families of LLMLingua-2 checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Family {
    /// XLM-RoBERTa: SentencePiece tokens; words begin with `▁`.
    XlmRoberta,
    /// BERT: WordPiece tokens; `##` continues a word.
    Bert,
}

/// The encoder's settings in `config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    pub model_type: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    pub hidden_act: String,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
    #[serde(default)]
    pub pad_token_id: u32,
    pub position_embedding_type: Option<String>,
    is_decoder: Option<bool>,
    quantization_config: Option<IgnoredAny>,
}

impl Config {
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        let config: Config = serde_json::from_str(&text).map_err(|e| Error::file(path, e))?;
        if config.hidden_act != "gelu" {
            return Err(Error::Unsupported(format!("the activation {:?}", config.hidden_act)));
        }
        if config.is_decoder == Some(true) {
            return Err(Error::Unsupported(
                "an encoder with is_decoder, which looks back only".into(),
            ));
        }
        if config.quantization_config.is_some() {
            return Err(Error::Unsupported("quantized weights (quantization_config)".into()));
        }
        match config.position_embedding_type.as_deref() {
            None | Some("absolute") => Ok(config),
            Some(other) => Err(Error::Unsupported(format!("position embeddings {other:?}"))),
        }
    }
}

/// The tensors of one safetensors file, read on request.
pub struct Weights {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    /// Offset of the tensor data.
    start: u64,
    device: Device,
    read: ReadTensors,
}

impl Weights {
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let failed = |e: &dyn std::fmt::Display| Error::file(path, e);
        let mut file = File::open(path).map_err(|e| failed(&e))?;
        let size = file.metadata().map_err(|e| failed(&e))?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|e| failed(&e))?;
        let length = u64::from_le_bytes(length);
        let Some(data) = size.checked_sub(8).and_then(|size| size.checked_sub(length)) else {
            return Err(failed(&"not a safetensors file, or cut short"));
        };
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(|e| failed(&e))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|e| failed(&e))?;
        if metadata.data_len() as u64 != data {
            let described = metadata.data_len();
            return Err(failed(&format!(
                "the header describes {described} bytes, there are {data}"
            )));
        }
        let start = 8 + length;
        let (path, device, read) = (path.into(), device.clone(), ReadTensors::default());
        Ok(Self { path, file, metadata, start, device, read })
    }

    /// Checks that every tensor has been read.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming unread tensors that may change the encoder's output.
    pub fn check_all_read(&self) -> Result<()> {
        let names = self.metadata.offset_keys();
        self.read.check_all_read(&self.path, names.iter().map(String::as_str), is_without_effect)
    }

    /// Returns the shape of a tensor, if it exists.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// Returns a tensor in f32.
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.read.insert(name);
        let Some(info) = self.metadata.info(name) else {
            return Err(Error::file(&self.path, format!("there is no tensor {name:?}")));
        };
        if info.shape != shape {
            let what = format!("tensor {name:?} in {}", self.path.display());
            return Err(Error::mismatch(what, format!("{shape:?}"), format!("{:?}", info.shape)));
        }
        let dtype = DType::try_from(info.dtype)?;
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0; to - from];
        let seek = SeekFrom::Start(self.start + from as u64);
        let read = self.file.seek(seek).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|e| Error::file(&self.path, format!("tensor {name:?}: {e}")))?;
        Ok(Tensor::from_raw_buffer(&bytes, dtype, shape, &self.device)?.to_dtype(DType::F32)?)
    }
}

/// Returns whether a tensor is not part of a token classifier: the position ids, the pooler, and
/// the pretraining heads.
fn is_without_effect(name: &str) -> bool {
    name.ends_with("embeddings.position_ids")
        || name.contains(".pooler.")
        || name.starts_with("cls.")
        || name.starts_with("lm_head.")
}
