//! Invalid checkpoints, tokens and states of other models give errors that name them, and no panic.

use crate::common::{Fixture, advance, session};
use candle_core::{DType, Device, Tensor};
use hybrid_models::{LoadOptions, Model, Session, State};
use longctx_core::{Batch, CausalLm, DenseCache, Error, LayerSpec, Logits, Result, SeqId};

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
    let batch = Batch::new(&[(3, 1), (4, 1)]).unwrap();
    let mut feed = |ids: &[u32]| rwkv.forward(&batch, ids, Logits::Last).map_err(|e| e.to_string());
    assert!(feed(&[1, 96]).unwrap_err().contains("token id 1 of the batch"));
    assert!(feed(&[1]).unwrap_err().contains("token ids: expected 2, got 1"));
    assert!(rwkv.seqs().is_empty());
    feed_one(&mut rwkv, 3);

    let state = rwkv.state(3).unwrap();
    assert!(matches!(rwkv.state(4), Err(Error::UnknownSequence(4))));
    let other = Fixture::open("rwkv7").model(DType::F32);
    let refused = session(&other).restore(0, &state).unwrap_err().to_string();
    assert!(refused.contains("rwkv7") && refused.contains("rwkv6"), "{refused}");
    let gemma = Fixture::open("recurrent_gemma").model(DType::F32);
    let mut gemma = session(&gemma);
    feed_one(&mut gemma, 3);
    assert!(matches!(gemma.state(3), Err(Error::Unsupported(_))));
    assert!(matches!(gemma.restore(3, &state), Err(Error::Unsupported(_))));

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    std::fs::copy(Fixture::open("rwkv6").folder.join("model.safetensors"), &path).unwrap();
    let message = State::load(&path).unwrap_err().to_string();
    assert!(message.contains("no saved state"), "{message}");
}

fn feed_one(session: &mut Session, seq: SeqId) {
    advance(session, &[(seq, &[1])], Logits::Last).unwrap();
}

#[test]
fn bad_snapshot_settings_and_caches_are_named() {
    let rwkv = Fixture::open("rwkv6").model(DType::F32);
    for (every, keep, name) in [(0, 1, "every"), (1, 0, "keep")] {
        let message = session(&rwkv).with_snapshots(every, keep).err().unwrap().to_string();
        assert!(message.contains(name), "{message}");
    }
    let gemma = Fixture::open("recurrent_gemma").model(DType::F32);
    let bare = |l: &LayerSpec| DenseCache::new(LayerSpec::new(l.shape), DType::F32);
    let message = gemma.session(bare).err().unwrap().to_string();
    assert!(message.contains("rope of layer 2's cache"), "{message}");
}

/// A file with states of several sequences, which an earlier version of this crate could write.
#[test]
fn a_state_of_several_sequences_is_refused() {
    let model = Fixture::open("rwkv6").model(DType::F32);
    let mut session = session(&model);
    feed_one(&mut session, 0);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    session.state(0).unwrap().save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let header_length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + header_length]).unwrap();
    let header = header.replace("\"batch\":\"1\"", "\"batch\":\"2\"");
    let of_two = [&bytes[..8], header.as_bytes(), &bytes[8 + header_length..]].concat();
    assert_ne!(of_two, bytes);
    std::fs::write(&path, of_two).unwrap();
    let message = State::load(&path).unwrap_err().to_string();
    assert!(message.contains("the state of 1 sequence, got 2"), "{message}");
}
