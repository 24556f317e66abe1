//! The error of invalid input names the file, the tensor, the expected and the actual value.

use std::fs;
use std::path::{Path, PathBuf};

use base_models::{LoadOptions, Pretrained, Transformer};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use longctx_core::{Batch, CausalLm, DenseCache, LayerSpec, Logits};

/// Returns a copy of the tiny Llama fixture, to be modified.
fn copy() -> tempfile::TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama");
    let to = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), to.path().join(file)).unwrap();
    }
    to
}

fn message(folder: &Path) -> String {
    Transformer::from_folder(folder, &LoadOptions::default()).unwrap_err().to_string()
}

fn edit_config(folder: &Path, from: &str, to: &str) {
    let path = folder.join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from));
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn missing_files() {
    let folder = copy();
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert!(message(folder.path()).contains("none of model.safetensors, model.safetensors.index"));
    let index = r#"{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}"#;
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    assert!(message(folder.path()).contains("model-00001-of-00002.safetensors"));
    fs::remove_file(folder.path().join("config.json")).unwrap();
    assert!(message(folder.path()).contains("config.json"));
    let error = Pretrained::open("no/such/file.gguf", &LoadOptions::default()).unwrap_err();
    assert!(error.to_string().contains("no/such/file.gguf"));
}

#[test]
fn unknown_architectures_and_settings() {
    let folder = copy();
    edit_config(folder.path(), "\"model_type\": \"llama\"", "\"model_type\": \"gpt_neox\"");
    assert!(message(folder.path()).contains("\"gpt_neox\" (known: llama"));
    let folder = copy();
    edit_config(folder.path(), "\"rope_type\": \"default\"", "\"rope_type\": \"axial\"");
    assert!(message(folder.path()).contains("rope scaling \"axial\""));
    let folder = copy();
    edit_config(folder.path(), "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 4");
    assert!(message(folder.path()).contains("a divisor of the 6 query heads, got 4"));
}

#[test]
fn a_tensor_of_another_shape() {
    let folder = copy();
    edit_config(folder.path(), "\"intermediate_size\": 80", "\"intermediate_size\": 81");
    let got = message(folder.path());
    assert!(got.contains("model.layers.0.mlp.gate_proj.weight"), "{got}");
    assert!(got.contains("expected [81, 48], got [80, 48]"), "{got}");
}

#[test]
fn truncated_safetensors() {
    let folder = copy();
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    assert!(message(folder.path()).contains(&folder.path().display().to_string()));
}

/// Writes a GGUF file with one tensor and the given metadata.
fn gguf(folder: &Path, metadata: &[(&str, Value)]) -> PathBuf {
    let weights = Tensor::ones((64, 32), DType::F32, &Device::Cpu).unwrap();
    let weights = QTensor::quantize(&weights, GgmlDType::Q4_1).unwrap();
    let path = folder.join("model.gguf");
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let mut file = fs::File::create(&path).unwrap();
    gguf_file::write(&mut file, &metadata, &[("token_embd.weight", &weights)]).unwrap();
    path
}

#[test]
fn broken_gguf_files() {
    let folder = tempfile::tempdir().unwrap();
    let open =
        |path: &Path| Pretrained::from_gguf(path, &LoadOptions::default()).unwrap_err().to_string();
    let text = |s: &str| Value::String(s.into());

    let path = gguf(folder.path(), &[("general.architecture", text("llama"))]);
    assert!(open(&path).contains("there is no metadata \"llama.attention.head_count\""));
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 100]).unwrap();
    assert!(open(&path).contains("truncated: tensor \"token_embd.weight\""), "{}", open(&path));
    fs::write(&path, &whole[..40]).unwrap();
    assert!(open(&path).contains("model.gguf"));
    fs::write(&path, b"not a model").unwrap();
    assert!(open(&path).contains("model.gguf"));

    let path = gguf(folder.path(), &[("general.architecture", text("bloom"))]);
    assert!(open(&path).contains("\"bloom\""));
    let path = gguf(folder.path(), &[]);
    assert!(open(&path).contains("general.architecture"));
}

#[test]
fn unknown_tokens() {
    let folder = copy();
    let model = Transformer::from_folder(folder.path(), &LoadOptions::default()).unwrap();
    let mut session = model.session(|l| DenseCache::new(l.clone(), DType::F32)).unwrap();
    let batch = Batch::new(&[(3, 1), (4, 1)]).unwrap();
    let mut message =
        |ids: &[u32]| session.forward(&batch, ids, Logits::Last).unwrap_err().to_string();
    assert!(
        message(&[95, 96]).contains("token id 1 of the batch: expected an id below 96, got 96")
    );
    assert!(message(&[1]).contains("token ids: expected 2, got 1"));
    assert!(session.seqs().is_empty() && session.footprint().payload == 0);
}

#[test]
fn a_cache_without_the_layers_rotary_embedding() {
    let folder = copy();
    let model = Transformer::from_folder(folder.path(), &LoadOptions::default()).unwrap();
    let bare = |l: &LayerSpec| DenseCache::new(LayerSpec::new(l.shape), DType::F32);
    let message = model.session(bare).err().unwrap().to_string();
    assert!(message.contains("rope of layer 0's cache"), "{message}");
}
