//! Checkpoints of all architectures, as `fixtures/make_architectures.py` drew them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::Value;
use candle_core::{Device, Tensor};
use serde::Deserialize;

#[derive(Deserialize)]
pub struct Case {
    pub name: String,
    pub config: serde_json::Value,
    pub tokens: Vec<u32>,
    /// The checkpoint's tensors.
    pub shapes: BTreeMap<String, Vec<usize>>,
    pub gguf: Option<Gguf>,
}

/// What llama.cpp's converter makes of a checkpoint.
#[derive(Deserialize)]
pub struct Gguf {
    pub architecture: String,
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Its name of each tensor; experts share one.
    pub names: BTreeMap<String, String>,
    /// Factors of the rotary frequencies.
    pub factors: BTreeMap<String, Vec<f32>>,
    /// Whether it permutes the rows of the query and key projections.
    pub permuted: bool,
    /// Whether it adds 1 to the weights of norms.
    pub offset: bool,
}

/// All cases, with the logits that `transformers` gives.
pub fn cases() -> Vec<(Case, Tensor)> {
    let folder = super::fixture("architectures");
    let text = fs::read_to_string(folder.join("cases.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_str(&text).unwrap();
    let logits = folder.join("logits.safetensors");
    let mut logits = candle_core::safetensors::load(logits, &Device::Cpu).unwrap();
    cases
        .into_iter()
        .map(|case| {
            let logits = logits.remove(&case.name).unwrap();
            (case, logits)
        })
        .collect()
}

/// The numbers of a tensor: splitmix64 of the FNV-1a hash of its name and the number's index.
fn weights(case: &Case, name: &str, shape: &[usize]) -> Tensor {
    let hash = |seed: u64, byte: u8| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325, hash);
    // Gemma adds 1 itself.
    let gemma = case.config["model_type"].as_str().unwrap().starts_with("gemma");
    let middle = if name.contains("norm") && !gemma { 1.0 } else { 0.0 };
    let number = |i: u64| {
        let z = seed.wrapping_add((i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let unit = ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32;
        middle + (unit - 0.5) * 0.7
    };
    let count = shape.iter().product::<usize>() as u64;
    let numbers: Vec<f32> = (0..count).map(number).collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

/// Writes the checkpoint of a case.
pub fn write(case: &Case, folder: &Path) {
    fs::write(folder.join("config.json"), case.config.to_string()).unwrap();
    let tensors: HashMap<_, _> = case
        .shapes
        .iter()
        .map(|(name, shape)| (name.clone(), weights(case, name, shape)))
        .collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

/// Writes the GGUF file of a case.
pub fn write_gguf(case: &Case, gguf: &Gguf, folder: &Path) -> PathBuf {
    let mut experts: BTreeMap<&str, BTreeMap<usize, Tensor>> = BTreeMap::new();
    for (name, shape) in &case.shapes {
        let mut tensor = weights(case, name, shape);
        if gguf.offset && name.contains("norm") {
            tensor = (tensor + 1.0).unwrap();
        }
        let heads = match name.contains("q_proj") {
            true => &case.config["num_attention_heads"],
            false => &case.config["num_key_value_heads"],
        };
        if gguf.permuted && (name.contains("q_proj") || name.contains("k_proj")) {
            tensor = permuted(&tensor, heads.as_u64().unwrap() as usize);
        }
        // The number of an expert follows "experts."; other tensors are alone under their name.
        let number = name.split("experts.").nth(1).and_then(|rest| rest.split('.').next());
        let number = number.map_or(0, |number| number.parse().unwrap());
        experts.entry(&gguf.names[name]).or_default().insert(number, tensor);
    }
    let mut tensors: Vec<(&str, QTensor)> = Vec::new();
    for (name, parts) in &experts {
        let parts: Vec<_> = parts.values().collect();
        match parts.as_slice() {
            [one] => tensors.push((name, super::stored(one))),
            parts => tensors.push((name, super::stored(&Tensor::stack(parts, 0).unwrap()))),
        }
    }
    for (name, factors) in &gguf.factors {
        let factors = Tensor::new(factors.as_slice(), &Device::Cpu).unwrap();
        tensors.push((name, super::stored(&factors)));
    }
    let vocab = case.config["vocab_size"].as_u64().unwrap();
    let tokens: Vec<_> = (0..vocab).map(|i| format!("t{i}")).collect();
    let mut metadata = vec![
        ("general.architecture".into(), super::text(&gguf.architecture)),
        ("tokenizer.ggml.model".into(), super::text("gpt2")),
        ("tokenizer.ggml.pre".into(), super::text("gpt-2")),
        ("tokenizer.ggml.tokens".into(), super::texts(&tokens)),
        ("tokenizer.ggml.token_type".into(), super::integers(&vec![1; tokens.len()])),
        ("tokenizer.ggml.merges".into(), Value::Array(Vec::new())),
    ];
    for (key, value) in &gguf.metadata {
        let value = match value {
            serde_json::Value::String(s) => super::text(s),
            value => match value.as_u64() {
                Some(n) => Value::U32(n as u32),
                None => Value::F32(value.as_f64().unwrap() as f32),
            },
        };
        metadata.push((format!("{}.{key}", gguf.architecture), value));
    }
    let metadata: Vec<_> =
        metadata.iter().map(|(k, v): &(String, _)| (k.as_str(), v.clone())).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    super::write(folder, &metadata, &tensors)
}

/// Rows as llama.cpp has them: channels i and i + d/2 of a head lie side by side.
fn permuted(tensor: &Tensor, heads: usize) -> Tensor {
    let rows = tensor.dim(0).unwrap();
    let d = rows / heads;
    let order: Vec<u32> =
        (0..rows).map(|row| (row / d * d + row % d / 2 + row % 2 * (d / 2)) as u32).collect();
    tensor.index_select(&Tensor::new(order, &Device::Cpu).unwrap(), 0).unwrap()
}
