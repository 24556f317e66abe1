//! The needle test with a real model against kvpress 0.5.5 on the same model: what a quarter of the cache keeps, and what is written
//! (fixtures/make_kvpress_needle.py). kvpress computes with the weights dequantized to f32; here the activations are quantized too, as the
//! model's file has it, so that scores which are nearly equal may change places.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base_models::{LoadOptions, Pretrained};
use candle_core::{DType, Device, Tensor};
use longctx_core::{
    CausalLm, DenseCache, DenseStore, EvictionPolicy, Footprint, KvCache, LayerShape, Logits,
    Partial, Result, Step,
};
use longctx_examples::fan::Fan;
use token_drop::*;

const POLICIES: [&str; 7] =
    ["snap-kv", "expected-attention", "tova", "k-norm", "key-diff", "lag-kv", "h2o"];

fn policy(name: &str) -> Result<Box<dyn EvictionPolicy>> {
    Ok(match name {
        "snap-kv" => Box::new(SnapKv::new(32)?),
        "expected-attention" => Box::new(ExpectedAttention::default()),
        "tova" => Box::new(Tova::default()),
        "k-norm" => Box::new(KNorm),
        "key-diff" => Box::new(KeyDiff),
        "lag-kv" => Box::new(LagKv::new(4, 64)?),
        _ => Box::new(H2o::default()),
    })
}

/// The positions that each kv head keeps, by layer and policy.
type Kept = Arc<Mutex<HashMap<(usize, &'static str), Vec<Vec<u32>>>>>;

/// A cache that tells what it kept of the prompt.
struct Noted {
    cache: PolicyCache<DenseStore, Box<dyn EvictionPolicy>>,
    of: (usize, &'static str),
    kept: Kept,
}

impl KvCache for Noted {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        self.cache.attend(step)
    }
    fn take_prompt(&mut self, step: &Step<'_>, whole: &Partial) -> Result<()> {
        self.cache.take_prompt(step, whole)?;
        self.kept.lock().unwrap().insert(self.of, self.cache.positions().to_vec());
        Ok(())
    }
    fn seen(&self) -> usize {
        self.cache.seen()
    }
    fn held(&self) -> usize {
        self.cache.held()
    }
    fn footprint(&self) -> Footprint {
        self.cache.footprint()
    }
    fn reset(&mut self) {
        self.cache.reset();
    }
}

/// The dense cache and one for each policy, none of which evicts while decoding, as kvpress does not.
fn caches(layer: &LayerShape, kept: &Kept) -> Result<Vec<Box<dyn KvCache>>> {
    let mut caches: Vec<Box<dyn KvCache>> =
        vec![Box::new(DenseCache::new(layer.attention, DType::F32)?)];
    for name in POLICIES {
        let store = DenseStore::new(layer.attention, DType::F32)?;
        let cache = PolicyCache::new(store, policy(name)?, Budget::Ratio(0.25))?;
        let cache = cache.with_decode_step(None)?;
        caches.push(Box::new(Noted { cache, of: (layer.layer, name), kept: kept.clone() }));
    }
    Ok(caches)
}

fn feed(session: &mut impl CausalLm, tokens: &[u32]) -> u32 {
    let tokens = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = session.forward(&tokens, Logits::Last).unwrap();
    logits.flatten_all().unwrap().argmax(0).unwrap().to_scalar().unwrap()
}

/// The share of what kvpress keeps from layer `first` on that is kept here too; `bits`: a bit per layer, kv head and position, the highest bit first.
fn agreement(kept: &Kept, name: &'static str, first: usize, bits: &Tensor) -> f64 {
    let bits = bits.to_vec3::<u8>().unwrap();
    let kept = kept.lock().unwrap();
    let (mut both, mut all) = (0, 0);
    for (layer, heads) in bits.iter().enumerate().skip(first) {
        for (head, bits) in heads.iter().enumerate() {
            let own = &kept[&(layer, name)][head];
            let has = |p: &&u32| bits[**p as usize / 8] >> (7 - **p % 8) & 1 == 1;
            both += own.iter().filter(has).count();
            let theirs: u32 = bits.iter().map(|byte| byte.count_ones()).sum();
            assert_eq!(own.len(), theirs as usize, "{name}: layer {layer}, head {head}");
            all += own.len();
        }
    }
    both as f64 / all as f64
}

fn model() -> Option<PathBuf> {
    let named = std::env::var_os("LONGCTX_SMOLLM2").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/longctx"));
    let path = named.or_else(|| Some(home()?.join("SmolLM2-135M-Instruct.Q4_1.gguf")))?;
    path.exists().then_some(path)
}

#[test]
fn a_real_model_keeps_and_answers_what_it_does_under_kvpress() {
    let Some(path) = model() else {
        println!("skipped: no model; name SmolLM2-135M-Instruct.Q4_1.gguf in LONGCTX_SMOLLM2");
        return;
    };
    let fixture =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kvpress_needle.safetensors");
    let fixture = candle_core::safetensors::load(fixture, &Device::Cpu).unwrap();
    let llm = Pretrained::from_gguf(&path, &LoadOptions::default()).unwrap();
    // Without optimization a prompt takes long.
    let prompts = if cfg!(debug_assertions) { 1 } else { 3 };
    for prompt in 0..prompts {
        let tokens = fixture[&format!("prompt.{prompt}")].to_vec1::<u32>().unwrap();
        let (kept, active) = (Kept::default(), Arc::new(AtomicUsize::new(0)));
        let make = |layer: &LayerShape| Ok(Fan::new(caches(layer, &kept)?, active.clone()));
        let mut session = llm.model.session(make).unwrap();
        let first = feed(&mut session, &tokens);
        for (i, name) in ["dense"].into_iter().chain(POLICIES).enumerate() {
            active.store(i, Ordering::Relaxed);
            let expected = fixture[&format!("{name}.{prompt}.written")].to_vec1::<u32>().unwrap();
            let mut written = vec![first];
            while written.len() < expected.len() {
                written.push(feed(&mut session, &written[written.len() - 1..]));
            }
            let text = |tokens: &[u32]| llm.tokenizer.decode(tokens).unwrap();
            println!("prompt {prompt}, {name}: {:?}", text(&written));
            assert_eq!(text(&written), text(&expected), "prompt {prompt}, {name}");
            if name == "dense" {
                continue;
            }
            // In the first layer, keys of equal tokens have equal norms wherever they stand: which of them stay is chance.
            let first = usize::from(name == "k-norm");
            let bits = &fixture[&format!("{name}.{prompt}.kept")];
            let (all, share) =
                (agreement(&kept, name, 0, bits), agreement(&kept, name, first, bits));
            println!("  {all:.4} kept by both, from layer {first} on {share:.4}");
            assert!(share > 0.999, "prompt {prompt}, {name}: {share} kept by both");
        }
    }
}
