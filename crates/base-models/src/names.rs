//! The names of an architecture's tensors.

/// The names of an architecture's tensors, without `.weight` and `.bias`. Names within a layer
/// follow the prefix `layers` and the layer's number.
#[derive(Debug)]
pub(crate) struct Names {
    pub embedding: &'static str,
    pub norm: &'static str,
    pub head: &'static str,
    pub layers: &'static str,
    pub attention_norm: &'static str,
    /// The norm of the attention's output.
    pub attention_post_norm: &'static str,
    pub query: &'static str,
    pub key: &'static str,
    pub value: &'static str,
    /// The fused matrix of queries, keys and values, in checkpoints that have it.
    pub query_key_value: &'static str,
    pub query_norm: &'static str,
    pub key_norm: &'static str,
    pub out: &'static str,
    /// Latent attention: the down- and up-projection of queries, and their norm.
    pub query_down: &'static str,
    pub query_down_norm: &'static str,
    pub query_up: &'static str,
    /// The projection to the latent and the rotated part of the keys; the latent's norm; the
    /// up-projection to keys and values of all heads.
    pub latent: &'static str,
    pub latent_norm: &'static str,
    pub latent_up: &'static str,
    pub feed_forward_norm: &'static str,
    /// The norm of the feed-forward block's output.
    pub feed_forward_post_norm: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    /// The fused matrix of gate and up, in checkpoints that have it.
    pub gate_up: &'static str,
    pub down: &'static str,
    pub router: &'static str,
    /// The bias that is added to the router's scores to choose experts. The name is complete: it
    /// has no suffix.
    pub router_bias: &'static str,
    /// The shared expert, which processes all tokens.
    pub shared_gate: &'static str,
    pub shared_up: &'static str,
    pub shared_down: &'static str,
    /// The experts' matrices. `{}` is the expert's number; without it, one tensor has all experts.
    pub expert_gate: &'static str,
    pub expert_up: &'static str,
    pub expert_down: &'static str,
}

/// The names of Llama and most other architectures in Hugging Face's checkpoints.
pub(crate) const LLAMA: Names = Names {
    embedding: "model.embed_tokens",
    norm: "model.norm",
    head: "lm_head",
    layers: "model.layers",
    attention_norm: "input_layernorm",
    attention_post_norm: "",
    query: "self_attn.q_proj",
    key: "self_attn.k_proj",
    value: "self_attn.v_proj",
    query_key_value: "self_attn.qkv_proj",
    query_norm: "self_attn.q_norm",
    key_norm: "self_attn.k_norm",
    out: "self_attn.o_proj",
    query_down: "self_attn.q_a_proj",
    query_down_norm: "self_attn.q_a_layernorm",
    query_up: "self_attn.q_b_proj",
    latent: "self_attn.kv_a_proj_with_mqa",
    latent_norm: "self_attn.kv_a_layernorm",
    latent_up: "self_attn.kv_b_proj",
    feed_forward_norm: "post_attention_layernorm",
    feed_forward_post_norm: "post_feedforward_layernorm",
    gate: "mlp.gate_proj",
    up: "mlp.up_proj",
    gate_up: "mlp.gate_up_proj",
    down: "mlp.down_proj",
    router: "mlp.gate",
    router_bias: "mlp.gate.e_score_correction_bias",
    shared_gate: "mlp.shared_experts.gate_proj",
    shared_up: "mlp.shared_experts.up_proj",
    shared_down: "mlp.shared_experts.down_proj",
    expert_gate: "mlp.experts.{}.gate_proj",
    expert_up: "mlp.experts.{}.up_proj",
    expert_down: "mlp.experts.{}.down_proj",
};

/// The names for blocks with norms before and after them, or only after them.
pub(crate) const POST_NORMS: Names = Names {
    attention_post_norm: "post_attention_layernorm",
    feed_forward_norm: "pre_feedforward_layernorm",
    ..LLAMA
};

/// llama.cpp's names.
pub(crate) const GGUF: Names = Names {
    embedding: "token_embd",
    norm: "output_norm",
    head: "output",
    layers: "blk",
    attention_norm: "attn_norm",
    attention_post_norm: "post_attention_norm",
    query: "attn_q",
    key: "attn_k",
    value: "attn_v",
    query_key_value: "attn_qkv",
    query_norm: "attn_q_norm",
    key_norm: "attn_k_norm",
    out: "attn_output",
    query_down: "attn_q_a",
    query_down_norm: "attn_q_a_norm",
    query_up: "attn_q_b",
    latent: "attn_kv_a_mqa",
    latent_norm: "attn_kv_a_norm",
    latent_up: "attn_kv_b",
    feed_forward_norm: "ffn_norm",
    feed_forward_post_norm: "post_ffw_norm",
    gate: "ffn_gate",
    up: "ffn_up",
    gate_up: "",
    down: "ffn_down",
    router: "ffn_gate_inp",
    router_bias: "exp_probs_b.bias",
    shared_gate: "ffn_gate_shexp",
    shared_up: "ffn_up_shexp",
    shared_down: "ffn_down_shexp",
    expert_gate: "ffn_gate_exps",
    expert_up: "ffn_up_exps",
    expert_down: "ffn_down_exps",
};

/// llama.cpp's names of Phi-3, where "up" contains gate and up.
pub(crate) const GGUF_FUSED: Names = Names { gate_up: "ffn_up", ..GGUF };
