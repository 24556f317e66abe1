//! Weights in 8-bit floats (E4M3) with separate scales.

use std::path::Path;

use candle_core::Tensor;
use longctx_checkpoint::files;
use longctx_core::{Error, Result};
use serde_json::Value;

/// The quantization settings of a checkpoint's `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fp8 {
    /// Rows and columns of a block that shares a scale.
    pub block: (usize, usize),
}

impl Default for Fp8 {
    fn default() -> Self {
        Self { block: (128, 128) }
    }
}

impl Fp8 {
    /// Reads the field `quantization_config` of a folder's `config.json`, if it exists.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the method, unless it uses 8-bit floats.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let Some(text) = files::read_text_if_present(&path)? else { return Ok(Self::default()) };
        let json: Value = serde_json::from_str(&text).map_err(|e| Error::file(&path, e))?;
        let config = match &json["quantization_config"] {
            Value::Null => &json["compression_config"],
            config => config,
        };
        if config.is_null() {
            return Ok(Self::default());
        }
        let method = config["quant_method"].as_str().unwrap_or("unnamed");
        let format = config["format"].as_str().unwrap_or("float-quantized");
        if method != "fp8" && (method, format) != ("compressed-tensors", "float-quantized") {
            let named = match method {
                "compressed-tensors" => format!("{method:?} of format {format:?}"),
                _ => format!("{method:?}"),
            };
            let known = "known: \"fp8\", \"compressed-tensors\" of format \"float-quantized\"";
            let what = format!("weights quantized by {named} ({known})");
            return Err(Error::Unsupported(format!("{}: {what}", path.display())));
        }
        Ok(block(config).map_or_else(Self::default, |block| Self { block }))
    }

    /// Multiplies a matrix `[out, in]` by its scales: one scale, one per row, or one per block.
    ///
    /// # Errors
    /// [`Error::Mismatch`] with the scales' shape if it is none of these.
    pub fn scale(&self, name: &str, weight: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let (out, inner) = weight.dims2()?;
        let (rows, columns) = self.block;
        let blocks = [out.div_ceil(rows), inner.div_ceil(columns)];
        let per_weight = match scale.dims() {
            [] | [1] | [1, 1] => scale.reshape((1, 1))?,
            [n] | [n, 1] if *n == out => scale.reshape((out, 1))?,
            dims if *dims == blocks => {
                let wide = scale
                    .reshape((blocks[0], 1, blocks[1], 1))?
                    .broadcast_as((blocks[0], rows, blocks[1], columns))?
                    .reshape((blocks[0] * rows, blocks[1] * columns))?;
                wide.narrow(0, 0, out)?.narrow(1, 0, inner)?
            }
            dims => {
                let expected = format!("[], [{out}, 1] or {blocks:?} scales");
                return Err(Error::mismatch(name, expected, format!("{dims:?}")));
            }
        };
        Ok(weight.broadcast_mul(&per_weight)?)
    }
}

/// Returns the block size, from either layout of the configuration.
fn block(config: &Value) -> Option<(usize, usize)> {
    let groups = config["config_groups"].as_object();
    let in_group = groups.and_then(|groups| {
        groups.values().find_map(|group| group["weights"]["block_structure"].as_array())
    });
    match config["weight_block_size"].as_array().or(in_group)?.as_slice() {
        [rows, columns] => {
            let size =
                |n: &Value| n.as_u64().filter(|n| (1..=65_536).contains(n)).map(|n| n as usize);
            Some((size(rows)?, size(columns)?))
        }
        _ => None,
    }
}
