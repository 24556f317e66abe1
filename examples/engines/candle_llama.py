"""Puts the caches of longctx into candle-transformers' own Llama, outside of this workspace.

    python examples/engines/candle_llama.py [FOLDER]

Copies `models/llama.rs` from the published candle-transformers crate into a new package, applies a
few replacements for each way of caching, counts the changed lines, builds, and compares logits with
the unchanged model. The copy is not part of this repository.
"""

import difflib
import json
import pathlib
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
# An engine that forks and rolls back calls the layers.
FORK = """impl Cache {
    pub fn each(&mut self, f: impl Fn(&mut dyn longctx_core::KvCache) -> longctx_core::Result<()>) -> Result<()> {
        Ok(self.layers.iter_mut().try_for_each(|layer| f(&mut **layer))?)
    }
}

"""
VARIANTS = {"kivi": (KIVI, ""), "snapkv": (SNAP, ""), "paged": (ROLLING, FORK)}

MAIN = """
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};

mod base;
mod kivi;
mod paged;
mod snapkv;

fn config() -> serde_json::Value {
    serde_json::json!({
        "hidden_size": 256, "intermediate_size": 512, "vocab_size": 500, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048,
    })
}

macro_rules! model {
    ($module:ident, $vars:expr) => {{
        let config: $module::LlamaConfig = serde_json::from_value(config()).unwrap();
        let config = config.into_config(false);
        let vb = VarBuilder::from_varmap($vars, DType::F32, &Device::Cpu);
        let model = $module::Llama::load(vb, &config).unwrap();
        let cache = $module::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
        (model, cache)
    }};
}

fn ids(from: usize, count: usize) -> Tensor {
    let ids: Vec<u32> = (from..from + count).map(|i| ((i * i * 31 + i * 17) % 500) as u32).collect();
    Tensor::from_vec(ids, (1, count), &Device::Cpu).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    let norm = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    norm((a - b).unwrap()) / norm(b.clone())
}

macro_rules! compare {
    ($module:ident, $vars:expr) => {{
        let ((base, mut base_cache), (model, mut cache)) = (model!(base, $vars), model!($module, $vars));
        let prompt = 400;
        let mut at = |from, count| {
            let want = base.forward(&ids(from, count), from, &mut base_cache).unwrap();
            distance(&model.forward(&ids(from, count), from, &mut cache).unwrap(), &want)
        };
        let first = at(0, prompt);
        let later = (prompt..prompt + 50).map(|i| at(i, 1)).fold(0.0, f32::max);
        let held: usize = cache.layers.iter().map(|layer| layer.seq_footprint(0).total()).sum();
        let dense = 4 * 450 * 2 * 2 * 64 * 2;
        println!("{}: prompt {first:.1e}, the worst of 50 decoded tokens {later:.1e}; {:.2}x smaller than f16",
                 stringify!($module), dense as f64 / held as f64);
        assert!(first < 1e-4 && later < 0.5);
    }};
}

fn main() {
    let vars = VarMap::new();
    drop(model!(base, &vars));
    compare!(kivi, &vars);
    compare!(snapkv, &vars);
    compare!(paged, &vars);
    // Four draft tokens of which three are rejected, and a second answer to the same prompt.
    let (model, mut cache) = model!(paged, &vars);
    model.forward(&ids(0, 400), 0, &mut cache).unwrap();
    cache.each(|layer| layer.fork(0, 1)).unwrap();
    model.forward(&ids(900, 4), 400, &mut cache).unwrap();
    cache.each(|layer| layer.truncate(0, 401)).unwrap();
    let after = model.forward(&ids(901, 1), 401, &mut cache).unwrap();
    let (model, mut plain) = model!(paged, &vars);
    model.forward(&ids(0, 400), 0, &mut plain).unwrap();
    model.forward(&ids(900, 1), 400, &mut plain).unwrap();
    let want = model.forward(&ids(901, 1), 401, &mut plain).unwrap();
    cache.seq = 1;
    model.forward(&ids(900, 1), 400, &mut cache).unwrap();
    let forked = model.forward(&ids(901, 1), 401, &mut cache).unwrap();
    println!("paged: after a rollback {:.1e}, in a fork {:.1e} from never having gone astray",
             distance(&after, &want), distance(&forked, &want));
    assert!(distance(&after, &want) < 1e-3 && distance(&forked, &want) < 1e-3);
}
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


def patched(text, make, more):
    text = replaced(text, "#[derive(Debug, Clone)]\npub struct Cache {\n", more + "pub struct Cache {\n" + FIELDS)
    kvs = next(line for line in text.splitlines() if line.strip().startswith("kvs: vec!["))
    text = replaced(text, kvs + "\n", kvs + "\n" + MAKE.format(make=make) + "            seq: 0,\n")
    return replaced(text, "        if cache.use_kv_cache {\n            if let Some", ATTEND + "        if cache.use_kv_cache {\n            if let Some")


version, base = source()
(FOLDER / "src").mkdir(parents=True, exist_ok=True)
(FOLDER / "src/base.rs").write_text(base)
for name, (make, more) in VARIANTS.items():
    text = patched(base, make, more)
    (FOLDER / f"src/{name}.rs").write_text(text)
    lines = list(difflib.unified_diff(base.splitlines(), text.splitlines(), n=0, lineterm=""))[2:]
    added, gone = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    print(f"{name}: {added} lines added, {gone} removed")
(FOLDER / "src/main.rs").write_text(MAIN)
crates = {name: f'{{ path = "{ROOT}/crates/{folder}" }}' for name, folder in
          [("kv-quant", "kv-quant"), ("longctx-core", "core"), ("token-drop", "token-drop")]}
(FOLDER / "Cargo.toml").write_text(
    '[package]\nname = "candle-llama"\nversion = "0.0.0"\nedition = "2021"\n\n[workspace]\n\n[dependencies]\n'
    + "".join(f'{name} = "={version}"\n' for name in ["candle-core", "candle-nn", "candle-transformers"])
    + "".join(f"{name} = {spec}\n" for name, spec in crates.items())
    + 'serde = { version = "1", features = ["derive"] }\nserde_json = "1"\ntracing = "0.1"\n')
print(f"candle-transformers {version} in {FOLDER}", flush=True)
subprocess.run(["cargo", "run", "--quiet", "--release"], cwd=FOLDER, check=True)
