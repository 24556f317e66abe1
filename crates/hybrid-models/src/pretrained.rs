//! Loading of models and tokenizers.

use std::collections::HashMap;
use std::path::Path;

use crate::checkpoint::{Checkpoint, LoadOptions};
use crate::host_model::HostModel;
use crate::mamba_lm;
use crate::model::Model;
use crate::tokenizer::Tokenizer;
use crate::{recurrent_gemma, rwkv, stack};
use candle_core::Tensor;
use longctx_core::{Error, Result};
use serde_json::Value;

/// A model and its tokenizer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Pretrained {
    /// The weights.
    pub model: Model,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
}

impl Pretrained {
    /// Opens the folder `name` or else, from the Hugging Face Hub, the model `name`
    /// ("state-spaces/mamba-130m-hf"). Downloads go to the Hub's usual cache.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder); [`Error::File`] naming a file that cannot be
    /// downloaded.
    pub fn open(name: &str, options: &LoadOptions) -> Result<Self> {
        let path = Path::new(name);
        if path.is_dir() {
            return Self::from_folder(path, options);
        }
        #[cfg(feature = "hub")]
        return Self::from_folder(&crate::hub::download(name)?, options);
        #[cfg(not(feature = "hub"))]
        Err(Error::Unsupported(format!(
            "{name}: no such folder, and no feature `hub` to download it"
        )))
    }

    /// Loads a folder as [`Model::from_folder`] does, with `tokenizer.json` or RWKV's World
    /// vocabulary.
    ///
    /// # Errors
    /// As [`Model::from_folder`] and [`Tokenizer::from_folder`].
    pub fn from_folder(folder: &Path, options: &LoadOptions) -> Result<Self> {
        let model = Model::from_folder(folder, options)?;
        Ok(Self { model, tokenizer: Tokenizer::from_folder(folder)? })
    }
}

impl Model {
    /// Loads a folder with `config.json` (if the family has one) and the weights:
    /// `model.safetensors` or its shards, `pytorch_model.bin`, or one `.pth` file. A tokenizer is
    /// not needed. Safetensors files are memory-mapped, so they must not be modified during the
    /// call.
    ///
    /// # Errors
    /// - [`Error::File`] naming a missing or invalid file, or a missing tensor.
    /// - [`Error::Mismatch`] naming a tensor of another shape.
    /// - [`Error::Unsupported`] for another architecture, and naming settings and tensors that
    ///   change the model's output and are not implemented.
    pub fn from_folder(folder: &Path, options: &LoadOptions) -> Result<Self> {
        let path = folder.join("config.json");
        let config = match path.exists() || !folder.exists() {
            true => {
                let text = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
                parse(&text).map_err(|e| Error::file(&path, e))?
            }
            false => Value::Null,
        };
        Model::new(load(&config, &Checkpoint::open(folder, options)?)?, &options.device)
    }

    /// Builds a model from tensors in memory, named as in the family's checkpoints, and the text of
    /// its `config.json`, if the family has one.
    ///
    /// # Errors
    /// As [`from_folder`](Self::from_folder).
    pub fn from_tensors(
        config: Option<&str>,
        tensors: HashMap<String, Tensor>,
        options: &LoadOptions,
    ) -> Result<Self> {
        let config = config.map_or(Ok(Value::Null), parse);
        let config = config.map_err(|e| Error::file("config.json", e))?;
        Model::new(load(&config, &Checkpoint::from_tensors(tensors, options)?)?, &options.device)
    }
}

/// Python writes infinity as a bare word, which is not valid JSON; it is read as null.
fn parse(config: &str) -> serde_json::Result<Value> {
    let outside_strings = |(i, part): (usize, &str)| match i % 2 {
        0 => part.replace("Infinity", "null"),
        _ => part.to_owned(),
    };
    let parts: Vec<_> = config.split('"').enumerate().map(outside_strings).collect();
    serde_json::from_str(&parts.join("\""))
}

fn load(config: &Value, w: &Checkpoint) -> Result<HostModel> {
    let host = read(config, w)?;
    w.check_all_read()?;
    Ok(host)
}

fn read(config: &Value, w: &Checkpoint) -> Result<HostModel> {
    match config["model_type"].as_str() {
        Some("mamba") => mamba_lm::load(config, w),
        Some("mamba2") => mamba_lm::load2(config, w),
        Some("recurrent_gemma") => recurrent_gemma::load(config, w),
        Some("rwkv" | "rwkv5" | "rwkv6") => rwkv::load(config, w),
        Some("hybrid") => stack::load(config, w),
        None if rwkv::is_rwkv(w) => rwkv::load(config, w),
        // The authors' layout names no family.
        None if mamba_lm::is_mamba2(config) => mamba_lm::load2(config, w),
        None if config.get("d_model").is_some() => mamba_lm::load(config, w),
        other => {
            let known = "mamba, mamba2, recurrent_gemma, rwkv, hybrid";
            let got = other.unwrap_or("none named, and not RWKV's tensors");
            Err(Error::Unsupported(format!("architecture {got:?} (known: {known})")))
        }
    }
}
