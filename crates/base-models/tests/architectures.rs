//! Logits of every architecture and rotary scaling against `transformers`, for random
//! configurations. `fixtures/make_architectures.py` made them.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use base_models::{LoadOptions, Transformer};
use candle_core::{Device, Tensor};
use longctx_core::{Batch, CausalLm, DenseCache, LayerSpec, Logits};
use serde::Deserialize;

const TOLERANCE: f32 = 1e-4;

#[derive(Deserialize)]
struct Case {
    name: String,
    config: serde_json::Value,
    tokens: Vec<u32>,
    /// The checkpoint's tensors.
    shapes: BTreeMap<String, Vec<usize>>,
}

fn cases() -> Vec<(Case, Tensor)> {
    let folder = common::fixture("architectures");
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
fn weights(name: &str, shape: &[usize]) -> Tensor {
    let hash = |seed: u64, byte: u8| (seed ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325, hash);
    let middle = if name.contains("norm") { 1.0 } else { 0.0 };
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
fn write(case: &Case, folder: &Path) {
    fs::write(folder.join("config.json"), case.config.to_string()).unwrap();
    let tensors: HashMap<_, _> =
        case.shapes.iter().map(|(name, shape)| (name.clone(), weights(name, shape))).collect();
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors")).unwrap();
}

fn open(case: &Case) -> Transformer {
    let folder = tempfile::tempdir().unwrap();
    write(case, folder.path());
    let options = LoadOptions { context_length: Some(case.tokens.len()), ..LoadOptions::default() };
    Transformer::from_folder(folder.path(), &options)
        .unwrap_or_else(|e| panic!("{}: {e}", case.name))
}

fn dense(layer: &LayerSpec) -> longctx_core::Result<DenseCache> {
    DenseCache::new(layer.clone(), candle_core::DType::F32)
}

/// Logits of tokens that come in chunks, the last of which repeats.
fn in_chunks(model: &Transformer, tokens: &[u32], chunks: &[usize]) -> Tensor {
    let mut session = model.session(dense).unwrap();
    let mut sizes = chunks.iter().copied().chain(std::iter::repeat(chunks[chunks.len() - 1]));
    let (mut rest, mut parts) = (tokens, Vec::new());
    while !rest.is_empty() {
        let (part, after) = rest.split_at(sizes.next().unwrap().min(rest.len()));
        let batch = Batch::single(0, part.len()).unwrap();
        parts.push(session.forward(&batch, part, Logits::All).unwrap());
        rest = after;
    }
    Tensor::cat(&parts, 0).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn logits_equal_those_of_transformers() {
    let mut failed = Vec::new();
    for (case, expected) in cases() {
        let model = open(&case);
        let mut largest = 0f32;
        for chunks in [&[60][..], &[23, 1, 17], &[1]] {
            largest = largest.max(distance(&in_chunks(&model, &case.tokens, chunks), &expected));
        }
        println!("{}: largest difference {largest:e}", case.name);
        if largest.is_nan() || largest > TOLERANCE {
            failed.push((case.name, largest));
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

/// A batch of prefixes of a prompt, and one more token for each.
#[test]
fn sequences_of_unequal_length_have_the_logits_of_their_prompts() {
    for (case, expected) in cases() {
        let mut session = open(&case).session(dense).unwrap();
        let lens = [31, 59, 2];
        let prompts: Vec<_> = lens.iter().flat_map(|&len| &case.tokens[..len]).copied().collect();
        let batch = Batch::new(&[(7, lens[0]), (8, lens[1]), (9, lens[2])]).unwrap();
        let rows = |ends: [usize; 3]| {
            let ends = Tensor::new(&ends.map(|end| end as u32 - 1), &Device::Cpu).unwrap();
            expected.index_select(&ends, 0).unwrap()
        };
        let got = session.forward(&batch, &prompts, Logits::Last).unwrap();
        assert!(distance(&got, &rows(lens)) < TOLERANCE, "{}", case.name);
        let batch = Batch::decode(&[9, 8, 7]).unwrap();
        let next = [case.tokens[2], case.tokens[59], case.tokens[31]];
        let got = session.forward(&batch, &next, Logits::Last).unwrap();
        assert!(distance(&got, &rows([3, 60, 32])) < TOLERANCE, "{}", case.name);
    }
}

/// Frequencies that were made for a length are not used past it.
#[test]
fn sequences_beyond_the_length_that_a_scaling_was_made_for_are_refused() {
    let (case, _) = cases().into_iter().find(|(case, _)| case.name == "dynamic-rope-1").unwrap();
    let mut session = open(&case).session(dense).unwrap();
    session.forward(&Batch::single(0, 60).unwrap(), &case.tokens, Logits::Last).unwrap();
    let limit = session
        .model()
        .config()
        .context_length
        .max(case.config["max_position_embeddings"].as_u64().unwrap() as usize);
    let more = vec![1; limit - 60 + 1];
    let batch = Batch::single(0, more.len()).unwrap();
    let message = session.forward(&batch, &more, Logits::Last).unwrap_err().to_string();
    assert!(message.contains(&format!("at most the {limit}")), "{message}");
}
