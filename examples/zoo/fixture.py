"""Makes `crates/hybrid-models/tests/fixtures/zoo`: a tiny random stack of every mixer, and its logits as training computes them.

    python fixture.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import export
from model import Model, config

FOLDER = Path(__file__).parents[2] / "crates/hybrid-models/tests/fixtures/zoo"


@torch.no_grad()
def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
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
    export.hybrid(model.state_dict(), settings, FOLDER)
    logits = model(tokens)
    for p in model.parameters():
        p.copy_(p.bfloat16())
    expected = {"tokens": tokens, "logits": logits.contiguous(), "logits_of_bf16": model(tokens).contiguous()}
    save_file(expected, FOLDER / "expected.safetensors")
    print(f"logits up to {logits.abs().max():.2f}")


if __name__ == "__main__":
    main()
