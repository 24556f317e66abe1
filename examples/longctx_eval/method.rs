//! Every method that the workspace has, by name.

use candle_core::DType;
use half::f16;
use kv_quant::{Bits, Format, KeyBasis, Order, QuantCache, QuantStore};
use longctx_core::{
    DenseCache, DenseStore, EvictionPolicy, KvCache, LayerShape, PromptCompressor, Rate, Result,
};
use longctx_eval::{Fault, Methods, Reader, Setting};
use longctx_examples::encoder;
use longctx_examples::heads::{RECENT, SINKS};
use longctx_examples::selective_context;
use longctx_examples::subject::{Models, dense};
use prompt_compress::baseline::{Extract, RandomDrop, Ranking, TruncateMiddle};
use prompt_compress::{LlmLingua, llmlingua, llmlingua2};
use token_drop::*;

type Cache = Result<Box<dyn KvCache>>;
/// A cache for a layer.
type Whole = fn(&LayerShape) -> Cache;
/// A cache for a layer that keeps a share of its tokens.
type Part = fn(&LayerShape, f64) -> Cache;
type Compressor = std::result::Result<Box<dyn PromptCompressor>, Fault>;
/// A compressor beside the setting's model, which may help it.
type Shortener = fn(&Models, &Setting) -> Compressor;

/// The newest queries that SnapKV and its kin observe.
const WINDOW: usize = 32;
/// The compression ratios of the paper.
const TIMES: [u32; 4] = [2, 4, 6, 8];

/// Methods of one size.
const FIXED: [(&str, Whole); 11] = [
    ("dense-f32", |l| boxed(DenseCache::new(l.attention, DType::F32))),
    ("dense-f16", |l| boxed(DenseCache::new(l.attention, DType::F16))),
    ("kivi-8", |l| boxed(QuantCache::new(l.attention, kivi(Bits::Eight)?))),
    ("kivi-4", |l| boxed(QuantCache::new(l.attention, kivi(Bits::Four)?))),
    ("kivi-2", |l| boxed(QuantCache::new(l.attention, kivi(Bits::Two)?))),
    ("kivi-before-rope-2", |l| {
        boxed(QuantCache::new(l.attention, kivi(Bits::Two)?.with_basis(KeyBasis::BeforeRope)))
    }),
    ("flexgen-4", |l| flexgen(l, KeyBasis::Given)),
    ("flexgen-hadamard-4", |l| flexgen(l, KeyBasis::Hadamard)),
    ("quest-512", |l| boxed(Quest::<f16>::new(512, l.attention))),
    ("streaming-llm-4x-kivi-4", |l| {
        let store = QuantStore::new(l.attention, kivi(Bits::Four)?)?;
        boxed(StreamingLlm::with_ratio(0.25, store)?.with_step(32))
    }),
    ("snap-kv-4x-kivi-4", |l| {
        let store = QuantStore::new(l.attention, kivi(Bits::Four)?)?;
        boxed(PolicyCache::new(store, SnapKv::new(WINDOW)?, Budget::Ratio(0.25)))
    }),
];

/// Methods that keep a share of the tokens, the share given.
const BY_RATIO: [(&str, Part); 16] = [
    ("streaming-llm", |l, share| boxed(StreamingLlm::with_ratio(share, store(l)?))),
    ("infllm", |l, share| boxed(InfLlm::<f16>::with_ratio(share, l.attention))),
    ("h2o", |l, share| evict(l, share, H2o::default())),
    ("snap-kv", |l, share| evict(l, share, SnapKv::new(WINDOW)?)),
    ("ada-snap-kv", |l, share| evict(l, share, AdaKv::new(SnapKv::new(WINDOW)?))),
    ("chunk-snap-kv", |l, share| evict(l, share, ChunkKv::new(SnapKv::new(WINDOW)?, 20)?)),
    ("pyramid-snap-kv", |l, share| {
        evict(l, share, PyramidKv::new(SnapKv::new(WINDOW)?, l.layer, l.layers, 20.0)?)
    }),
    ("tova", |l, share| evict(l, share, Tova::default())),
    ("finch", |l, share| evict(l, share, Finch::new(16)?)),
    ("expected-attention", |l, share| evict(l, share, ExpectedAttention::default())),
    ("k-norm", |l, share| evict(l, share, KNorm)),
    ("key-diff", |l, share| evict(l, share, KeyDiff)),
    ("lag-kv", |l, share| evict(l, share, LagKv::new(4, 64)?)),
    ("recent", |l, share| evict(l, share, Recent::default())),
    ("rerotated-snap-kv", |l, share| evict(l, share, Rerotated::new(SnapKv::new(WINDOW)?))),
    ("random", |l, share| evict(l, share, Random::new(l.layer as u64))),
];

/// Methods that shorten the prompt; the model that reads it may help.
const BY_PROMPT: [(&str, Shortener); 7] = [
    ("llmlingua2", |models, _| {
        Ok(Box::new(encoder::open(models.encoder(), llmlingua2::Settings::paper())?))
    }),
    ("llmlingua", |models, setting| {
        let llm = models.get(&setting.model)?;
        let tokenizer = llm.tokenizer.inner().clone();
        let lingua = LlmLingua::new(dense(&llm)?, tokenizer, llmlingua::Settings::llmlingua())?;
        Ok(Box::new(lingua.with_second(dense(&llm)?)))
    }),
    ("selective-context", |models, setting| {
        let llm = models.get(&setting.model)?;
        Ok(Box::new(selective_context::on(&llm, dense(&llm)?)?))
    }),
    ("tf-idf", |_, _| Ok(Box::new(Extract { ranking: Ranking::TfIdf }))),
    ("bm25", |_, _| Ok(Box::new(Extract { ranking: Ranking::Bm25 }))),
    ("middle", |_, _| Ok(Box::new(TruncateMiddle))),
    ("random-words", |_, _| Ok(Box::new(RandomDrop { seed: 0 }))),
];

/// All of them, on the models that `models` opens.
pub fn all(models: &Models) -> Methods<'_> {
    let mut methods = Methods::default();
    for (name, cache) in FIXED {
        methods.register(name, move |setting| Ok(Box::new(models.reader(setting, cache)?)));
    }
    for times in TIMES {
        let share = 1.0 / f64::from(times);
        for (name, cache) in BY_RATIO {
            methods.register(format!("{name}-{times}x"), move |setting| {
                Ok(Box::new(models.reader(setting, |layer| cache(layer, share))?))
            });
        }
        // The other heads keep everything, so that the cache is larger than the share by their sinks and window.
        methods.register(format!("duo-attention-{times}x"), move |setting| {
            let streaming = models.heads(&setting.model)?.share(1.0 - share)?;
            Ok(Box::new(models.reader(setting, |layer| duo_attention(layer, &streaming))?))
        });
        for (name, compressor) in BY_PROMPT {
            methods.register(format!("{name}-{times}x"), move |setting| {
                let reader: Reader = models.reader(setting, FIXED[1].1)?;
                let compressor = compressor(models, setting)?;
                Ok(Box::new(reader.with_compressor(compressor, Rate::new(share)?)))
            });
        }
    }
    methods.register("recurrent", |setting| Ok(Box::new(models.recurrent(setting)?)));
    methods
}

fn store(layer: &LayerShape) -> Result<DenseStore> {
    DenseStore::new(layer.attention, DType::F16)
}

fn evict(layer: &LayerShape, share: f64, policy: impl EvictionPolicy + 'static) -> Cache {
    boxed(PolicyCache::new(store(layer)?, policy, Budget::Ratio(share)))
}

/// `streaming`: which heads do, per layer.
fn duo_attention(layer: &LayerShape, streaming: &[Vec<bool>]) -> Cache {
    let expected = layer.layers;
    let of_layer = streaming.get(layer.layer).ok_or_else(|| {
        longctx_core::Error::mismatch(
            "layers that DuoAttention has scores of",
            expected,
            streaming.len(),
        )
    })?;
    let policy = DuoAttention::new(of_layer.clone(), SINKS, RECENT)?;
    boxed(PolicyCache::new(store(layer)?, policy, Budget::Policy))
}

/// KIVI's defaults: groups of 32, the newest 128 tokens in full precision.
fn kivi(bits: Bits) -> Result<Format> {
    Ok(Format::kivi(bits, bits, 32, 128)?)
}

fn flexgen(layer: &LayerShape, basis: KeyBasis) -> Cache {
    let format = Format::flexgen(Bits::Four, Bits::Four, 64)?.with_basis(basis);
    boxed(Ok(QuantCache::new(layer.attention, format)?.with_order(Order::QuantizeFirst)))
}

fn boxed<C: KvCache + 'static>(cache: Result<C>) -> Cache {
    Ok(Box::new(cache?))
}
