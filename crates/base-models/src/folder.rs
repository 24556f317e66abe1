//! Checkpoints in Hugging Face format: a folder with `config.json` and weights in safetensors or
//! PyTorch files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::fp8::Fp8;
use crate::linear::Weight;
use crate::names::Names;
use crate::weights::{LoadOptions, Weights};
use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Tensor};
use longctx_checkpoint::{Pth, ReadTensors, map_safetensors, weight_files};
use longctx_core::{Error, Result};
use safetensors::Dtype;

/// The files of weights in order of preference.
pub(crate) const WEIGHTS: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// Tensors without effect: they are computed from the settings, or concern the quantization of
/// activations and caches, which are in full precision here.
const WITHOUT_EFFECT: [&str; 7] = [
    "rotary_emb.inv_freq",
    "self_attn.rotary_emb",
    ".input_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".output_scale",
];

/// The weights of a folder.
pub(crate) struct FolderWeights {
    path: PathBuf,
    source: Source,
    fp8: Fp8,
    read: ReadTensors,
    options: LoadOptions,
    names: &'static Names,
}

enum Source {
    /// Memory-mapped.
    Safetensors(MmapedSafetensors),
    /// The files, and the file index of each tensor.
    Torch(Vec<Pth>, BTreeMap<String, usize>),
}

impl FolderWeights {
    /// Opens the weights of an architecture whose tensors have these names.
    pub fn open(path: &Path, names: &'static Names, options: &LoadOptions) -> Result<Self> {
        let fp8 = Fp8::from_folder(path)?;
        let files = weight_files(path, &WEIGHTS)?
            .ok_or_else(|| Error::file(path, format!("there is none of {}", WEIGHTS.join(", "))))?;
        let safetensors = files.iter().all(|f| f.extension().is_some_and(|e| e == "safetensors"));
        let source = match safetensors {
            true => Source::Safetensors(map_safetensors(&files)?),
            false => {
                let files: Vec<_> =
                    files.iter().map(|file| Pth::open(file)).collect::<Result<_>>()?;
                let mut file_of = BTreeMap::new();
                for (i, file) in files.iter().enumerate() {
                    file_of.extend(file.names().map(|name| (name.to_owned(), i)));
                }
                Source::Torch(files, file_of)
            }
        };
        let read = ReadTensors::default();
        Ok(Self { path: path.into(), source, fp8, read, options: options.clone(), names })
    }

    fn tensor_names(&self) -> Vec<String> {
        match &self.source {
            Source::Safetensors(files) => {
                files.tensors().into_iter().map(|(name, _)| name).collect()
            }
            Source::Torch(_, file_of) => file_of.keys().cloned().collect(),
        }
    }

    fn dims(&self, name: &str) -> Option<Vec<usize>> {
        match &self.source {
            Source::Safetensors(files) => files.get(name).ok().map(|view| view.shape().to_vec()),
            Source::Torch(files, file_of) => {
                files[*file_of.get(name)?].shape(name).map(<[_]>::to_vec)
            }
        }
    }

    /// Reads a tensor on the CPU in f32 or as stored; 8-bit floats without their scales.
    fn numbers(&self, name: &str) -> Result<Tensor> {
        match &self.source {
            Source::Torch(files, file_of) => {
                let tensor = files[file_of[name]].tensor(name)?;
                match tensor.dtype().is_float() {
                    true => Ok(tensor),
                    false => {
                        let what = format!("tensor {name:?} of type {:?}", tensor.dtype());
                        Err(Error::Unsupported(format!("{}: {what}", self.path.display())))
                    }
                }
            }
            Source::Safetensors(files) => {
                let dtype = files.get(name)?.dtype();
                match dtype {
                    Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16 => {}
                    Dtype::F8_E4M3 => {}
                    other => {
                        let what = format!("tensor {name:?} of type {other:?}");
                        return Err(Error::Unsupported(format!("{}: {what}", self.path.display())));
                    }
                }
                let tensor = files.load(name, &candle_core::Device::Cpu)?;
                match dtype {
                    Dtype::F8_E4M3 => Ok(tensor.to_dtype(DType::F32)?),
                    _ => Ok(tensor),
                }
            }
        }
    }

    fn is_fp8(&self, name: &str) -> bool {
        match &self.source {
            Source::Safetensors(files) => {
                files.get(name).is_ok_and(|view| view.dtype() == Dtype::F8_E4M3)
            }
            Source::Torch(..) => false,
        }
    }

    /// Reads the scales of a weight in 8-bit floats.
    fn scales(&self, name: &str) -> Result<Tensor> {
        let candidates = [format!("{name}_scale_inv"), format!("{name}_scale")];
        match candidates.iter().find(|scale| self.dims(scale).is_some()) {
            Some(scale) => {
                self.read.insert(scale);
                Ok(self.numbers(scale)?.to_dtype(DType::F32)?)
            }
            None => {
                let reason = format!("tensor {name:?} is of type F8_E4M3, and there is no");
                Err(Error::file(&self.path, format!("{reason} {}", candidates.join(" or "))))
            }
        }
    }

    fn missing(&self, name: &str) -> Error {
        let packed = name.strip_suffix(".weight").unwrap_or(name);
        for part in ["qweight", "weight_packed"] {
            if self.dims(&format!("{packed}.{part}")).is_some() {
                let what =
                    format!("packed weights (GPTQ, AWQ or similar): tensor \"{packed}.{part}\"");
                return Error::Unsupported(format!("{}: {what}", self.path.display()));
            }
        }
        Error::file(&self.path, format!("there is no tensor {name:?}"))
    }

    /// Returns whether two tensors have the same shape and data.
    fn same(&self, a: &str, b: &str) -> Result<bool> {
        if self.dims(a) != self.dims(b) {
            return Ok(false);
        }
        if let Source::Safetensors(files) = &self.source {
            return Ok(files.get(a)?.data() == files.get(b)?.data());
        }
        let bits = |name| -> Result<Vec<u32>> {
            let numbers = self.numbers(name)?.to_dtype(DType::F32)?.flatten_all()?;
            Ok(numbers.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
        };
        Ok(bits(a)? == bits(b)?)
    }
}

impl Weights for FolderWeights {
    fn options(&self) -> &LoadOptions {
        &self.options
    }

    fn names(&self) -> &Names {
        self.names
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let dims = self.dims(name).ok_or_else(|| self.missing(name))?;
        if dims != shape {
            let what = format!("tensor {name:?} in {}", self.path.display());
            return Err(Error::mismatch(what, format!("{shape:?}"), format!("{dims:?}")));
        }
        self.read.insert(name);
        let mut tensor = self.numbers(name)?;
        if self.is_fp8(name) {
            tensor = self.fp8.scale(name, &tensor, &self.scales(name)?)?;
        }
        Ok(tensor.to_dtype(self.options.dtype)?.to_device(&self.options.device)?)
    }

    fn matrix(&self, name: &str, out: usize, inner: usize) -> Result<Weight> {
        self.tensor(name, &[out, inner]).map(Weight::Dense)
    }

    fn has(&self, name: &str) -> bool {
        self.dims(name).is_some()
    }

    fn finish(&self) -> Result<()> {
        let names = self.tensor_names();
        // Some checkpoints store the matrix of tied embeddings twice.
        let (embedding, head) = ("model.embed_tokens.weight", "lm_head.weight");
        let twice = self.has(head) && self.has(embedding) && self.same(embedding, head)?;
        let without_effect = |name: &str| {
            (twice && name == head) || WITHOUT_EFFECT.iter().any(|part| name.contains(part))
        };
        self.read.check_all_read(&self.path, names.iter().map(String::as_str), without_effect)
    }
}
