//! Configurations have the same meaning as in `transformers`, or are refused.
//! `fixtures/make_configs.py` makes random ones.

mod common;

use std::fs;
use std::path::Path;

use base_models::{Config, LoadOptions, Transformer};
use longctx_core::RopeScaling;
use serde_json::{Value, json};

/// Reads the configuration of a family with additional fields.
fn read(family: &str, more: Value) -> Result<Config, String> {
    let mut config = json!({
        "model_type": family, "vocab_size": 32, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    });
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    Config::from_file(&path).map_err(|e| e.to_string())
}

fn windows(family: &str, more: Value) -> Vec<Option<usize>> {
    read(family, more).unwrap().windows
}

#[test]
fn windows_are_in_the_layers_that_transformers_gives_them() {
    let used = json!({"use_sliding_window": true, "sliding_window": 8});
    // Neither layer_types nor max_window_layers: the window begins at layer 28.
    assert_eq!(windows("qwen2", used.clone()), [None; 4]);
    assert_eq!(
        read("qwen2", json!({"use_sliding_window": true, "num_hidden_layers": 30}))
            .unwrap()
            .windows[26..],
        [None, None, Some(4096), Some(4096)]
    );
    let from_1 = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1});
    assert_eq!(windows("qwen3", from_1), [None, Some(8), Some(8), Some(8)]);
    let types =
        json!(["sliding_attention", "full_attention", "full_attention", "sliding_attention"]);
    let typed = json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": types});
    assert_eq!(windows("qwen2", typed.clone()), [Some(8), None, None, Some(8)]);
    assert_eq!(windows("qwen2", json!({"sliding_window": 8, "layer_types": types})), [None; 4]);
    // Llama has no windows; Mistral has them in all layers.
    assert_eq!(windows("llama", used), []);
    assert_eq!(windows("llama", typed), []);
    assert_eq!(windows("mistral", json!({"sliding_window": 8})), [Some(8); 4]);
    assert_eq!(windows("mistral", json!({"sliding_window": null})), [None; 4]);
    assert_eq!(windows("mistral", json!({})), [Some(4096); 4]);
    let odd = json!({"use_sliding_window": true, "layer_types": vec!["chunked_attention"; 4]});
    assert!(read("qwen2", odd).unwrap_err().contains("chunked_attention"));
    let short = json!({"use_sliding_window": true, "layer_types": ["full_attention"]});
    assert!(read("qwen2", short).unwrap_err().contains("layer_types: expected 4 entries, got 1"));
}

#[test]
fn absent_fields_have_the_values_of_transformers() {
    let qwen3 = read("qwen3", json!({})).unwrap();
    assert_eq!((qwen3.head_dim, qwen3.norm_eps, qwen3.context_length), (128, 1e-6, 32_768));
    let llama = read("llama", json!({})).unwrap();
    assert_eq!((llama.head_dim, llama.rope.theta, llama.context_length), (16, 10_000.0, 2048));
    assert_eq!((llama.bos, llama.eos), (Some(1), vec![2]));
    assert_eq!(read("llama", json!({"num_key_value_heads": null})).unwrap().kv_heads, 4);
    let biased = json!({"attention_bias": true, "mlp_bias": true});
    let of = |family| {
        read(family, biased.clone()).map(|c| (c.qkv_bias, c.out_bias, c.mlp_bias)).unwrap()
    };
    assert_eq!(of("llama"), (true, true, true));
    assert_eq!(of("qwen3"), (true, true, false));
    assert_eq!(of("qwen2"), (true, false, false));
    assert_eq!(of("mistral"), (false, false, false));
}

#[test]
fn rope_settings_are_read_from_every_field_that_has_them() {
    let llama3 =
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4});
    let original = |config: Config| match config.rope.scaling {
        RopeScaling::Llama3 { original_context, .. } => original_context,
        other => panic!("{other:?}"),
    };
    let with = |more: Value| read("llama", more).unwrap();
    assert_eq!(
        original(with(json!({"rope_scaling": llama3, "max_position_embeddings": 4096}))),
        4096
    );
    assert_eq!(
        original(with(json!({"rope_scaling": llama3, "original_max_position_embeddings": 512}))),
        512
    );
    let both =
        with(json!({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}}));
    assert_eq!(both.rope.scaling, RopeScaling::Linear(2.0));
    let theta = with(
        json!({"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}),
    );
    assert_eq!((theta.rope.theta, theta.rope.scaling), (7.0, RopeScaling::None));
    assert_eq!(with(json!({"rope_theta": 5.0, "rope_scaling": null})).rope.theta, 5.0);
    for (more, named) in [
        (json!({"rope_scaling": {"type": "proportional", "factor": 2.0}}), "\"proportional\""),
        (json!({"rope_scaling": {"factor": 2.0}}), "neither \"rope_type\" nor \"type\""),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
        (
            json!({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}),
            "differ between layers",
        ),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor"),
    ] {
        let message = read("llama", more).unwrap_err();
        assert!(message.contains(named), "{message}");
    }
}

#[test]
fn fields_without_effect_accept_invalid_values() {
    let lenient = json!({
        "attention_bias": null, "mlp_bias": null, "tie_word_embeddings": null, "max_position_embeddings": 2048.0,
        "bos_token_id": [3, 4], "eos_token_id": -1, "head_dim": null, "hidden_act": null, "pretraining_tp": 2,
    });
    let config = read("llama", lenient).unwrap();
    assert_eq!((config.context_length, config.bos, config.eos), (2048, Some(3), vec![]));
    assert_eq!(read("llama", json!({"bos_token_id": -1})).unwrap().bos, None);
    let message = read("llama", json!({"num_hidden_layers": "two"})).unwrap_err();
    assert!(
        message.contains("\"num_hidden_layers\": expected a whole number, got \"two\""),
        "{message}"
    );
    assert!(read("llama", json!({"num_hidden_layers": 2.5})).is_err());
}

#[test]
#[ignore = "needs the folder of fixtures/make_configs.py"]
fn random_configurations_give_the_logits_of_transformers_or_are_refused() {
    let folder = std::env::var_os("LONGCTX_CONFIGS").expect("LONGCTX_CONFIGS names a folder");
    let (mut equal, mut refused, mut largest) = (0, 0, 0f32);
    for entry in fs::read_dir(Path::new(&folder)).unwrap() {
        let folder = entry.unwrap().path();
        let model = match Transformer::from_folder(&folder, &LoadOptions::default()) {
            Ok(model) => model,
            Err(e) => {
                println!("{}: {e}", folder.display());
                refused += 1;
                continue;
            }
        };
        let error = common::error_of(&model, &folder);
        largest = largest.max(error);
        assert!(error <= 1e-4, "{}: {error}", folder.display());
        equal += 1;
    }
    println!("{equal} equal (largest difference {largest:e}), {refused} refused");
    assert!(equal >= 200);
}

/// Settings of latent attention and its experts that are unsupported, or that implementations
/// interpret differently, are refused.
#[test]
fn settings_of_deepseek_are_checked() {
    let small = json!({
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": null, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    });
    let with = |family: &str, name: &str, value: Value| {
        let mut config = small.clone();
        config[name] = value;
        read(family, config)
    };
    let config = with("deepseek_v3", "n_shared_experts", json!(2)).unwrap();
    assert_eq!((config.kv_heads, config.head_dim, config.rope.rotary_dims), (1, 24, 8));
    assert_eq!(config.attention(0).unwrap().value_dim, 16);
    let experts = config.experts.unwrap();
    assert_eq!((experts.shared_size, experts.dense_layers), (4096, vec![0]));
    let refused = [
        ("deepseek_v2", "norm_topk_prob", json!(true), "norm_topk_prob"),
        ("deepseek_v2", "topk_method", json!("noaux_tc"), "noaux_tc"),
        ("deepseek_v2", "scoring_func", json!("sigmoid"), "sigmoid"),
        ("deepseek_v3", "scoring_func", json!("softmax"), "softmax"),
        ("deepseek_v3", "moe_layer_freq", json!(2), "moe_layer_freq"),
        ("deepseek_v3", "num_key_value_heads", json!(2), "num_key_value_heads"),
        ("deepseek_v3", "qk_rope_head_dim", json!(7), "head_dim"),
        ("deepseek_v3", "v_head_dim", json!(0), "v_head_dim"),
        ("deepseek_v3", "kv_lora_rank", json!(1u64 << 40), "head_dim"),
        ("deepseek_v3", "n_group", json!(8), "n_group"),
        ("deepseek_v3", "topk_group", json!(5), "topk_group"),
        ("deepseek_v3", "num_experts_per_tok", json!(5), "topk_group"),
        ("deepseek_v3", "n_shared_experts", json!(1u64 << 40), "n_shared_experts"),
        ("deepseek_v3", "routed_scaling_factor", json!(0.0), "routed_scaling_factor"),
        (
            "deepseek_v3",
            "rope_scaling",
            json!({"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}),
            "mscale_all_dim",
        ),
    ];
    for (family, name, value, expected) in refused {
        let message = with(family, name, value).expect_err(name);
        assert!(message.contains(expected), "{name}: {message}");
    }
}

/// Implementations of OLMo-3 apply a single `rope_theta` to different layers, so it is refused.
#[test]
fn a_single_base_of_olmo_3_is_refused() {
    let bases = |more: Value| {
        let config = read("olmo3", more)?;
        Ok::<_, String>((config.rope.theta, config.windowed_rope.map(|rope| rope.theta)))
    };
    assert_eq!(bases(json!({})), Ok((500_000.0, Some(500_000.0))));
    assert!(bases(json!({"rope_theta": 10_000.0})).unwrap_err().contains("rope_theta 10000"));
    let local = json!({"sliding_attention": {"rope_type": "default", "rope_theta": 7.0}});
    let both = json!({"rope_theta": 9.0, "rope_parameters": local});
    assert_eq!(bases(both), Ok((9.0, Some(7.0))));
    let flat = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}});
    assert!(bases(flat).unwrap_err().contains("OLMo-3"));
}
