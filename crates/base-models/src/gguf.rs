//! Models in GGUF files (llama.cpp's format): weights, configuration, tokenizer, chat template.

use std::path::Path;

use crate::architectures::{self, Architecture};
use crate::config::Config;
use crate::gguf_file::GgufFile;
use crate::gguf_settings::Settings;
use crate::gguf_tokenizer;
use crate::linear::Weight;
use crate::names::Names;
use crate::quantized::QuantizedMatrix;
use crate::rope_settings::RopeSettings;
use crate::weights::{LoadOptions, Weights};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use longctx_checkpoint::ReadTensors;
use longctx_core::{Error, Result};

/// Tensors that are computed from the settings.
const WITHOUT_EFFECT: [&str; 1] = ["attn_rot_embd"];

/// A model in an open GGUF file.
pub(crate) struct Gguf {
    file: GgufFile,
    options: LoadOptions,
    read: ReadTensors,
    architecture: &'static Architecture,
}

impl Gguf {
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let missing = || Error::file(path, "there is no metadata \"general.architecture\"");
        let name = file.text("general.architecture")?.ok_or_else(missing)?;
        let architecture = architectures::of_gguf(name)?;
        Ok(Self { file, options: options.clone(), read: ReadTensors::default(), architecture })
    }

    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// Reads the model's shape from the file's metadata.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a setting that changes the model's output and is not implemented.
    pub fn config(&self) -> Result<Config> {
        let settings = Settings::new(&self.file, self.architecture.name);
        settings.check(self.architecture.gguf_settings)?;
        let mut config = self.read_common(&settings)?;
        // Settings per layer are allocated next, so the number of layers is checked first.
        config.check()?;
        (self.architecture.read_gguf)(&settings, &mut config)?;
        config.check()?;
        Ok(config)
    }

    /// Reads the settings of all architectures.
    fn read_common(&self, file: &Settings) -> Result<Config> {
        let names = self.names();
        let heads = file.need_number("attention.head_count")?;
        let hidden_size = file.need_number("embedding_length")?;
        let head_dim = match file.number("attention.key_length")? {
            Some(d) => d,
            None => hidden_size / heads.max(1),
        };
        let name = "attention.value_length";
        if let Some(other) = file.number(name)?.filter(|&d| d != head_dim) {
            return Err(file.refuse(name, format!("{other}, with heads of {head_dim}")));
        }
        let eps = "attention.layer_norm_rms_epsilon";
        let context_length = file.need_number("context_length")?;
        let embedding = self.info(&format!("{}.weight", names.embedding))?;
        let biased = |parts: &[&str]| {
            parts.iter().any(|part| self.has(&format!("{}.0.{part}.bias", names.layers)))
        };
        Ok(Config {
            family: self.architecture.name.to_owned(),
            vocab_size: embedding.first().copied().unwrap_or(0),
            hidden_size,
            intermediate_size: file.need_number("feed_forward_length")?,
            layers: file.need_number("block_count")?,
            heads,
            kv_heads: file.number("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            norm_eps: file.float(eps)?.ok_or_else(|| file.missing(eps))?,
            rope: self.rope(file, head_dim, context_length)?,
            context_length,
            qkv_bias: biased(&[names.query, names.key, names.value, names.query_key_value]),
            out_bias: biased(&[names.out]),
            mlp_bias: biased(&[names.gate, names.up, names.down]),
            tied_embeddings: !self.has(&format!("{}.weight", names.head)),
            bos: gguf_tokenizer::token_id(&self.file, "bos_token_id")?,
            eos: gguf_tokenizer::end_tokens(&self.file)?,
            ..Config::default()
        })
    }

    fn rope(&self, file: &Settings, head_dim: usize, context: usize) -> Result<RopeSettings> {
        let rope = RopeSettings::read_gguf(file, head_dim, context)?;
        let name = "rope.dimension_count";
        if rope.rotary_dims != head_dim && !self.architecture.defaults.partial_rotary {
            let what = format!("{}, with heads of {head_dim}", rope.rotary_dims);
            return Err(file.refuse(name, what));
        }
        let pairs = rope.rotary_dims / 2;
        let [short, long] = ["short", "long"].map(|kind| format!("rope_factors_{kind}.weight"));
        match self.has(&short) || self.has(&long) {
            true => {
                let (short, long) = (self.numbers(&short, pairs)?, self.numbers(&long, pairs)?);
                rope.with_long_rope(file, context, short, long)
            }
            false if file.text("rope.scaling.type")? == Some("longrope") => {
                Err(file.unsupported("rope scaling \"longrope\" without its factors' tensors"))
            }
            false => Ok(rope),
        }
    }

    /// Reads a vector.
    fn numbers(&self, name: &str, len: usize) -> Result<Vec<f64>> {
        let tensor = self.read(name, &[len], &Device::Cpu)?.dequantize(&Device::Cpu)?;
        Ok(tensor.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
    }

    fn info(&self, name: &str) -> Result<&[usize]> {
        let missing = || Error::file(self.file.path(), format!("there is no tensor {name:?}"));
        Ok(self.file.info(name).ok_or_else(missing)?.dims.as_slice())
    }

    fn read(&self, name: &str, shape: &[usize], device: &Device) -> Result<QTensor> {
        let got = self.info(name)?;
        if got != shape {
            let what = format!("tensor {name:?} in {}", self.file.path().display());
            return Err(Error::mismatch(what, format!("{shape:?}"), format!("{got:?}")));
        }
        self.read.insert(name);
        self.file.read(name, device)
    }

    /// Returns the head size of a projection with interleaved rows.
    fn interleaved_head(&self, name: &str) -> Result<Option<usize>> {
        if !self.architecture.gguf_interleaved {
            return Ok(None);
        }
        let file = Settings::new(&self.file, self.architecture.name);
        let rows = self.info(name)?.first().copied().unwrap_or(0);
        let heads = file.need_number("attention.head_count")?;
        let part = |part: &str| name.contains(&format!(".{part}."));
        let heads = if part(self.names().query) {
            heads
        } else if part(self.names().key) {
            file.number("attention.head_count_kv")?.unwrap_or(heads)
        } else {
            return Ok(None);
        };
        Ok(Some(rows / heads.max(1)))
    }

    /// Converts a matrix to the form that the options select: packed or expanded.
    fn hold(&self, matrix: &QuantizedMatrix) -> Result<Weight> {
        let float = matches!(matrix.dtype(), GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        if self.options.expand || float {
            let dense = matrix.expand()?.to_dtype(self.options.dtype)?;
            return Ok(Weight::Dense(dense.to_device(&self.options.device)?));
        }
        Ok(Weight::Quantized(matrix.to_device(&self.options.device)?))
    }
}

/// Returns the row of llama.cpp's matrix that is row `row` of the model's. llama.cpp rotates
/// channel 2i with 2i+1; the model, like Hugging Face, channel i with i + d/2.
fn interleaved_row(row: usize, d: usize) -> usize {
    let (head, channel) = (row / d, row % d);
    head * d + 2 * (channel % (d / 2)) + channel / (d / 2)
}

impl Weights for Gguf {
    fn options(&self) -> &LoadOptions {
        &self.options
    }

    fn names(&self) -> &Names {
        &self.architecture.gguf_names
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.read(name, shape, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        let tensor = match self.interleaved_head(name)? {
            None => tensor,
            Some(d) => {
                let rows: Vec<_> = (0..shape[0]).map(|i| interleaved_row(i, d) as u32).collect();
                tensor.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?
            }
        };
        Ok(tensor.to_dtype(self.options.dtype)?.to_device(&self.options.device)?)
    }

    fn matrix(&self, name: &str, out: usize, inner: usize) -> Result<Weight> {
        // Rows are reordered on the CPU, where their bytes are accessible.
        let tensor = self.read(name, &[out, inner], &Device::Cpu)?;
        let mut matrix = QuantizedMatrix::new(name, tensor)?;
        if let Some(d) = self.interleaved_head(name)? {
            matrix = matrix.reorder(|row| interleaved_row(row, d))?;
        }
        self.hold(&matrix)
    }

    /// One tensor holds the matrices of all experts.
    fn experts(&self, name: &str, count: usize, out: usize, inner: usize) -> Result<Vec<Weight>> {
        let name = format!("{name}.weight");
        let tensor = self.read(&name, &[count, out, inner], &Device::Cpu)?;
        let matrices = QuantizedMatrix::split(&name, &tensor)?;
        matrices.iter().map(|matrix| self.hold(matrix)).collect()
    }

    fn has(&self, name: &str) -> bool {
        self.file.info(name).is_some()
    }

    fn rope_factors(&self) -> Result<Option<Vec<f64>>> {
        let name = "rope_freqs.weight";
        match self.file.info(name).map(|info| info.dims.iter().product()) {
            Some(len) => self.numbers(name, len).map(Some),
            None => Ok(None),
        }
    }

    fn finish(&self) -> Result<()> {
        let without_effect = |name: &str| WITHOUT_EFFECT.iter().any(|part| name.contains(part));
        self.read.check_all_read(self.file.path(), self.file.tensor_names(), without_effect)
    }
}
