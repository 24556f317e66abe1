//! Logits against `transformers`, on tiny random checkpoints and on a real model.
//! `fixtures/make.py` made the expected numbers.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use base_models::{Config, LoadOptions, Pretrained, Transformer};
use candle_core::{DType, Device, Tensor};
use longctx_core::{
    Batch, CausalLm, DenseCache, GenerateOptions, LayerSpec, Logits, Result, generate,
};

const TINY: [&str; 6] = ["llama", "llama-linear", "llama-3.1", "mistral", "qwen2", "qwen3"];
const TOLERANCE: f32 = 1e-4;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Feeds the tokens to sequence 0 in chunks of the given sizes and concatenates the logits of all
/// tokens. The last size repeats.
fn logits(model: &Transformer, tokens: &[u32], chunks: &[usize]) -> Tensor {
    let mut session = model.session(dense).unwrap();
    let mut parts = Vec::new();
    let mut sizes = chunks.iter().copied().chain(std::iter::repeat(chunks[chunks.len() - 1]));
    let mut rest = tokens;
    while !rest.is_empty() {
        let (part, after) = rest.split_at(sizes.next().unwrap().min(rest.len()));
        let batch = Batch::single(0, part.len()).unwrap();
        parts.push(session.forward(&batch, part, Logits::All).unwrap());
        rest = after;
    }
    Tensor::cat(&parts, 0).unwrap()
}

fn dense(layer: &LayerSpec) -> Result<DenseCache> {
    DenseCache::new(layer.clone(), DType::F32)
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn logits_equal_those_of_transformers() {
    for name in TINY {
        let folder = fixture(name);
        let model = Transformer::from_folder(&folder, &LoadOptions::default()).unwrap();
        let expected =
            candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu)
                .unwrap();
        // Rows of the fixture's batch are sequences of equal length.
        let rows = expected["tokens"].to_vec2::<u32>().unwrap();
        for (row, tokens) in rows.iter().enumerate() {
            let want = expected["logits"].get(row).unwrap();
            for chunks in [&[70][..], &[33, 1, 20], &[1]] {
                let error = distance(&logits(&model, tokens, chunks), &want);
                println!("{name}, row {row}, chunks {chunks:?}: max abs difference {error:e}");
                assert!(error <= TOLERANCE, "{name}, row {row}, chunks {chunks:?}: {error}");
            }
        }
    }
}

#[test]
fn window_is_read_from_the_configuration() {
    let config = Config::from_file(&fixture("mistral").join("config.json")).unwrap();
    assert_eq!(config.windows, [Some(16), Some(16)]);
    let config = Config::from_file(&fixture("qwen2").join("config.json")).unwrap();
    assert_eq!(config.windows, [None, None]);
}

/// Returns the path of a real model in the user's cache, or the one in an environment variable.
fn real(variable: &str, file: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from).or_else(|| {
        let home = PathBuf::from(std::env::var_os("HOME")?);
        Some(home.join(".cache/longctx").join(file))
    })?;
    if path.exists() {
        return Some(path);
    }
    println!(
        "skipped: no {}; `cargo run --release -p longctx -- compare --model gemma3` (or smollm2) \
         fetches it, or set {variable}",
        path.display()
    );
    None
}

fn smollm2() -> Option<PathBuf> {
    real("LONGCTX_SMOLLM2", "SmolLM2-135M-Instruct.Q4_1.gguf")
}

fn gemma3() -> Option<PathBuf> {
    real("LONGCTX_GEMMA3", "gemma-3-270m-q4_k_m.gguf")
}

/// Checks the greedy tokens after the prompt of a fixture, with weights packed or expanded.
fn check_continuation(path: &Path, fixture_name: &str, expand: bool) {
    let text = std::fs::read_to_string(fixture(fixture_name)).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |key: &str| serde_json::from_value::<Vec<u32>>(expected[key].clone()).unwrap();
    let options = LoadOptions { expand, ..Default::default() };
    let llm = Pretrained::from_gguf(path, &options).unwrap();
    let mut session = llm.model.session(dense).unwrap();
    let options = GenerateOptions { max_tokens: 64, ..Default::default() };
    let got = generate(&mut session, 0, &ids("prompt"), &options, |_| ControlFlow::Continue(()));
    assert_eq!(got.unwrap().tokens, ids("continuation"), "expand: {expand}");
}

#[test]
fn smollm2_continues_as_with_transformers() {
    let Some(path) = smollm2() else { return };
    for expand in [false, true] {
        check_continuation(&path, "smollm2-greedy.json", expand);
    }
}

#[test]
fn gemma3_continues_as_with_transformers() {
    let Some(path) = gemma3() else { return };
    for expand in [false, true] {
        check_continuation(&path, "gemma3-greedy.json", expand);
    }
}

#[test]
fn gemma3_tokenizes_as_its_own_tokenizer() {
    let Some(path) = gemma3() else { return };
    let text = std::fs::read_to_string(fixture("gemma3-greedy.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    let llm = Pretrained::from_gguf(&path, &LoadOptions::default()).unwrap();
    let prompt = "The history of the lighthouse begins long before";
    let ids: Vec<u32> = serde_json::from_value(expected["prompt"].clone()).unwrap();
    assert_eq!(llm.tokenizer.encode(prompt, true).unwrap(), ids);
}

#[test]
fn smollm2_tokenizes_as_its_own_tokenizer() {
    let Some(path) = smollm2() else { return };
    let llm = Pretrained::from_gguf(&path, &LoadOptions::default()).unwrap();
    // Each digit is a token, and no space is prepended.
    let tokens = llm.tokenizer.encode("key 2024", true).unwrap();
    let pieces: Vec<_> = tokens.iter().map(|&t| llm.tokenizer.token(t).unwrap()).collect();
    assert_eq!(pieces, ["key", "Ġ", "2", "0", "2", "4"]);
    assert_eq!(llm.tokenizer.decode(&tokens).unwrap(), "key 2024");
    let mut stream = llm.tokenizer.stream();
    let text = "naïve — 日本 🙂\nnext";
    let streamed: String = llm
        .tokenizer
        .encode(text, true)
        .unwrap()
        .into_iter()
        .map(|t| stream.push(t).unwrap())
        .collect();
    assert_eq!(streamed, text);
}
