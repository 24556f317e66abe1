//! Stacks of one family equal that family's public implementation. Stacks of all mixers have the
//! properties of each. Attention layers use any cache.

use std::path::Path;

use crate::common::{Fixture, SAME, advance, distance, feed, feed_on, relative_distance};
use crate::mixed::{Tensors, mixed};
use candle_core::{DType, Device, Tensor};
use hybrid_models::{LoadOptions, Model, Session};
use kv_quant::{Bits, Format, QuantCache};
use longctx_core::{CausalLm, DenseStore, Error, Logits, Result};
use serde_json::{Value, json};
use token_drop::{Budget, KNorm, PolicyCache};

fn build(config: &Value, tensors: Tensors) -> Result<Model> {
    Model::from_tensors(Some(&config.to_string()), tensors, &LoadOptions::default())
}

/// Renames a family's tensors to those of a stack: for each pair in turn, `from` is replaced by
/// `to`.
fn renamed(tensors: Tensors, pairs: &[(&str, &str)]) -> Tensors {
    let rename = |name: String| pairs.iter().fold(name, |name, (from, to)| name.replace(from, to));
    tensors.into_iter().map(|(name, tensor)| (rename(name), tensor)).collect()
}

fn check(model: &Model, tokens: &Tensor, want: &Tensor) {
    for cuts in [&[1000][..], &[1, 30, 2, 33], &[1]] {
        let error = distance(&feed(model, tokens, cuts), want);
        assert!(error <= 1e-4, "in chunks of {cuts:?}: off by {error}");
    }
}

fn equals(name: &str, config: &Value, tensors: Tensors) {
    let fixture = Fixture::open(name);
    let model = build(config, tensors).unwrap();
    assert_eq!(model.model_type(), "hybrid");
    check(&model, &fixture.tokens, &fixture.logits);
}

#[test]
fn of_mamba() {
    let config = json!({
        "model_type": "hybrid", "vocab_size": 96, "hidden_size": 36, "layers": [["mamba"], ["mamba"], ["mamba"]],
        "mamba": { "time_step_rank": 3 },
    });
    let names = [
        ("backbone.embeddings", "embed"),
        ("backbone.norm_f", "final_norm"),
        ("backbone.layers", "layers"),
        (".mixer.", ".mamba."),
        ("0.norm.", "0.mamba_norm."),
        ("1.norm.", "1.mamba_norm."),
        ("2.norm.", "2.mamba_norm."),
    ];
    equals("mamba", &config, renamed(Fixture::open("mamba").tensors(), &names));
}

#[test]
fn of_mamba2() {
    let config = json!({
        "model_type": "hybrid", "vocab_size": 96, "hidden_size": 40, "layers": [["mamba2"], ["mamba2"], ["mamba2"]],
        "mamba2": { "state_size": 24, "head_dim": 20, "n_groups": 2 },
    });
    let names = [
        ("backbone.embeddings", "embed"),
        ("backbone.norm_f", "final_norm"),
        ("lm_head", "head"),
        ("backbone.layers", "layers"),
        (".mixer.", ".mamba2."),
        ("0.norm.", "0.mamba2_norm."),
        ("1.norm.", "1.mamba2_norm."),
        ("layers.2.norm.", "layers.2.mamba2_norm."),
    ];
    equals("mamba2_groups", &config, renamed(Fixture::open("mamba2_groups").tensors(), &names));
}

#[test]
fn of_rwkv5() {
    let layer = ["rwkv5", "channel_mix"];
    let config = json!({
        "model_type": "hybrid", "vocab_size": 96, "hidden_size": 32, "layers": [layer, layer, layer], "norm": "layer",
    });
    let names = [
        ("emb.", "embed."),
        ("blocks.0.ln0", "embed_norm"),
        ("blocks.", "layers."),
        ("ln_out", "final_norm"),
        (".att.", ".rwkv5."),
        (".ffn.", ".channel_mix."),
        (".ln1.", ".rwkv5_norm."),
        (".ln2.", ".channel_mix_norm."),
    ];
    equals("rwkv5", &config, renamed(Fixture::open("rwkv5").tensors(), &names));
}

/// Stacks trained in PyTorch by `examples/zoo`: one of every mixer, with local attention, has the
/// same logits.
#[test]
fn of_the_zoo() {
    let fixture = Fixture::open("zoo");
    check(&fixture.model(DType::F32), &fixture.tokens, &fixture.logits);
    let rounded = fixture.rounded(DType::BF16, DType::F32);
    check(&rounded, &fixture.tokens, &fixture.logits_of_bf16);
}

#[test]
#[ignore = "needs folders of examples/zoo/train.py and fixture.py trained"]
fn of_trained_models_of_the_zoo() {
    let folder = std::env::var_os("LONGCTX_ZOO").expect("LONGCTX_ZOO names a folder of models");
    let mut opened = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let folder = entry.unwrap().path();
        let model = Model::from_folder(&folder, &LoadOptions::default()).unwrap();
        let file = folder.join("expected.safetensors");
        let expected = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let tokens = expected["tokens"].to_dtype(DType::U32).unwrap();
        for cuts in [vec![1024], vec![1, 7, 13]] {
            let error = distance(&feed(&model, &tokens, &cuts), &expected["logits"]);
            println!("{} in chunks of {cuts:?}: off by {error:e}", folder.display());
            assert!(error <= 1e-4);
        }
        opened += 1;
    }
    assert!(opened > 0);
}

#[test]
fn of_recurrent_gemma() {
    let (recurrent, attention) = (["rg_lru", "mlp"], ["attention", "mlp"]);
    let config = json!({
        "model_type": "hybrid", "vocab_size": 96, "hidden_size": 48,
        "layers": [recurrent, recurrent, attention, recurrent],
        // The square root of 48 in bf16.
        "norm_eps": 1e-6, "embedding_scale": 6.9375, "logits_soft_cap": 30.0,
        "attention": {
            "num_attention_heads": 3, "num_key_value_heads": 1, "sliding_window": 24,
            "partial_rotary_factor": 0.5, "output_bias": true,
        },
        "rg_lru": { "num_heads": 3 },
        "mlp": { "intermediate_size": 64, "hidden_act": "gelu_pytorch_tanh", "bias": true },
    });
    let names = [
        ("model.layers.2.temporal_block", "layers.2.attention"),
        ("model.layers.2.temporal_pre_norm", "layers.2.attention_norm"),
        ("model.", ""),
        ("embed_tokens", "embed"),
        ("temporal_block", "rg_lru"),
        ("temporal_pre_norm", "rg_lru_norm"),
        ("mlp_block", "mlp"),
        ("channel_pre_norm", "mlp_norm"),
    ];
    // Its norms' weights are stored as differences from 1.
    let whole = |(name, tensor): (String, Tensor)| match name.contains("norm") {
        true => (name, (tensor + 1.0).unwrap()),
        false => (name, tensor),
    };
    let tensors = renamed(Fixture::open("recurrent_gemma").tensors(), &names);
    equals("recurrent_gemma", &config, tensors.into_iter().map(whole).collect());
}

#[test]
fn a_stack_of_attention_layers_is_llama() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../base-models/tests/fixtures/llama");
    let load = |file| candle_core::safetensors::load(folder.join(file), &Device::Cpu).unwrap();
    let layer = ["attention", "mlp"];
    let config = json!({
        "model_type": "hybrid", "vocab_size": 96, "hidden_size": 48, "layers": [layer, layer],
        "attention": { "num_attention_heads": 6, "num_key_value_heads": 2 },
        "mlp": { "intermediate_size": 80 },
    });
    let names = [
        ("model.", ""),
        ("embed_tokens", "embed"),
        ("lm_head", "head"),
        ("self_attn", "attention"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "mlp_norm"),
    ];
    let tensors = load("model.safetensors").into_iter();
    let last = |(name, t): (String, Tensor)| match name.as_str() {
        "model.norm.weight" => ("final_norm.weight".into(), t),
        _ => (name, t),
    };
    let model = build(&config, renamed(tensors.map(last).collect(), &names)).unwrap();
    let expected = load("expected.safetensors");
    check(&model, &expected["tokens"], &expected["logits"]);
}

fn ids(batch: usize, count: usize) -> Tensor {
    let ids: Vec<u32> = (0..batch * count).map(|i| (i * i * 7 + i * 3) as u32 % 50).collect();
    Tensor::from_vec(ids, (batch, count), &Device::Cpu).unwrap()
}

#[test]
fn of_all_mixers_chunks_equal_steps_and_entries_do_not_mix() {
    let (config, tensors) = mixed(32, 16);
    let model = build(&config, tensors).unwrap();
    let ids = ids(3, 90);
    let steps = feed(&model, &ids, &[1]);
    for cuts in [&[90][..], &[1, 40, 7], &[70]] {
        assert!(relative_distance(&feed(&model, &ids, cuts), &steps) <= SAME);
    }
    for entry in 0..3 {
        let alone = feed(&model, &ids.narrow(0, entry, 1).unwrap(), &[50]);
        assert!(relative_distance(&alone, &steps.narrow(0, entry, 1).unwrap()) <= SAME);
    }
}

/// Returns the logits after a prompt of 512 tokens in one call, the logits of 8 more tokens, and
/// the session.
fn decode(mut session: Session) -> (Tensor, Tensor, Session) {
    let ids = ids(1, 520);
    let prompt: Vec<u32> = ids.narrow(1, 0, 512).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let prompt = advance(&mut session, &[(0, &prompt)], Logits::Last).unwrap();
    let after = feed_on(&mut session, &ids.narrow(1, 512, 8).unwrap(), &[1]);
    (prompt, after, session)
}

#[test]
fn attention_layers_can_be_quantized_and_evicted() {
    let (config, tensors) = mixed(32, 16);
    let model = build(&config, tensors).unwrap();
    let (prompt, exact, dense) = decode(crate::common::session(&model));
    let format = |bits| Format::kivi(bits, bits, 32, 32).unwrap();
    let quantized =
        |bits| decode(model.session(|l| QuantCache::new(l.clone(), format(bits))).unwrap());
    let (same_prompt, in_8_bits, eight) = quantized(Bits::Eight);
    let (_, in_2_bits, two) = quantized(Bits::Two);
    let (evicted_prompt, evicted, quarter) = decode(
        model
            .session(|l| {
                let store = DenseStore::new(l.shape, DType::F32)?;
                PolicyCache::new(l.clone(), store, KNorm, Budget::Ratio(0.25))
            })
            .unwrap(),
    );

    // The attention of the prompt itself is exact; later tokens see the kept entries.
    for same in [&same_prompt, &evicted_prompt] {
        assert!(relative_distance(same, &prompt) <= SAME);
    }
    let [of_8, of_2, of_evicted] = [&in_8_bits, &in_2_bits, &evicted].map(|x| distance(x, &exact));
    assert!(0.0 < of_8 && of_8 < of_2, "{of_8} in 8 bits, {of_2} in 2");
    assert!(of_evicted > 1e-3, "{of_evicted} of evicted");

    // Two attention layers of two kv heads of 32 channels, in f32; the states do not change. Memory
    // allocated for future tokens is the same for all formats.
    let bytes = |session: &Session| session.footprint().total() - session.footprint().slack;
    let whole = 2 * 2 * 2 * 32 * 4 * 520;
    let states = dense.footprint().payload - whole;
    assert!(states < whole / 8);
    let of_caches = |session: &Session| (bytes(session) - states) as f64 / whole as f64;
    let [of_8, of_2] = [&eight, &two].map(of_caches);
    assert!(of_8 < 0.36 && of_2 < 0.2, "{of_8} in 8 bits, {of_2} in 2");
    assert!(of_caches(&quarter) < 0.35, "{}", of_caches(&quarter));
}

#[test]
fn broken_configurations_are_named() {
    let (config, tensors) = mixed(32, 16);
    let message = |change: &dyn Fn(&mut Value)| {
        let mut config = config.clone();
        change(&mut config);
        build(&config, tensors.clone()).unwrap_err().to_string()
    };
    type Change = fn(&mut Value);
    let cases: [(Change, &[&str]); 9] = [
        (|c| c["layers"][0][0] = json!("hyena"), &["hyena", "rg_lru"]),
        (|c| c["layers"] = json!([]), &["layers"]),
        (|c| c["layers"][1] = json!(["mlp", "mlp"]), &["mlp", "layer 1"]),
        (|c| c["atention"] = json!({}), &["atention"]),
        (|c| drop(c.as_object_mut().unwrap().remove("attention")), &["attention", "section"]),
        (|c| c["rg_lru"]["num_heads"] = json!(5), &["lru_width", "multiple"]),
        (|c| c["mamba"]["conv_kernel"] = json!(0), &["conv_kernel"]),
        (|c| c["attention"]["num_key_value_heads"] = json!(3), &["kv_heads"]),
        (|c| c["hidden_size"] = json!(48), &["layers.0.mamba_norm.weight", "48"]),
    ];
    for (change, parts) in cases {
        let message = message(&change);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    let mut fewer = tensors.clone();
    fewer.remove("layers.2.rwkv5.time_faaaa");
    let error = build(&config, fewer).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. } | Error::File { .. }));
    assert!(error.to_string().contains("layers.2.rwkv5.time_faaaa"), "{error}");
}
