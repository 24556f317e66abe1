//! Recurrent models with the sizes of published ones: the content of `config.json` and the tensors
//! of the checkpoint.

use serde_json::{Value, json};

/// The configuration and tensor shapes of a model, without weights.
pub struct Outline {
    /// `config.json`.
    pub config: Value,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// The name, the mean of the numbers and the shape of each tensor.
    pub tensors: Vec<(String, f32, Vec<usize>)>,
}

impl Outline {
    fn new(config: Value, vocab: usize) -> Self {
        Self { config, vocab, tensors: Vec::new() }
    }

    fn add(&mut self, name: impl Into<String>, mean: f32, shape: &[usize]) {
        self.tensors.push((name.into(), mean, shape.to_vec()));
    }
}

/// mamba-130m: 768 channels, 24 layers; mamba-2.8b: 2,560 and 64.
pub fn mamba(hidden: usize, layers: usize) -> Outline {
    let (inner, vocab, rank) = (2 * hidden, 50280, hidden / 16);
    let config = json!({ "d_model": hidden, "n_layer": layers, "vocab_size": vocab, "pad_vocab_size_multiple": 8 });
    let mut model = Outline::new(config, vocab);
    model.add("backbone.embedding.weight", 0.0, &[vocab, hidden]);
    model.add("backbone.norm_f.weight", 1.0, &[hidden]);
    for layer in 0..layers {
        let name = format!("backbone.layers.{layer}");
        model.add(format!("{name}.norm.weight"), 1.0, &[hidden]);
        for (part, mean, shape) in [
            ("in_proj.weight", 0.0, vec![2 * inner, hidden]),
            ("conv1d.weight", 0.0, vec![inner, 1, 4]),
            ("conv1d.bias", 0.0, vec![inner]),
            ("x_proj.weight", 0.0, vec![rank + 32, inner]),
            ("dt_proj.weight", 0.0, vec![inner, rank]),
            ("dt_proj.bias", -3.0, vec![inner]),
            ("A_log", 1.0, vec![inner, 16]),
            ("D", 1.0, vec![inner]),
            ("out_proj.weight", 0.0, vec![hidden, inner]),
        ] {
            model.add(format!("{name}.mixer.{part}"), mean, &shape);
        }
    }
    model
}

/// mamba2-130m: 768 channels, 24 layers; mamba2-2.7b: 2,560 and 64.
pub fn mamba2(hidden: usize, layers: usize) -> Outline {
    let (inner, states, vocab) = (2 * hidden, 128, 50288);
    let (heads, convolved) = (inner / 64, inner + 2 * states);
    let config = json!({
        "model_type": "mamba2", "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocab,
        "state_size": states, "head_dim": 64, "n_groups": 1, "expand": 2,
    });
    let mut model = Outline::new(config, vocab);
    model.add("backbone.embeddings.weight", 0.0, &[vocab, hidden]);
    model.add("backbone.norm_f.weight", 1.0, &[hidden]);
    for layer in 0..layers {
        let name = format!("backbone.layers.{layer}");
        model.add(format!("{name}.norm.weight"), 1.0, &[hidden]);
        for (part, mean, shape) in [
            ("in_proj.weight", 0.0, vec![inner + convolved + heads, hidden]),
            ("conv1d.weight", 0.0, vec![convolved, 1, 4]),
            ("conv1d.bias", 0.0, vec![convolved]),
            ("dt_bias", -3.0, vec![heads]),
            ("A_log", 1.0, vec![heads]),
            ("D", 1.0, vec![heads]),
            ("norm.weight", 1.0, vec![inner]),
            ("out_proj.weight", 0.0, vec![hidden, inner]),
        ] {
            model.add(format!("{name}.mixer.{part}"), mean, &shape);
        }
    }
    model
}

/// RWKV-5: the 169M models have 768 channels, 2,688 in the channel mixing, and 12 layers; the 7B
/// model has 4,096, 14,336 and 32.
pub fn rwkv5(hidden: usize, inner: usize, layers: usize) -> Outline {
    let vocab = 65536;
    // candle interchanges the head size and the number of heads.
    let config = json!({
        "model_type": "rwkv5", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "attention_hidden_size": hidden, "num_attention_heads": 64, "head_size": 64, "intermediate_size": inner,
        "layer_norm_epsilon": 1e-5, "rescale_every": 6,
    });
    let mut model = Outline::new(config, vocab);
    model.add("rwkv.embeddings.weight", 0.0, &[vocab, hidden]);
    model.add("head.weight", 0.0, &[vocab, hidden]);
    let mut norms = vec!["rwkv.ln_out".to_owned(), "rwkv.blocks.0.pre_ln".into()];
    for layer in 0..layers {
        let block = format!("rwkv.blocks.{layer}");
        norms.extend(["ln1", "ln2", "attention.ln_x"].map(|norm| format!("{block}.{norm}")));
        for part in ["receptance", "key", "value", "gate", "output"] {
            model.add(format!("{block}.attention.{part}.weight"), 0.0, &[hidden, hidden]);
        }
        for part in ["key", "value", "receptance", "gate"] {
            model.add(format!("{block}.attention.time_mix_{part}"), 0.5, &[1, 1, hidden]);
        }
        for (part, mean) in [("time_decay", -1.0), ("time_faaaa", 0.1)] {
            model.add(format!("{block}.attention.{part}"), mean, &[hidden / 64, 64]);
        }
        let feed_forward = format!("{block}.feed_forward");
        for part in ["key", "receptance"] {
            model.add(format!("{feed_forward}.time_mix_{part}"), 0.5, &[1, 1, hidden]);
        }
        model.add(format!("{feed_forward}.key.weight"), 0.0, &[inner, hidden]);
        model.add(format!("{feed_forward}.value.weight"), 0.0, &[hidden, inner]);
        model.add(format!("{feed_forward}.receptance.weight"), 0.0, &[hidden, hidden]);
    }
    for norm in norms {
        model.add(format!("{norm}.weight"), 1.0, &[hidden]);
        model.add(format!("{norm}.bias"), 0.0, &[hidden]);
    }
    model
}

/// RecurrentGemma-2B with `layers` layers, of which every third is attention, and `vocab` of its
/// 256,000 tokens.
pub fn recurrent_gemma(layers: usize, vocab: usize) -> Outline {
    let (hidden, inner, heads, head_dim) = (2560, 7680, 10, 256);
    let config = json!({
        "model_type": "recurrent_gemma", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": 2 * inner, "num_attention_heads": heads, "num_key_value_heads": 1, "head_dim": head_dim,
        "lru_width": hidden, "attention_window_size": 2048, "conv1d_width": 4, "logits_soft_cap": 30.0,
        "hidden_activation": "gelu_pytorch_tanh", "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "block_types": ["recurrent", "recurrent", "attention"], "attention_bias": false,
    });
    let mut model = Outline::new(config, vocab);
    model.add("model.embed_tokens.weight", 0.0, &[vocab, hidden]);
    model.add("model.final_norm.weight", 0.0, &[hidden]);
    for layer in 0..layers {
        let name = format!("model.layers.{layer}");
        for norm in ["temporal_pre_norm", "channel_pre_norm"] {
            model.add(format!("{name}.{norm}.weight"), 0.0, &[hidden]);
        }
        for (part, out, from) in
            [("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner)]
        {
            model.add(format!("{name}.mlp_block.{part}.weight"), 0.0, &[out, from]);
            model.add(format!("{name}.mlp_block.{part}.bias"), 0.0, &[out]);
        }
        let block = format!("{name}.temporal_block");
        if layer % 3 == 2 {
            for (part, out) in [("q", heads), ("k", 1), ("v", 1), ("o", heads)] {
                model.add(format!("{block}.{part}_proj.weight"), 0.0, &[out * head_dim, hidden]);
            }
            model.add(format!("{block}.o_proj.bias"), 0.0, &[hidden]);
            continue;
        }
        for part in ["linear_y", "linear_x", "linear_out"] {
            model.add(format!("{block}.{part}.weight"), 0.0, &[hidden, hidden]);
            model.add(format!("{block}.{part}.bias"), 0.0, &[hidden]);
        }
        model.add(format!("{block}.conv_1d.weight"), 0.0, &[hidden, 1, 4]);
        model.add(format!("{block}.conv_1d.bias"), 0.0, &[hidden]);
        let size = hidden / heads;
        model.add(format!("{block}.rg_lru.recurrent_param"), 0.5, &[hidden]);
        for gate in ["input_gate", "recurrent_gate"] {
            let gate = format!("{block}.rg_lru.{gate}");
            model.add(format!("{gate}_weight"), 0.0, &[heads, size, size]);
            model.add(format!("{gate}_bias"), 0.0, &[heads, size]);
        }
    }
    model
}
