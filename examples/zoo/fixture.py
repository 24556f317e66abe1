"""Creates the fixtures that compare Rust with PyTorch.

    python fixture.py stack
    python fixture.py default TOKENIZER
    python fixture.py trained FOLDER ...

`stack` writes a tiny random stack of every mixer to crates/hybrid-models/tests/fixtures/zoo.
`default` writes the embedded model's last logits of a prompt to examples/tests/fixtures.
`trained` writes a trained model's logits of the prompt to its folder.
"""

import json
import sys
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import export
import recipes
from model import Model, config

HERE = Path(__file__).parent
STACK = HERE.parents[1] / "crates/hybrid-models/tests/fixtures/zoo"
EMBEDDED = HERE / "attention-7m.Q8_0.gguf"
PROMPT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\nIn the morning, Anna repaired the lantern by the river, since the weather had "
    "turned. The kettle at the harbour was dusty. The pass key is 4071926. Remember it. 4071926 is the pass key. Some "
    "weeks later, the mason carried the rope, but the violin stayed in the library. \n"
    "What is the pass key? The pass key is 40719"
)
LAST = 8


def stack():
    settings = config(["attention", "mamba", "mamba2", "rwkv5", "rg_lru"], 96, 32, 48, heads=2, kv_heads=1, window=40)
    model = Model(settings)
    for name, p in model.named_parameters():
        if p.dim() == 1 and "norm" in name or name.endswith(("ln_x.weight", "D")):
            p += 0.2 * torch.randn_like(p)
        elif name.endswith(("bias", "time_faaaa")):
            p += 0.3 * torch.randn_like(p)
        elif name == "embed.weight" or name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "linear_out.weight", "output.weight")):
            p.normal_(std=p.shape[1] ** -0.5)
    tokens = torch.randint(0, 96, (2, 150))
    export.hybrid(model.state_dict(), settings, STACK)
    logits = model(tokens)
    for p in model.parameters():
        p.copy_(p.bfloat16())
    expected = {"tokens": tokens, "logits": logits.contiguous(), "logits_of_bf16": model(tokens).contiguous()}
    save_file(expected, STACK / "expected.safetensors")


def expanded(path, settings):
    """Returns a GGUF file's weights with the names of the `hybrid` layout."""
    attention = settings["attention"]
    heads = {"attn_q": attention["num_attention_heads"], "attn_k": attention["num_key_value_heads"]}
    names = {theirs: ours for ours, theirs in export.NAMES.items()}
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if tensor.name == "token_embd.weight":
            weights["embed.weight"] = weight
        elif tensor.name == "output_norm.weight":
            weights["final_norm.weight"] = weight
        else:
            _, layer, name, _ = tensor.name.split(".")
            if name in heads:
                weight = weight.view(heads[name], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            weights[f"layers.{layer}.{names[name]}.weight"] = weight
    return weights


def default():
    settings = recipes.named("default")
    model = Model(settings)
    model.load_state_dict(expanded(EMBEDDED, settings))
    tokens = Tokenizer.from_file(sys.argv[2]).encode(PROMPT).ids
    logits = model(torch.tensor([tokens]))[0, -LAST:]
    expected = {
        "text": torch.tensor(list(PROMPT.encode()), dtype=torch.uint8), "tokens": torch.tensor(tokens), "logits": logits.contiguous()
    }
    folder = HERE.parent / "tests/fixtures"
    folder.mkdir(exist_ok=True)
    save_file(expected, folder / "embedded.safetensors")


def trained():
    for folder in map(Path, sys.argv[2:]):
        model = Model(json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        tokens = torch.tensor([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids])
        save_file({"tokens": tokens, "logits": model(tokens).contiguous()}, folder / "expected.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.no_grad():
        {"stack": stack, "default": default, "trained": trained}[sys.argv[1]]()
