//! Settings, tensors and files that change the output are read, or refused by name.

use std::collections::HashMap;
use std::io::Write;

use crate::common::{Fixture, distance, feed};
use candle_core::{DType, Device, Tensor};
use hybrid_models::{LoadOptions, Model, Pretrained, Tokenizer};
use longctx_core::Result;
use serde_json::{Value, json};

type Tensors = HashMap<String, Tensor>;

fn build(config: &Value, tensors: Tensors) -> Result<Model> {
    Model::from_tensors(Some(&config.to_string()), tensors, &LoadOptions::default())
}

fn config(fixture: &Fixture) -> Value {
    let text = std::fs::read_to_string(fixture.folder.join("config.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Converts a fixture of `transformers` to the layout of the authors' package.
fn as_authors(name: &str) -> (Fixture, Value, Tensors) {
    let fixture = Fixture::open(name);
    let c = config(&fixture);
    let mut ssm = json!({
        "d_state": c["state_size"], "bias": c["use_bias"], "conv_bias": c["use_conv_bias"],
        "dt_min": 0.001, "use_fast_path": true, "chunk_size": 64,
    });
    if c["model_type"] == "mamba2" {
        ssm["layer"] = json!("Mamba2");
        (ssm["headdim"], ssm["ngroups"]) = (c["head_dim"].clone(), c["n_groups"].clone());
        (ssm["rmsnorm"], ssm["norm_before_gate"]) = (json!(true), json!(false));
    } else {
        ssm["dt_rank"] = c["time_step_rank"].clone();
    }
    let config = json!({
        "d_model": c["hidden_size"], "n_layer": c["num_hidden_layers"], "vocab_size": c["vocab_size"],
        "ssm_cfg": ssm, "d_intermediate": 0, "attn_layer_idx": [], "rms_norm": true,
        "residual_in_fp32": true, "fused_add_norm": true, "pad_vocab_size_multiple": 8,
    });
    let tensors = fixture.tensors().into_iter();
    let rename = |(name, t): (String, Tensor)| (name.replace("embeddings", "embedding"), t);
    let tensors = tensors.map(rename).collect();
    (fixture, config, tensors)
}

#[test]
fn biases_of_the_authors_layout_are_read() {
    for name in ["mamba_biases", "mamba2_biases", "mamba", "mamba2_groups"] {
        let (fixture, config, tensors) = as_authors(name);
        let model = build(&config, tensors).unwrap();
        let length = fixture.tokens.dim(1).unwrap();
        let error = distance(&feed(&model, &fixture.tokens, &[length]), &fixture.logits);
        assert!(error <= 1e-4, "{name}: off by {error}");
    }
}

#[test]
fn settings_that_are_not_computed_are_refused_by_name() {
    let (_, config, mut tensors) = as_authors("mamba2");
    build(&config, tensors.clone()).unwrap();
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 9] = [
        (|c| c["d_intermediate"] = json!(64), "d_intermediate 64"),
        (|c| c["attn_layer_idx"] = json!([1]), "attn_layer_idx"),
        (|c| c["rms_norm"] = json!(false), "layer norms"),
        (|c| c["ssm_cfg"]["norm_before_gate"] = json!(true), "ssm_cfg.norm_before_gate true"),
        (|c| c["ssm_cfg"]["rmsnorm"] = json!(false), "ssm_cfg.rmsnorm false"),
        (|c| c["ssm_cfg"]["D_has_hdim"] = json!(true), "ssm_cfg.D_has_hdim true"),
        (|c| c["ssm_cfg"]["d_ssm"] = json!(40), "ssm_cfg.d_ssm 40"),
        (|c| c["ssm_cfg"]["activation"] = json!("gelu"), "ssm_cfg.activation"),
        (|c| c["tie_embeddings"] = json!(false), "lm_head.weight"),
    ];
    for (change, part) in cases {
        let mut config = config.clone();
        change(&mut config);
        let error = build(&config, tensors.clone()).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
    let stack = json!({
        "model_type": "hybrid", "vocab_size": 96, "hidden_size": 40, "layers": [["mamba2"]],
        "mamba2": { "norm_before_gate": true },
    });
    let norm = Tensor::zeros(40, DType::F32, &Device::Cpu).unwrap();
    tensors.insert("layers.0.mamba2_norm.weight".into(), norm);
    let error = build(&stack, tensors).unwrap_err().to_string();
    assert!(error.contains("norm_before_gate") && error.contains("n_groups"), "{error}");
}

#[test]
fn masked_expert_groups_are_those_of_transformers() {
    // 8 groups of 3 states are as wide as 1 group of 24, so no shape distinguishes them.
    let fixture = Fixture::open("mamba2");
    let mut config = config(&fixture);
    config["n_groups"].take();
    config["num_heads"] = json!(8);
    let error = build(&config, fixture.tensors()).unwrap_err().to_string();
    assert!(error.contains("num_heads") && error.contains("in 8 groups"), "{error}");
}

#[test]
fn a_tensor_that_no_layer_reads_is_named() {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    for (name, extra) in [
        ("mamba", "backbone.layers.0.mixer.in_proj.bias"),
        ("mamba2", "backbone.layers.1.mixer.out_proj.bias"),
        ("recurrent_gemma", "model.layers.2.temporal_block.q_proj.bias"),
        ("rwkv4", "rwkv.blocks.0.attention.time_mix_gate"),
        ("rwkv5", "blocks.3.att.key.weight"),
        ("rwkv6", "blocks.0.att.key.weight.lora_A"),
        ("rwkv7", "blocks.1.att.v3"),
    ] {
        let fixture = Fixture::open(name);
        let config = std::fs::read_to_string(fixture.folder.join("config.json")).ok();
        let build = |extra: &str| {
            let mut tensors = fixture.tensors();
            tensors.insert(extra.to_owned(), zeros(&[4]));
            Model::from_tensors(config.as_deref(), tensors, &LoadOptions::default())
        };
        let error = build(extra).unwrap_err().to_string();
        assert!(error.contains(extra), "{name}: {error}");
        build("model.layers.0.self_attn.rotary_emb.inv_freq").unwrap();
    }
    // The tensors of a file on disk are checked too.
    let fixture = Fixture::open("rwkv6");
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = fixture.tensors();
    tensors.insert("head.bias".into(), zeros(&[96]));
    let path = folder.path().join("model.safetensors");
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let error = Model::from_folder(folder.path(), &LoadOptions::default()).unwrap_err().to_string();
    assert!(error.contains("\"head.bias\""), "{error}");
}

#[test]
fn rwkv_5_1_is_refused_by_name() {
    let fixture = Fixture::open("rwkv5");
    let mut tensors = fixture.tensors();
    for (name, tensor) in &mut tensors {
        if name.contains("time_decay") || name.contains("time_faaaa") {
            *tensor = tensor.narrow(1, 0, 1).unwrap().reshape((2, 1, 1)).unwrap();
        }
    }
    let build = |tensors| Model::from_tensors(None, tensors, &LoadOptions::default());
    let error = build(tensors.clone()).unwrap_err().to_string();
    assert!(error.contains("RWKV-5.0 and 5.1") && error.contains("[2, 1, 1]"), "{error}");
    // Without a gate, the version is 5.0.
    tensors.retain(|name, _| !name.contains("gate"));
    assert!(build(tensors).unwrap_err().to_string().contains("RWKV-5.0"));
}

#[test]
fn rwkv_sizes_are_those_of_the_tensors() {
    let fixture = Fixture::open("rwkv4");
    for (name, value) in [("num_hidden_layers", 2), ("hidden_size", 40), ("head_size_divisor", 4)] {
        let mut config = config(&fixture);
        config[name] = json!(value);
        let error = build(&config, fixture.tensors()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(&value.to_string()), "{error}");
    }
}

#[test]
fn sizes_that_no_model_has_are_errors() {
    let fixture = Fixture::open("mamba2");
    let huge = [json!(0), json!(u64::MAX), json!(1u64 << 62), json!(u32::MAX)];
    let names = [
        "hidden_size",
        "vocab_size",
        "num_heads",
        "head_dim",
        "n_groups",
        "state_size",
        "conv_kernel",
    ];
    for name in names.into_iter().chain(["num_hidden_layers", "pad_vocab_size_multiple", "expand"])
    {
        for value in &huge {
            let mut config = config(&fixture);
            config[name] = value.clone();
            // With zero layers, unread tensors are left.
            assert!(build(&config, fixture.tensors()).is_err(), "{name} {value}");
        }
    }
    let fixture = Fixture::open("recurrent_gemma");
    let names = ["hidden_size", "num_attention_heads", "head_dim", "lru_width", "conv1d_width"];
    for name in
        names.into_iter().chain(["num_key_value_heads", "intermediate_size", "num_hidden_layers"])
    {
        for value in &huge {
            let mut config = config(&fixture);
            config[name] = value.clone();
            assert!(build(&config, fixture.tensors()).is_err(), "{name} {value}");
        }
    }
}

#[test]
fn an_index_names_files_of_its_folder_and_a_single_file_precedes_it() {
    let fixture = Fixture::open("rwkv6");
    let outer = tempfile::tempdir().unwrap();
    let folder = outer.path().join("model");
    std::fs::create_dir(&folder).unwrap();
    let weights = fixture.folder.join("model.safetensors");
    std::fs::copy(&weights, outer.path().join("outside.safetensors")).unwrap();
    let mut index = std::fs::File::create(folder.join("model.safetensors.index.json")).unwrap();
    index.write_all(br#"{"weight_map": {"emb.weight": "../outside.safetensors"}}"#).unwrap();
    let open = || Model::from_folder(&folder, &LoadOptions::default());
    let error = open().unwrap_err().to_string();
    assert!(error.contains("../outside.safetensors"), "{error}");
    // A whole file takes precedence over an index.
    std::fs::copy(&weights, folder.join("model.safetensors")).unwrap();
    open().unwrap();
}

#[test]
fn a_truncated_tokenizer_is_an_error() {
    let whole = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../prompt-compress/tests/fixtures/tiny-llama/tokenizer.json"
    );
    let text = std::fs::read(whole).unwrap();
    let at = text.windows(9).position(|part| part == b"\"decoder\"").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    for end in at + 9..at + 120 {
        std::fs::write(&path, &text[..end]).unwrap();
        let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
    let missing = Pretrained::open(&folder.path().display().to_string(), &LoadOptions::default());
    assert!(missing.is_err());
}
