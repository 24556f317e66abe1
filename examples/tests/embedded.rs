//! Tests of the model in the repository: its logits equal PyTorch's, and it finds keys.

use std::fs;
use std::process::Command;

use base_models::{LoadOptions, Pretrained};
use candle_core::{DType, Device, Tensor};
use longctx_core::{Batch, CausalLm, DenseCache, Logits};
use longctx_examples::model;
use sha2::{Digest, Sha256};

#[test]
fn it_is_the_one_that_the_documentation_names() {
    let bytes = fs::read(model::embedded()).unwrap();
    assert!(bytes.len() <= 8_000_000, "{} bytes", bytes.len());
    let sum: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let readme = fs::read_to_string(model::embedded().with_file_name("README.md")).unwrap();
    assert!(readme.contains(&sum), "SHA-256 {sum} is not in examples/zoo/README.md");
}

/// `examples/zoo/fixture.py default` writes the expected logits, computed with dequantized weights.
#[test]
fn logits_are_those_of_the_model_that_was_trained() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/embedded.safetensors");
    let expected = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let path = model::embedded().display().to_string();
    let llm = Pretrained::open(&path, &LoadOptions::default()).unwrap();
    let text: Vec<u8> = expected["text"].to_vec1().unwrap();
    let tokens = llm.tokenizer.encode(std::str::from_utf8(&text).unwrap(), true).unwrap();
    let ids = expected["tokens"].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    assert_eq!(tokens, ids);

    let mut session = llm.model.session(|spec| DenseCache::new(spec.clone(), DType::F32)).unwrap();
    let batch = Batch::single(0, tokens.len()).unwrap();
    let logits = session.forward(&batch, &tokens, Logits::All).unwrap();
    let want: &Tensor = &expected["logits"];
    let last = want.dim(0).unwrap();
    let logits = logits.narrow(0, tokens.len() - last, last).unwrap();
    let off: f32 = (logits - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap();
    assert!(off <= 1e-4, "off by {off}");
}

#[test]
fn the_dense_cache_finds_every_key_and_a_window_does_not() {
    let out = tempfile::tempdir().unwrap();
    let deps = std::env::current_exe().unwrap();
    let program = deps.parent().unwrap().parent().unwrap().join("examples/compare");
    let output = Command::new(program)
        .args(["--methods", "streaming-llm-4x,dense-f16", "--words", "100,600", "--depths", "4"])
        .arg("--out")
        .arg(out.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let row = |name: &str| said.lines().position(|line| line.starts_with(name)).expect(name);
    assert!(said.contains("8 of 8"), "{said}");
    // The dense method runs first, because the other's ratio needs it.
    assert!(row("dense-f16") < row("streaming-llm-4x"), "{said}");
    let saved = fs::read_to_string(out.path().join("compare.json")).unwrap();
    let rows: serde_json::Value = serde_json::from_str(&saved).unwrap();
    assert_eq!(rows[0]["exact"], 8.0);
    assert!(rows[1]["exact"].as_f64().unwrap() < 8.0, "{saved}");
    assert!(rows[1]["ratio"].as_f64().unwrap() > 1.5, "{saved}");
}
