"""Adds the caches of longctx to candle-transformers' Llama, in a package outside this workspace.

    python examples/engines/candle_llama.py [FOLDER [MODEL.gguf]]

Copies `models/llama.rs` from the published candle-transformers crate into a new package, applies a
few replacements for each way of caching, counts the changed lines, builds, and compares logits with
the unchanged model, with random weights or those of a Llama in a GGUF file. The copy is not part of
this repository.
"""

import difflib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())

# The code that each variant adds, formatted like candle's code.
USE = "use longctx_core::{AttentionShape, Batch, KvCache, LayerSpec, Step};\n"
# One cache per layer. Keys are already rotated, so the spec has no rotary embedding.
MAKE = """fn layer(config: &Config, index: usize) -> Result<Box<dyn KvCache>> {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let shape = AttentionShape::new(heads, kv_heads, config.hidden_size / heads)?;
    let spec = LayerSpec::new(shape).at(index, config.num_hidden_layers);
    let format = Format::%s(Bits::Four, Bits::Four, 32, 64)?;
%s}

"""
# From [1, heads, tokens, head_dim] to [tokens, heads, head_dim], and back to one row per token.
ATTEND = """        if cache.use_kv_cache {
            let batch = &Batch::single(%s, seq_len)?;
            let rows = |x: &Tensor| x.squeeze(0)?.transpose(0, 1);
            let (q, k, v) = (&rows(&q)?, &rows(&k)?, &rows(&v)?);
            let y = cache.layers[block_idx].attend(&Step { batch, q, k, v })?;
            return self.o_proj.forward(&y.reshape((b_sz, seq_len, hidden_size))?);
        }
"""
FIELD = "    pub layers: Vec<Box<dyn KvCache>>,\n"
LAYERS = """            layers: (0..config.num_hidden_layers)
                .map(|index| layer(config, index))
                .collect::<Result<_>>()?,
"""
USE_KIVI = "use kv_quant::{Bits, Format, QuantCache};\n"
KIVI = "    Ok(Box::new(QuantCache::new(spec, format)?))\n"
USE_SNAP = """use kv_quant::{Bits, Format, QuantStore};
use token_drop::{Budget, PolicyCache, SnapKv};
"""
SNAP = """    let (store, policy) = (QuantStore::new(shape, format)?, SnapKv::new(32)?);
    let cache = PolicyCache::snap_kv(spec, store, policy, Budget::Ratio(0.5))?;
    Ok(Box::new(cache))
"""


class Way:
    """A variant of caching. One that forks has a field for the sequence of the next call."""

    def __init__(self, uses, flush, make, forks=False):
        self.uses, self.make = uses + USE, MAKE % (flush, make)
        self.attend = ATTEND % ("cache.seq" if forks else "0")
        self.fields = FIELD + ("    pub seq: u64,\n" if forks else "")
        self.inits = LAYERS + ("            seq: 0,\n" if forks else "")


WAYS = {
    "kivi": Way(USE_KIVI, "kivi", KIVI),
    "snapkv": Way(USE_SNAP, "kivi", SNAP),
    "paged": Way(USE_KIVI, "kivi_rolling", KIVI, forks=True),
}

# The workspace's profile; candle-transformers' other models are compiled without optimization.
PROFILE = """
[profile.dev]
opt-level = 1
debug = "line-tables-only"

[profile.dev.package."*"]
opt-level = 3
debug = false

[profile.dev.package.candle-transformers]
opt-level = 0
"""


def source():
    metadata = subprocess.check_output(["cargo", "metadata", "--format-version", "1"], cwd=ROOT)
    packages = json.loads(metadata)["packages"]
    package = next(p for p in packages if p["name"] == "candle-transformers")
    text = (pathlib.Path(package["manifest_path"]).parent / "src/models/llama.rs").read_text()
    text = text.replace("use super::with_tracing", "use candle_transformers::models::with_tracing")
    text = text.replace("crate::utils", "candle_transformers::utils")
    text = text.replace("use candle::", "use candle_core::")
    return package["version"], "#![allow(dead_code)]\n" + text


def replaced(text, old, new):
    assert text.count(old) == 1, f"{text.count(old)} times {old!r}: another version of candle?"
    return text.replace(old, new)


def patched(text, way):
    derive, head = "#[derive(Debug, Clone)]\n", "pub struct Cache {\n"
    text = replaced(text, derive + head, way.make + head + way.fields)
    standard = "use std::{collections::HashMap"
    text = replaced(text, standard, way.uses + standard)
    kvs = next(line for line in text.splitlines() if line.strip().startswith("kvs: vec!["))
    text = replaced(text, kvs + "\n", kvs + "\n" + way.inits)
    cached = "        if cache.use_kv_cache {\n            if let Some"
    return replaced(text, cached, way.attend + cached)


version, base = source()
(FOLDER / "src").mkdir(parents=True, exist_ok=True)
(FOLDER / "src/base.rs").write_text(base)
for name, way in WAYS.items():
    text = patched(base, way)
    (FOLDER / f"src/{name}.rs").write_text(text)
    lines = list(difflib.unified_diff(base.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
    added, gone = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    print(f"{name}: {added} lines added, {gone} removed")
shutil.copy(pathlib.Path(__file__).with_suffix(".rs"), FOLDER / "src/main.rs")
(FOLDER / "Cargo.toml").write_text(f"""[package]
name = "candle-llama"
version = "0.0.0"
edition = "2021"

[workspace]

[dependencies]
candle-core = "={version}"
candle-nn = "={version}"
candle-transformers = "={version}"
kv-quant = {{ path = "{ROOT}/crates/kv-quant" }}
longctx-core = {{ path = "{ROOT}/crates/core" }}
serde = {{ version = "1", features = ["derive"] }}
serde_json = "1"
token-drop = {{ path = "{ROOT}/crates/token-drop" }}
tracing = "0.1"

[features]
flash-attn = []
{PROFILE}""")
shutil.copy(ROOT / "Cargo.lock", FOLDER)
print(f"candle-transformers {version} in {FOLDER}", flush=True)
subprocess.run(["cargo", "run", "--quiet", "--", *sys.argv[2:]], cwd=FOLDER, check=True)
