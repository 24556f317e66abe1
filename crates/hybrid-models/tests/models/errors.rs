//! Broken checkpoints, wrong tokens and states of other models are named, and nothing panics.

use crate::common::{Fixture, session};
use candle_core::{DType, Device, Tensor};
use hybrid_models::{LoadOptions, Model};
use longctx_core::{CausalLm, Error, Logits, Result};

fn load(
    name: &str,
    change: impl Fn(&mut std::collections::HashMap<String, Tensor>),
) -> Result<Model> {
    let fixture = Fixture::open(name);
    let mut tensors = fixture.tensors();
    change(&mut tensors);
    let config = std::fs::read_to_string(fixture.folder.join("config.json")).ok();
    Model::from_tensors(config.as_deref(), tensors, &LoadOptions::default())
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    for (name, tensor) in [
        ("mamba", "backbone.layers.1.mixer.dt_proj.bias"),
        ("mamba2", "backbone.layers.2.mixer.norm.weight"),
        ("recurrent_gemma", "model.layers.2.temporal_block.k_proj.weight"),
        ("rwkv4", "rwkv.blocks.1.attention.output.weight"),
        ("rwkv5", "blocks.2.att.ln_x.bias"),
        ("rwkv6", "blocks.0.att.time_decay_w2"),
        ("rwkv7", "blocks.1.att.v2"),
    ] {
        let missing = load(name, |t| drop(t.remove(tensor).unwrap())).unwrap_err();
        assert!(missing.to_string().contains(tensor), "{missing}");
        let other = Tensor::zeros((5, 7), DType::F32, &Device::Cpu).unwrap();
        let misshapen = load(name, |t| drop(t.insert(tensor.into(), other.clone()))).unwrap_err();
        assert!(matches!(misshapen, Error::Mismatch { .. }), "{misshapen}");
        assert!(misshapen.to_string().contains(tensor), "{misshapen}");
    }
}

#[test]
fn other_families_and_vocabularies_are_named() {
    let tensors = Fixture::open("mamba").tensors();
    let message = |config: &str| {
        let options = LoadOptions::default();
        Model::from_tensors(Some(config), tensors.clone(), &options).unwrap_err().to_string()
    };
    assert!(message(r#"{"model_type": "llama"}"#).contains("llama"));
    assert!(message(r#"{"model_type": "mamba"}"#).contains("hidden_size"));
    assert!(message("{").contains("config.json"));
    let config =
        std::fs::read_to_string(Fixture::open("mamba").folder.join("config.json")).unwrap();
    let smaller = message(&config.replace("\"vocab_size\": 96", "\"vocab_size\": 95"));
    assert!(smaller.contains("embeddings") && smaller.contains("95"), "{smaller}");
    let of_mamba2 = message(&config.replace("\"mamba\"", "\"mamba2\""));
    assert!(of_mamba2.contains("num_heads"), "{of_mamba2}");
    let options = LoadOptions { dtype: DType::U8, ..Default::default() };
    let refused = Model::from_tensors(Some(&config), tensors.clone(), &options).unwrap_err();
    assert!(refused.to_string().contains("dtype"));
    let nowhere = Model::from_folder(std::path::Path::new("/nowhere"), &LoadOptions::default());
    assert!(nowhere.unwrap_err().to_string().contains("/nowhere/config.json"));
}

#[test]
fn wrong_tokens_and_states_are_named() {
    let model = Fixture::open("rwkv6").model(DType::F32);
    let mut rwkv = session(&model);
    let mut feed = |tokens: &Tensor| rwkv.forward(tokens, Logits::Last).map_err(|e| e.to_string());
    let tokens = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    assert!(feed(&tokens(&[1, 96])).unwrap_err().contains("the id 96"));
    assert!(feed(&tokens(&[1]).to_dtype(DType::I64).unwrap()).unwrap_err().contains("i64"));
    assert!(feed(&tokens(&[1]).squeeze(0).unwrap()).unwrap_err().contains("[1]"));
    feed(&tokens(&[1, 2])).unwrap();
    assert!(feed(&tokens(&[1, 2]).t().unwrap()).unwrap_err().contains("batch"));

    let state = rwkv.state().unwrap();
    let other = Fixture::open("rwkv7").model(DType::F32);
    let refused = session(&other).restore(&state).unwrap_err().to_string();
    assert!(refused.contains("rwkv7") && refused.contains("rwkv6"), "{refused}");
    let gemma = Fixture::open("recurrent_gemma").model(DType::F32);
    assert!(matches!(session(&gemma).state(), Err(Error::Unsupported(_))));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    std::fs::copy(Fixture::open("rwkv6").folder.join("model.safetensors"), &path).unwrap();
    let message = hybrid_models::State::load(&path).unwrap_err().to_string();
    assert!(message.contains("no saved state"), "{message}");
}
