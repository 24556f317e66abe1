//! Sources of weights: safetensors, PyTorch's `.pth`, or tensors in memory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::matrix::Matrix;
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor};
use longctx_checkpoint::{Pth, ReadTensors, map_safetensors, weight_files};
use longctx_core::{Error, Result};

/// The files of weights in order of preference.
pub(crate) const WEIGHTS: [&str; 3] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"];

/// How weights are loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// The device of the computation: the CPU or, with the feature `cuda`, a CUDA device.
    pub device: Device,
    /// The dtype of weight matrices: f32, f16 or bf16. Half precision decodes nearly twice as fast.
    /// On a CUDA device the inputs and outputs of matrix products have this dtype too. States,
    /// residual sums and weights that are not matrices are always f32.
    pub dtype: DType,
}

impl Default for LoadOptions {
    /// On the CPU, in f32.
    fn default() -> Self {
        Self { device: Device::Cpu, dtype: DType::F32 }
    }
}

/// Tensors by name.
pub struct Checkpoint {
    path: PathBuf,
    source: Source,
    dtype: DType,
    read: ReadTensors,
}

enum Source {
    Safetensors(MmapedSafetensors),
    Pickle(Pth),
    Memory(HashMap<String, Tensor>),
}

impl Checkpoint {
    /// Opens the weights in a folder: `model.safetensors` or else its shards, else
    /// `pytorch_model.bin`, else the only `.pth` or `.safetensors` file. Or opens a single file.
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        let files = files(path)?;
        let is_safetensors = |f: &PathBuf| f.extension().is_some_and(|e| e == "safetensors");
        let source = if files.iter().all(is_safetensors) {
            Source::Safetensors(map_safetensors(&files)?)
        } else {
            Source::Pickle(Pth::open(&files[0])?)
        };
        Self::new(path.into(), source, options)
    }

    /// Wraps tensors in memory.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, options: &LoadOptions) -> Result<Self> {
        Self::new("tensors in memory".into(), Source::Memory(tensors), options)
    }

    fn new(path: PathBuf, source: Source, options: &LoadOptions) -> Result<Self> {
        match options.dtype {
            dtype @ (DType::F32 | DType::F16 | DType::BF16) => {
                Ok(Self { path, source, dtype, read: ReadTensors::default() })
            }
            other => Err(Error::setting("dtype", "f32, f16 or bf16", other.as_str())),
        }
    }

    /// Returns the shape of a tensor, if it exists.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match &self.source {
            Source::Safetensors(files) => files.get(name).ok().map(|view| view.shape().to_vec()),
            Source::Pickle(file) => file.shape(name).map(<[usize]>::to_vec),
            Source::Memory(tensors) => tensors.get(name).map(|t| t.dims().to_vec()),
        }
    }

    /// Returns the shape of a tensor that the model needs.
    ///
    /// # Errors
    /// [`Error::File`] if it does not exist.
    pub fn required_shape(&self, name: &str) -> Result<Vec<usize>> {
        self.shape(name).ok_or_else(|| self.missing(&[name]))
    }

    /// Returns the dimensions of a matrix that the model needs. `expected` describes them in the
    /// error.
    ///
    /// # Errors
    /// [`Error::File`] if it does not exist; [`Error::Mismatch`] if it is not a matrix.
    pub fn matrix_dims(&self, name: &str, expected: &str) -> Result<[usize; 2]> {
        self.required_shape(name)?.try_into().map_err(|shape: Vec<usize>| {
            let what = format!("tensor {name:?} in {}", self.path.display());
            Error::mismatch(what, expected, format!("{shape:?}"))
        })
    }

    pub fn has(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// Returns the first of several names that exists, for families whose layouts name a tensor
    /// differently.
    pub fn first_of<'a>(&self, names: &[&'a str]) -> Result<&'a str> {
        names.iter().copied().find(|name| self.has(name)).ok_or_else(|| self.missing(names))
    }

    fn missing(&self, names: &[&str]) -> Error {
        let names: Vec<_> = names.iter().map(|name| format!("{name:?}")).collect();
        Error::file(&self.path, format!("there is no tensor {}", names.join(" or ")))
    }

    /// Returns a tensor in f32. Leading dimensions of 1 are ignored in the shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        Ok(self.get(name, shape)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// Returns a matrix `[out, inner]` in the requested dtype.
    pub fn matrix(&self, name: &str, out: usize, inner: usize) -> Result<Matrix> {
        self.in_dtype(&self.get(name, &[out, inner])?)
    }

    /// Returns a matrix that is stored transposed, `[inner, out]`.
    pub fn transposed(&self, name: &str, out: usize, inner: usize) -> Result<Matrix> {
        self.in_dtype(&self.get(name, &[inner, out])?.t()?)
    }

    /// Concatenates several matrices `[out, inner]` of one input into one.
    pub fn concat(&self, names: &[(String, usize)], inner: usize) -> Result<Matrix> {
        let load = |(name, out): &(String, usize)| self.get(name, &[*out, inner]);
        let matrices = names.iter().map(load).collect::<Result<Vec<_>>>()?;
        self.in_dtype(&Tensor::cat(&matrices, 0)?)
    }

    /// Converts a matrix made of this checkpoint's tensors to the requested dtype.
    pub fn in_dtype(&self, matrix: &Tensor) -> Result<Matrix> {
        Matrix::new(&matrix.to_dtype(self.dtype)?)
    }

    /// Compares the shape before any data is read.
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.read.insert(name);
        let dims = self.required_shape(name)?;
        let ones = dims.len().saturating_sub(shape.len());
        if dims[ones..] != *shape || dims[..ones].iter().any(|&d| d != 1) {
            let what = format!("tensor {name:?} in {}", self.path.display());
            return Err(Error::mismatch(what, format!("{shape:?}"), format!("{dims:?}")));
        }
        let tensor = match &self.source {
            Source::Safetensors(files) => files.load(name, &Device::Cpu)?,
            Source::Pickle(file) => file.tensor(name)?,
            Source::Memory(tensors) => tensors[name].clone(),
        };
        Ok(tensor.reshape(shape)?)
    }

    /// Checks that every tensor has been read.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming unread tensors that may change the model's output.
    pub fn check_all_read(&self) -> Result<()> {
        let names: Vec<String> = match &self.source {
            Source::Safetensors(files) => {
                files.tensors().into_iter().map(|(name, _)| name).collect()
            }
            Source::Pickle(file) => file.names().map(str::to_owned).collect(),
            Source::Memory(tensors) => tensors.keys().cloned().collect(),
        };
        self.read.check_all_read(&self.path, names.iter().map(String::as_str), is_without_effect)
    }
}

/// Returns whether a tensor has no effect: tables that are recomputed, and the tensors of RWKV-7's
/// first layer for mixing in the values of an earlier layer, which it does not have.
fn is_without_effect(name: &str) -> bool {
    let unused = ["blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"];
    name.ends_with("rotary_emb.inv_freq") || unused.contains(&name)
}

fn files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.into()]);
    }
    if let Some(files) = weight_files(path, &WEIGHTS)? {
        return Ok(files);
    }
    let entries = std::fs::read_dir(path).map_err(|e| Error::file(path, e))?;
    let entries: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    for end in ["pth", "safetensors"] {
        let has_end = |p: &&PathBuf| p.extension().is_some_and(|e| e == end);
        let found: Vec<_> = entries.iter().filter(has_end).cloned().collect();
        if found.len() == 1 {
            return Ok(found);
        }
    }
    let names = WEIGHTS.join(", ");
    let reason =
        format!("there is none of {names}, and not exactly one other .pth or .safetensors file");
    Err(Error::file(path, reason))
}
