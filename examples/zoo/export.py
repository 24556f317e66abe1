"""Writes a trained stack as a folder in the `hybrid` layout, or as a GGUF file.

A GGUF file is possible only if all mixers are attention.

    python export.py FOLDER FILE.gguf
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NAMES = {
    "attention_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Token types in GGUF files.
NORMAL, CONTROL = 1, 3


def hybrid(weights, config, folder, tokenizer=None, matrices=torch.float32):
    """Writes the folder. `weights`: the model's `state_dict`; `matrices`: the dtype of matrices."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = lambda t: t.to(matrices) if t.dim() == 2 else t
    save_file({name: kept(t).contiguous().clone() for name, t in weights.items()}, folder / "model.safetensors")
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.json")
    # Written last, so that a folder with this file is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def interleaved(weight, heads):
    """Reorders a head's rows to llama.cpp's adjacent pairs: (0, 1) instead of (0, head_dim / 2)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def to_gguf(folder, path, context_length):
    """Writes matrices in Q8_0 and norms in f32. The pre-tokenizer is SmolLM's."""
    import gguf

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    attention = config["attention"]
    heads, kv_heads = attention["num_attention_heads"], attention["num_key_value_heads"]

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("longctx zoo: attention")
    writer.add_license("MIT OR Apache-2.0")
    writer.add_context_length(context_length)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(len(config["layers"]))
    writer.add_feed_forward_length(config["mlp"]["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(attention["head_dim"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config["norm_eps"])

    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)

    def add(name, tensor, quantized):
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", weights["embed.weight"], True)
    add("output_norm.weight", weights["final_norm.weight"], False)
    for i in range(len(config["layers"])):
        for ours, theirs in NAMES.items():
            weight = weights[f"layers.{i}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(weight, heads if theirs == "attn_q" else kv_heads)
            add(f"blk.{i}.{theirs}.weight", weight, weight.dim() == 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    to_gguf(sys.argv[1], sys.argv[2], context_length=4096)
