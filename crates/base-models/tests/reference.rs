//! Logits against `transformers`, on tiny random checkpoints and on a real model. `fixtures/make.py` made the numbers.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use base_models::{Config, LoadOptions, Pretrained, Transformer};
use candle_core::{DType, Device, Tensor};
use longctx_core::{CausalLm, DenseCache, GenerateOptions, Logits, generate};

const TINY: [&str; 6] = ["llama", "llama-linear", "llama-3.1", "mistral", "qwen2", "qwen3"];
const TOLERANCE: f32 = 1e-4;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Feeds the tokens in chunks of the given sizes, the last of which repeats, and joins the logits of all tokens.
fn logits(model: &Transformer, tokens: &Tensor, chunks: &[usize]) -> Tensor {
    let mut session = model.session(|l| DenseCache::new(l.attention, DType::F32)).unwrap();
    let mut parts = Vec::new();
    let mut sizes = chunks.iter().copied().chain(std::iter::repeat(chunks[chunks.len() - 1]));
    let total = tokens.dim(1).unwrap();
    while session.seen() < total {
        let size = sizes.next().unwrap().min(total - session.seen());
        let part = tokens.narrow(1, session.seen(), size).unwrap();
        parts.push(session.forward(&part, Logits::All).unwrap());
    }
    Tensor::cat(&parts, 1).unwrap()
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
        let (tokens, want) = (&expected["tokens"], &expected["logits"]);
        for chunks in [&[70][..], &[33, 1, 20], &[1]] {
            let error = distance(&logits(&model, tokens, chunks), want);
            println!("{name}, chunks {chunks:?}: max abs difference {error:e}");
            assert!(error <= TOLERANCE, "{name}, chunks {chunks:?}: {error}");
        }
    }
}

#[test]
fn the_last_tokens_logits_are_the_last_of_all() {
    let model = Transformer::from_folder(&fixture("llama"), &LoadOptions::default()).unwrap();
    let tokens = Tensor::arange(0u32, 20, &Device::Cpu).unwrap().reshape((2, 10)).unwrap();
    let all = logits(&model, &tokens, &[10]);
    let mut session = model.session(|l| DenseCache::new(l.attention, DType::F32)).unwrap();
    let last = session.forward(&tokens, Logits::Last).unwrap();
    assert_eq!(last.dims(), [2, 1, 96]);
    assert!(distance(&last, &all.narrow(1, 9, 1).unwrap()) < 1e-5);
}

#[test]
fn a_rewound_session_goes_on_from_there() {
    let model = Transformer::from_folder(&fixture("llama"), &LoadOptions::default()).unwrap();
    let session = || model.session(|layer| DenseCache::new(layer.attention, DType::F32)).unwrap();
    let tokens = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let mut rewound = session();
    rewound.forward(&tokens(&[1, 2, 3, 4, 5]), Logits::Last).unwrap();
    assert!(rewound.rewind(2).unwrap());
    assert_eq!(rewound.seen(), 2);
    let again = rewound.forward(&tokens(&[7, 8]), Logits::Last).unwrap();
    let expected = session().forward(&tokens(&[1, 2, 7, 8]), Logits::Last).unwrap();
    assert!(distance(&again, &expected) < 1e-5);
    assert!(rewound.rewind(9).is_err());
}

#[test]
fn window_is_read_from_the_configuration() {
    let config = Config::from_file(&fixture("mistral").join("config.json")).unwrap();
    assert_eq!(config.windows, [Some(16), Some(16)]);
    let config = Config::from_file(&fixture("qwen2").join("config.json")).unwrap();
    assert_eq!(config.windows, [None, None]);
}

fn smollm2() -> Option<PathBuf> {
    let path = std::env::var_os("LONGCTX_SMOLLM2").map(PathBuf::from).or_else(|| {
        let home = PathBuf::from(std::env::var_os("HOME")?);
        Some(home.join(".cache/longctx/SmolLM2-135M-Instruct.Q4_1.gguf"))
    })?;
    if path.exists() {
        return Some(path);
    }
    println!(
        "skipped: no SmolLM2 at {}; `cargo run --release --example compare` fetches it, or set LONGCTX_SMOLLM2",
        path.display()
    );
    None
}

#[test]
fn smollm2_continues_as_with_transformers() {
    let Some(path) = smollm2() else { return };
    let text = std::fs::read_to_string(fixture("smollm2-greedy.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |key: &str| serde_json::from_value::<Vec<u32>>(expected[key].clone()).unwrap();
    for expand in [false, true] {
        let options = LoadOptions { expand, ..Default::default() };
        let llm = Pretrained::from_gguf(&path, &options).unwrap();
        let mut session = llm.model.session(|l| DenseCache::new(l.attention, DType::F32)).unwrap();
        let options = GenerateOptions { max_tokens: 64, ..Default::default() };
        let got = generate(&mut session, &ids("prompt"), &options, |_| ControlFlow::Continue(()));
        assert_eq!(got.unwrap().tokens, ids("continuation"), "expand: {expand}");
    }
}

#[test]
fn smollm2_cuts_text_as_its_own_tokenizer_does() {
    let Some(path) = smollm2() else { return };
    let llm = Pretrained::from_gguf(&path, &LoadOptions::default()).unwrap();
    // Each digit is a token, and no space is put in front.
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
