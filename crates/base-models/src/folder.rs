//! Checkpoints in Hugging Face's layout: a folder with `config.json` and one or more safetensors files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::linear::Weight;
use crate::weights::{LoadOptions, Weights};
use candle_core::Tensor;
use candle_core::safetensors::MmapedSafetensors;
use longctx_core::{Error, Result};
use serde_json::Value;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The safetensors files of a folder, memory-mapped.
pub(crate) struct Folder {
    path: PathBuf,
    files: MmapedSafetensors,
    options: LoadOptions,
}

impl Folder {
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        let shards = shards(path)?;
        for shard in &shards {
            // candle's own message for a missing file does not name it.
            std::fs::File::open(shard).map_err(|e| Error::file(shard, e))?;
        }
        // SAFETY: memory-mapping is sound as long as nobody changes the files while they are mapped: a checkpoint is written once,
        // and this is the documented condition of every loader that maps safetensors.
        #[allow(unsafe_code)]
        let files = unsafe { MmapedSafetensors::multi(&shards) };
        let files = files.map_err(|e| Error::file(path, e))?;
        Ok(Self { path: path.into(), files, options: options.clone() })
    }
}

impl Weights for Folder {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let view = self
            .files
            .get(name)
            .map_err(|_| Error::file(&self.path, format!("there is no tensor {name:?}")))?;
        if view.shape() != shape {
            let what = format!("tensor {name:?} in {}", self.path.display());
            return Err(Error::mismatch(what, format!("{shape:?}"), format!("{:?}", view.shape())));
        }
        Ok(self.files.load(name, &self.options.device)?.to_dtype(self.options.dtype)?)
    }

    fn matrix(&self, name: &str, out: usize, inner: usize) -> Result<Weight> {
        self.tensor(name, &[out, inner]).map(Weight::Dense)
    }

    fn has(&self, name: &str) -> bool {
        self.files.get(name).is_ok()
    }
}

/// The files that hold the weights: one, or those that an index names.
fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join(INDEX);
    if !index.exists() {
        let single = folder.join(SINGLE);
        if !single.exists() {
            return Err(Error::file(folder, format!("there is neither {SINGLE} nor {INDEX}")));
        }
        return Ok(vec![single]);
    }
    let names = shard_names(&index)?;
    Ok(names.iter().map(|name| folder.join(name)).collect())
}

/// The file names that an index refers to.
pub(crate) fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(index).map_err(|e| Error::file(index, e))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| Error::file(index, e))?;
    let map = json["weight_map"]
        .as_object()
        .ok_or_else(|| Error::file(index, "there is no object \"weight_map\""))?;
    map.iter()
        .map(|(tensor, file)| match file.as_str() {
            Some(file) => Ok(file.to_owned()),
            None => Err(Error::file(index, format!("the file of {tensor:?} is no string"))),
        })
        .collect()
}
