"""Puts the caches of longctx into candle-transformers' own Llama, outside of this workspace.

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

# One cache for each layer, made with the model's other state. Keys come rotated: no rope in the spec.
MAKE = """            layers: (0..config.num_hidden_layers)
                .map(|i| {{
                    let head_dim = config.hidden_size / config.num_attention_heads;
                    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
                    let shape = longctx_core::AttentionShape::new(heads, kv_heads, head_dim)?;
                    let spec = longctx_core::LayerSpec::new(shape).at(i, config.num_hidden_layers);
                    {make}
                }})
                .collect::<longctx_core::Result<_>>()?,
"""
# Attention of the call's tokens: [batch of 1, heads, tokens, head_dim] becomes [tokens, heads, head_dim].
ATTEND = """        if cache.use_kv_cache {
            let batch = longctx_core::Batch::single(cache.seq, seq_len)?;
            let rows = |x: &Tensor| x.squeeze(0)?.transpose(0, 1);
            let (q, k, v) = (rows(&q)?, rows(&k)?, rows(&v)?);
            let step = longctx_core::Step { batch: &batch, q: &q, k: &k, v: &v };
            let y = cache.layers[block_idx].attend(&step)?;
            return self.o_proj.forward(&y.reshape((b_sz, seq_len, hidden_size))?);
        }
"""
FIELDS = """    pub layers: Vec<Box<dyn longctx_core::KvCache>>,
    pub seq: u64,
"""
FORMAT = "let format = kv_quant::Format::kivi(kv_quant::Bits::Four, kv_quant::Bits::Four, 32, 64)?;"
KIVI = FORMAT + """
                    let cache = kv_quant::QuantCache::new(spec, format)?;
                    Ok(Box::new(cache) as Box<dyn longctx_core::KvCache>)"""
SNAP = FORMAT + """
                    let store = kv_quant::QuantStore::new(shape, format)?;
                    let (policy, half) = (token_drop::SnapKv::new(32)?, token_drop::Budget::Ratio(0.5));
                    let cache = token_drop::PolicyCache::snap_kv(spec, store, policy, half)?;
                    Ok(Box::new(cache) as Box<dyn longctx_core::KvCache>)"""
ROLLING = KIVI.replace("Format::kivi(", "Format::kivi_rolling(")
VARIANTS = {"kivi": KIVI, "snapkv": SNAP, "paged": ROLLING}

# As the workspace's, but for what nothing here runs: the crate's other models.
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
    meta = json.loads(subprocess.check_output(["cargo", "metadata", "--format-version", "1"], cwd=ROOT))
    package = next(p for p in meta["packages"] if p["name"] == "candle-transformers")
    text = (pathlib.Path(package["manifest_path"]).parent / "src/models/llama.rs").read_text()
    text = text.replace("use super::with_tracing", "use candle_transformers::models::with_tracing")
    text = text.replace("crate::utils", "candle_transformers::utils").replace("use candle::", "use candle_core::")
    return package["version"], "#![allow(dead_code)]\n" + text


def replaced(text, old, new):
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times: another version of candle?"
    return text.replace(old, new)


def patched(text, make):
    text = replaced(text, "#[derive(Debug, Clone)]\npub struct Cache {\n", "pub struct Cache {\n" + FIELDS)
    kvs = next(line for line in text.splitlines() if line.strip().startswith("kvs: vec!["))
    text = replaced(text, kvs + "\n", kvs + "\n" + MAKE.format(make=make) + "            seq: 0,\n")
    return replaced(text, "        if cache.use_kv_cache {\n            if let Some", ATTEND + "        if cache.use_kv_cache {\n            if let Some")


version, base = source()
(FOLDER / "src").mkdir(parents=True, exist_ok=True)
(FOLDER / "src/base.rs").write_text(base)
for name, make in VARIANTS.items():
    text = patched(base, make)
    (FOLDER / f"src/{name}.rs").write_text(text)
    lines = list(difflib.unified_diff(base.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
    added, gone = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    print(f"{name}: {added} lines added, {gone} removed")
shutil.copy(pathlib.Path(__file__).with_suffix(".rs"), FOLDER / "src/main.rs")
crates = {name: f'{{ path = "{ROOT}/crates/{folder}" }}' for name, folder in
          [("kv-quant", "kv-quant"), ("longctx-core", "core"), ("token-drop", "token-drop")]}
(FOLDER / "Cargo.toml").write_text(
    '[package]\nname = "candle-llama"\nversion = "0.0.0"\nedition = "2021"\n\n[workspace]\n\n[dependencies]\n'
    + "".join(f'{name} = "={version}"\n' for name in ["candle-core", "candle-nn", "candle-transformers"])
    + "".join(f"{name} = {spec}\n" for name, spec in crates.items())
    + 'serde = { version = "1", features = ["derive"] }\nserde_json = "1"\ntracing = "0.1"\n' + PROFILE)
shutil.copy(ROOT / "Cargo.lock", FOLDER)
print(f"candle-transformers {version} in {FOLDER}", flush=True)
subprocess.run(["cargo", "run", "--quiet", "--", *sys.argv[2:]], cwd=FOLDER, check=True)
