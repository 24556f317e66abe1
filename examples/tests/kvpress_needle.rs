//! Compares the needle test with kvpress 0.5.5 on the same model: the entries kept in a quarter of
//! the cache, and the generated text (fixtures/make_kvpress_needle.py). kvpress uses weights
//! dequantized to f32. Here products with quantized weights also quantize the activations, so
//! nearly equal scores can be in a different order.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use base_models::{LoadOptions, Pretrained};
use candle_core::{DType, Device, Tensor};
use longctx_core::{
    Batch, CausalLm, DenseCache, DenseStore, KvCache, LayerSpec, Logits, Result, SeqId, Step,
};
use longctx_examples::methods::{Evicting, Eviction};
use longctx_examples::shared_prefill::SharedPrefill;
use token_drop::Budget;

const POLICIES: [Eviction; 7] = [
    Eviction::SnapKv,
    Eviction::ExpectedAttention,
    Eviction::Tova,
    Eviction::KNorm,
    Eviction::KeyDiff,
    Eviction::LagKv,
    Eviction::H2o,
];

/// The positions that each kv head keeps, by layer and policy name.
type Kept = Arc<Mutex<HashMap<(usize, &'static str), Vec<Vec<u32>>>>>;

/// A cache that records the positions that it keeps of the prompt.
struct Noted {
    cache: Evicting<DenseStore>,
    policy: &'static str,
    kept: Kept,
}

impl KvCache for Noted {
    fn append_prompt(&mut self, step: &Step<'_>, lse: Option<&Tensor>) -> Result<()> {
        self.cache.append_prompt(step, lse)?;
        let of = (self.spec().index, self.policy);
        self.kept.lock().unwrap().insert(of, self.cache.positions(step.batch.seqs()[0]).unwrap());
        Ok(())
    }

    longctx_core::forward_kv_cache!(self => self.cache;
        spec, attend, needs_lse, fork, check_truncate, truncate, remove, seqs, seen, held,
        can_append, footprint, seq_footprint, clear);
}

/// Returns the dense cache and one cache per policy. As in kvpress, none evicts during decoding.
fn caches(spec: &LayerSpec, kept: &Kept) -> Result<Vec<Box<dyn KvCache>>> {
    let mut caches: Vec<Box<dyn KvCache>> =
        vec![Box::new(DenseCache::new(spec.clone(), DType::F32)?)];
    for policy in POLICIES {
        let store = DenseStore::new(spec.shape, DType::F32)?;
        let cache = policy.cache(spec.clone(), store, Budget::Ratio(0.25))?;
        let cache = cache.with_decode_step(None)?;
        caches.push(Box::new(Noted { cache, policy: policy.name(), kept: kept.clone() }));
    }
    Ok(caches)
}

fn feed(session: &mut impl CausalLm, seq: SeqId, ids: &[u32]) -> u32 {
    let batch = Batch::single(seq, ids.len()).unwrap();
    let logits = session.forward(&batch, ids, Logits::Last).unwrap();
    logits.flatten_all().unwrap().argmax(0).unwrap().to_scalar().unwrap()
}

/// Returns the share of the entries kept by kvpress, from layer `first` on, that are kept here too.
/// `bits` has a bit per layer, kv head and position, the highest bit first.
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
fn kept_entries_and_answers_of_a_real_model_agree_with_kvpress() {
    let Some(path) = model() else {
        println!("skipped: no model; name SmolLM2-135M-Instruct.Q4_1.gguf in LONGCTX_SMOLLM2");
        return;
    };
    let fixture =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kvpress_needle.safetensors");
    let fixture = candle_core::safetensors::load(fixture, &Device::Cpu).unwrap();
    let llm = Pretrained::from_gguf(&path, &LoadOptions::default()).unwrap();
    // Prompts are slow without optimization.
    let prompts = if cfg!(debug_assertions) { 1 } else { 3 };
    for prompt in 0..prompts {
        let tokens = fixture[&format!("prompt.{prompt}")].to_vec1::<u32>().unwrap();
        let kept = Kept::default();
        let make = |spec: &LayerSpec| Ok(SharedPrefill::new(spec.clone(), caches(spec, &kept)?));
        let mut session = llm.model.session(make).unwrap();
        let of_all = 1 + POLICIES.len() as SeqId;
        let first = feed(&mut session, of_all, &tokens);
        for (seq, name) in (0..).zip(["dense"].into_iter().chain(POLICIES.map(Eviction::name))) {
            session.fork(of_all, seq).unwrap();
            let expected = fixture[&format!("{name}.{prompt}.written")].to_vec1::<u32>().unwrap();
            let mut written = vec![first];
            while written.len() < expected.len() {
                written.push(feed(&mut session, seq, &written[written.len() - 1..]));
            }
            let text = |tokens: &[u32]| llm.tokenizer.decode(tokens).unwrap();
            println!("prompt {prompt}, {name}: {:?}", text(&written));
            assert_eq!(text(&written), text(&expected), "prompt {prompt}, {name}");
            if name == "dense" {
                continue;
            }
            // In the first layer, keys of equal tokens have equal norms, so the selection among
            // them is arbitrary.
            let first = usize::from(name == "k-norm");
            let bits = &fixture[&format!("{name}.{prompt}.kept")];
            let (all, share) =
                (agreement(&kept, name, 0, bits), agreement(&kept, name, first, bits));
            println!("  {all:.4} kept by both, from layer {first} on {share:.4}");
            assert!(share > 0.999, "prompt {prompt}, {name}: {share} kept by both");
        }
    }
}
