//! GGUF files with given metadata and tensors, and the logits of fixtures.
#![allow(dead_code)]

pub mod cases;

use std::fs::File;
use std::path::{Path, PathBuf};

use base_models::Transformer;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use longctx_core::{Batch, CausalLm, DenseCache, LayerSpec, Logits};

pub fn text(s: &str) -> Value {
    Value::String(s.into())
}

pub fn texts<S: AsRef<str>>(list: &[S]) -> Value {
    Value::Array(list.iter().map(|s| text(s.as_ref())).collect())
}

pub fn integers(list: &[i32]) -> Value {
    Value::Array(list.iter().map(|&n| Value::I32(n)).collect())
}

pub fn floats(list: &[f32]) -> Value {
    Value::Array(list.iter().map(|&x| Value::F32(x)).collect())
}

/// Writes `model.gguf`.
pub fn write(folder: &Path, metadata: &[(&str, Value)], tensors: &[(&str, &QTensor)]) -> PathBuf {
    let path = folder.join("model.gguf");
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    gguf_file::write(&mut File::create(&path).unwrap(), &metadata, tensors).unwrap();
    path
}

/// Converts a tensor to the form of GGUF files, in f32.
pub fn stored(tensor: &Tensor) -> QTensor {
    QTensor::quantize(&tensor.to_dtype(DType::F32).unwrap(), GgmlDType::F32).unwrap()
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Returns the largest difference between a model's logits and those in its fixture's
/// `expected.safetensors`.
pub fn error_of(model: &Transformer, folder: &Path) -> f32 {
    let path = folder.join("expected.safetensors");
    let expected = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let dense = |layer: &LayerSpec| DenseCache::new(layer.clone(), DType::F32);
    let mut session = model.session(dense).unwrap();
    let mut largest = 0f32;
    // Rows of the fixture's batch are sequences.
    for (row, tokens) in expected["tokens"].to_vec2::<u32>().unwrap().iter().enumerate() {
        let batch = Batch::single(row as u64, tokens.len()).unwrap();
        let got = session.forward(&batch, tokens, Logits::All).unwrap();
        let difference = (got - expected["logits"].get(row).unwrap()).unwrap().abs().unwrap();
        largest = largest.max(difference.max_all().unwrap().to_scalar().unwrap());
    }
    largest
}
