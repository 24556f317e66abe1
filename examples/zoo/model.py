"""A stack of residual blocks with the `hybrid` layout of `hybrid-models`."""

import torch
import torch.nn.functional as F
from torch import nn

import mixers


class Mlp(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def block(name, config):
    """Returns the module of a block; `config` is the content of config.json."""
    hidden, head_dim = config["hidden_size"], config["attention"]["head_dim"]
    if name == "attention":
        a = config["attention"]
        return mixers.Attention(
            hidden, a["num_attention_heads"], a["num_key_value_heads"], head_dim, a.get("sliding_window")
        )
    if name == "mlp":
        return Mlp(hidden, config["mlp"]["intermediate_size"])
    if name == "mamba":
        return mixers.Mamba(hidden)
    if name == "mamba2":
        return mixers.Mamba2(hidden, config["mamba2"]["state_size"], config["mamba2"]["head_dim"])
    if name == "rg_lru":
        return mixers.RgLru(hidden, config["rg_lru"]["num_heads"])
    if name == "rwkv5":
        return mixers.Rwkv5(hidden, head_dim)
    raise ValueError(f"no block is called {name!r}")


class Layer(nn.ModuleDict):
    """Applies x + block(norm(x)) for each block."""

    def __init__(self, names, config):
        super().__init__()
        self.names = names
        for name in names:
            self[f"{name}_norm"] = nn.RMSNorm(config["hidden_size"], eps=config["norm_eps"])
            self[name] = block(name, config)

    def forward(self, x):
        for name in self.names:
            x = x + self[name](self[f"{name}_norm"](x))
        return x


class Model(nn.Module):
    """A model with the tensor names of the `hybrid` layout; the head is the embedding."""

    def __init__(self, config):
        super().__init__()
        hidden = config["hidden_size"]
        self.config = config
        self.embed = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(Layer(names, config) for names in config["layers"])
        self.final_norm = nn.RMSNorm(hidden, eps=config["norm_eps"])
        self.initialize()

    def initialize(self):
        nn.init.normal_(self.embed.weight, std=0.02)
        depth = 2 * len(self.layers)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "linear_out.weight", "output.weight")):
                nn.init.normal_(p, std=0.02 / depth**0.5)
            elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def hidden(self, tokens):
        """Returns the input of the head."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)

    def forward(self, tokens):
        return F.linear(self.hidden(tokens), self.embed.weight)


def config(layers, vocab_size, hidden, inner, heads=4, kv_heads=2, window=None):
    """Returns a config. `layers`: the mixer of each layer; a gated feed-forward block follows
    each."""
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads}
    if window is not None:
        attention["sliding_window"] = window
    return {
        "model_type": "hybrid",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "norm_eps": 1e-5,
        "layers": [[mixer, "mlp"] for mixer in layers],
        "attention": attention,
        "mamba2": {"state_size": 64, "head_dim": hidden // heads},
        "rg_lru": {"num_heads": heads},
        "mlp": {"intermediate_size": inner},
        "eos_token_id": [0, 3],
    }


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in Model(config).parameters())
