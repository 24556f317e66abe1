//! Damaged state files and configurations: none panics, hangs or needs more memory than a multiple
//! of its size.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use hybrid_models::{LoadOptions, Model, State};
use longctx_core::{Batch, CausalLm, DenseCache, LayerSpec, Logits};
use longctx_mutate::{Counting, Trial};

#[global_allocator]
static MEMORY: Counting = Counting;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Returns the state file of a model after three tokens.
fn state(name: &str) -> Vec<u8> {
    let model = Model::from_folder(&fixture(name), &LoadOptions::default()).unwrap();
    let cache = |spec: &LayerSpec| DenseCache::new(spec.clone(), DType::F32);
    let mut session = model.session(cache).unwrap();
    session.forward(&Batch::single(0, 3).unwrap(), &[1, 2, 3], Logits::Last).unwrap();
    session.state(0).unwrap().to_bytes().unwrap()
}

/// A single test, because memory is counted for the whole process.
#[test]
fn damaged_files_are_errors() {
    let corpus = [state("rwkv5"), state("mamba_biases")];
    let whole: Vec<State> = corpus.iter().map(|file| State::from_bytes(file).unwrap()).collect();
    let trial = Trial { name: "state", corpus: &corpus, memory: |bytes| 16 * bytes + (1 << 16) };
    let tried = trial.run(|bytes| {
        if let Ok(state) = State::from_bytes(bytes) {
            // Only the saved states can be read, or files of version 1, which have no checksum.
            let is_version_1 = bytes.windows(13).any(|part| part == b"\"version\":\"1\"");
            assert!(whole.contains(&state) || is_version_1);
        }
    });
    println!("{tried} state files");

    let names = ["mamba_biases", "mamba2_biases", "rwkv4_epsilon", "recurrent_gemma"];
    let config = |name| std::fs::read(fixture(name).join("config.json")).unwrap();
    let tensors = |name| {
        let path = fixture(name).join("model.safetensors");
        candle_core::safetensors::load(path, &Device::Cpu).unwrap()
    };
    let (corpus, tensors) = (names.map(config), names.map(tensors));
    let largest = 1 << 22;
    assert!(
        tensors
            .iter()
            .all(|all| all.values().map(Tensor::elem_count).sum::<usize>() < largest / 16)
    );
    let trial = Trial { name: "config", corpus: &corpus, memory: |bytes| 64 * bytes + (1 << 22) };
    let tried = trial.run(|bytes| {
        let text = String::from_utf8_lossy(bytes);
        for tensors in &tensors {
            drop(Model::from_tensors(Some(&text), tensors.clone(), &LoadOptions::default()));
        }
    });
    println!("{tried} configurations");
}
