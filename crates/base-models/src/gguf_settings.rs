//! The settings of one architecture in a GGUF file's metadata.

use crate::gguf_file::GgufFile;
use crate::gguf_header::Value;
use longctx_core::{Error, Result};

/// Settings that are read, or that do not change the model's output.
const READ: [&str; 22] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
    "vocab_size",
];

/// Settings that change the model's output, with their neutral values. Other values are refused,
/// unless the architecture reads the setting.
const REFUSED: [(&str, f64); 29] = [
    ("attention.causal", 1.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.kv_lora_rank", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.output_scale", 1.0),
    ("attention.q_lora_rank", 0.0),
    ("attention.scale", 0.0),
    ("attention.shared_kv_layers", 0.0),
    ("attention.sliding_window", 0.0),
    ("attention.sliding_window_pattern", 0.0),
    ("attention.temperature_length", 0.0),
    ("attention.temperature_scale", 0.0),
    ("attention.value_scale", 1.0),
    ("attn_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("expert_count", 0.0),
    ("expert_feed_forward_length", 0.0),
    ("expert_shared_feed_forward_length", 0.0),
    ("expert_used_count", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("rope.dimension_sections", 0.0),
    ("rope.freq_base_swa", 0.0),
    ("rope.scaling.alpha", 0.0),
    ("rope.scaling.yarn_ext_factor", 1.0),
    ("rope.scaling.yarn_log_multiplier", 0.0),
    ("leading_dense_block_count", 0.0),
    ("use_parallel_residual", 0.0),
];

/// A file's settings under the prefix of its architecture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings<'a> {
    file: &'a GgufFile,
    architecture: &'a str,
}

impl<'a> Settings<'a> {
    pub fn new(file: &'a GgufFile, architecture: &'a str) -> Self {
        Self { file, architecture }
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        self.file.text(&self.key(name))
    }

    pub fn number(&self, name: &str) -> Result<Option<usize>> {
        self.file.number(&self.key(name))
    }

    /// Returns an integer that the file must have.
    pub fn need_number(&self, name: &str) -> Result<usize> {
        self.number(name)?.ok_or_else(|| self.missing(name))
    }

    pub fn float(&self, name: &str) -> Result<Option<f64>> {
        self.file.float(&self.key(name))
    }

    /// Returns a number unless it is 0, which disables a setting.
    pub fn nonzero(&self, name: &str) -> Result<Option<f64>> {
        Ok(self.float(name)?.filter(|&x| x != 0.0))
    }

    pub fn missing(&self, name: &str) -> Error {
        let reason = format!("there is no metadata {:?}", self.key(name));
        Error::file(self.file.path(), reason)
    }

    pub fn unsupported(&self, what: impl std::fmt::Display) -> Error {
        Error::Unsupported(format!("{}: {what}", self.file.path().display()))
    }

    /// Creates an error about the value of a setting.
    pub fn refuse(&self, name: &str, value: impl std::fmt::Display) -> Error {
        self.unsupported(format!("{} of {value}", self.key(name)))
    }

    /// Checks that every setting is read, here or by the architecture, or has no effect.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the first setting that changes the model's output.
    pub fn check(&self, read: &[&str]) -> Result<()> {
        let mut unknown = Vec::new();
        for key in self.file.keys() {
            let name = key.strip_prefix(self.architecture).and_then(|k| k.strip_prefix('.'));
            let Some(name) = name.filter(|name| !READ.contains(name) && !read.contains(name))
            else {
                continue;
            };
            match REFUSED.iter().find(|(refused, _)| *refused == name) {
                None => unknown.push(key),
                Some(&(_, neutral)) => self.check_neutral(key, neutral)?,
            }
        }
        if !unknown.is_empty() {
            let path = self.file.path().display();
            log::warn!("{path}: settings without effect here: {}", unknown.join(", "));
        }
        Ok(())
    }

    fn check_neutral(&self, key: &str, neutral: f64) -> Result<()> {
        let value = self.file.get(key);
        let same = match value {
            Some(Value::Integer(n)) => *n as f64 == neutral,
            Some(Value::Float(x)) => *x == neutral || *x == 0.0,
            Some(Value::Bool(on)) => f64::from(u8::from(*on)) == neutral,
            _ => false,
        };
        if same {
            return Ok(());
        }
        let value = value.map_or_else(String::new, |v| format!(" = {v:?}"));
        Err(self.unsupported(format!("setting {key:?}{value}")))
    }
}
