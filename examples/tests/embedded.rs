//! Tests of the model in the repository: its logits equal PyTorch's.

use std::fs;

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
