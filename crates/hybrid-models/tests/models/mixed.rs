//! All mixers in one stack of random weights.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

pub type Tensors = HashMap<String, Tensor>;

/// Returns a stack with hidden size `hidden` and heads of `head_dim` channels in RWKV-5 and
/// Mamba-2, which also has `head_dim` states; the second and the last layer are attention.
pub fn mixed(hidden: usize, head_dim: usize) -> (Value, Tensors) {
    let layers = json!([
        ["mamba"],
        ["attention", "mlp"],
        ["rwkv5", "channel_mix"],
        ["mamba2"],
        ["rg_lru", "mlp"],
        ["attention"]
    ]);
    let config = json!({
        "model_type": "hybrid", "vocab_size": 50, "hidden_size": hidden, "layers": layers,
        "attention": { "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32 },
        "mamba2": { "state_size": head_dim, "head_dim": head_dim }, "mlp": { "intermediate_size": 40 },
        "rg_lru": { "num_heads": 2 },
    });
    let mut rng = StdRng::seed_from_u64(5);
    let mut random = |mean: f32, spread: f32, shape: &[usize]| {
        // Uniform, with this standard deviation.
        let half = spread * 3f32.sqrt();
        let count = shape.iter().product();
        let numbers = (0..count).map(|_| rng.random_range(mean - half..mean + half)).collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    };
    let mut tensors = Tensors::from([
        ("embed.weight".into(), random(0.0, 1.0, &[50, hidden])),
        ("final_norm.weight".into(), random(1.0, 0.1, &[hidden])),
    ]);
    // 0.2 at 32 channels.
    let spread = 0.2 * (32.0 / hidden as f32).sqrt();
    for (i, blocks) in config["layers"].as_array().unwrap().iter().enumerate() {
        for kind in blocks.as_array().unwrap().iter().map(|kind| kind.as_str().unwrap()) {
            let name = format!("layers.{i}.{kind}");
            tensors.insert(format!("{name}_norm.weight"), random(1.0, 0.1, &[hidden]));
            for (part, shape) in block(kind, hidden, head_dim) {
                let spread = if shape.len() > 1 { spread } else { 0.2 };
                tensors.insert(format!("{name}.{part}"), random(0.0, spread, &shape));
            }
        }
    }
    (config, tensors)
}

/// Returns names and shapes of a block's tensors.
fn block(kind: &str, h: usize, d: usize) -> Vec<(&'static str, Vec<usize>)> {
    let (inner, rank) = (2 * h, h.div_ceil(16));
    match kind {
        "mamba" => vec![
            ("in_proj.weight", vec![2 * inner, h]),
            ("conv1d.weight", vec![inner, 1, 4]),
            ("conv1d.bias", vec![inner]),
            ("x_proj.weight", vec![rank + 32, inner]),
            ("dt_proj.weight", vec![inner, rank]),
            ("dt_proj.bias", vec![inner]),
            ("A_log", vec![inner, 16]),
            ("D", vec![inner]),
            ("out_proj.weight", vec![h, inner]),
        ],
        "mamba2" => vec![
            ("in_proj.weight", vec![2 * inner + 2 * d + inner / d, h]),
            ("conv1d.weight", vec![inner + 2 * d, 1, 4]),
            ("conv1d.bias", vec![inner + 2 * d]),
            ("dt_bias", vec![inner / d]),
            ("A_log", vec![inner / d]),
            ("D", vec![inner / d]),
            ("norm.weight", vec![inner]),
            ("out_proj.weight", vec![h, inner]),
        ],
        "attention" => vec![
            ("q_proj.weight", vec![128, h]),
            ("k_proj.weight", vec![64, h]),
            ("v_proj.weight", vec![64, h]),
            ("o_proj.weight", vec![h, 128]),
        ],
        "mlp" => vec![
            ("gate_proj.weight", vec![40, h]),
            ("up_proj.weight", vec![40, h]),
            ("down_proj.weight", vec![h, 40]),
        ],
        "rwkv5" => vec![
            ("time_mix_r", vec![h]),
            ("time_mix_k", vec![h]),
            ("time_mix_v", vec![h]),
            ("time_mix_g", vec![h]),
            ("receptance.weight", vec![h, h]),
            ("key.weight", vec![h, h]),
            ("value.weight", vec![h, h]),
            ("gate.weight", vec![h, h]),
            ("output.weight", vec![h, h]),
            ("time_decay", vec![h / d, d]),
            ("time_faaaa", vec![h / d, d]),
            ("ln_x.weight", vec![h]),
            ("ln_x.bias", vec![h]),
        ],
        "channel_mix" => vec![
            ("time_mix_k", vec![h]),
            ("time_mix_r", vec![h]),
            ("key.weight", vec![60, h]),
            ("value.weight", vec![h, 60]),
            ("receptance.weight", vec![h, h]),
        ],
        _ => vec![
            ("linear_y.weight", vec![h, h]),
            ("linear_y.bias", vec![h]),
            ("linear_x.weight", vec![h, h]),
            ("linear_x.bias", vec![h]),
            ("linear_out.weight", vec![h, h]),
            ("linear_out.bias", vec![h]),
            ("conv_1d.weight", vec![h, 1, 4]),
            ("conv_1d.bias", vec![h]),
            ("rg_lru.recurrent_param", vec![h]),
            ("rg_lru.recurrent_gate_weight", vec![2, h / 2, h / 2]),
            ("rg_lru.recurrent_gate_bias", vec![2, h / 2]),
            ("rg_lru.input_gate_weight", vec![2, h / 2, h / 2]),
            ("rg_lru.input_gate_bias", vec![2, h / 2]),
        ],
    }
}
