//! Cache methods by name.
//!
//! A name is the name of a cache, such as `dense-f16` or `kivi-4`, or `POLICY-SIZE[-STORE]`, such
//! as `h2o-4x`, `quest-512` or `snap-kv-4x-kivi-4`. The policy selects the entries to keep or to
//! read. The size is a ratio (`4x`: a quarter of the prompt's tokens) or a number of tokens
//! (`512`). The default store is f16.

mod eviction;
mod packed;
mod policy;
mod split;
mod store;

use std::sync::Arc;

use anyhow::{Result, bail};
use candle_core::DType;
use clap::ValueEnum;
use kv_quant::{Format, KeyBasis, Order, QuantStore};
use longctx_core::{
    AttentionShape, DenseCache, DenseStore, KvCache, KvStore, LatentCache, LatentStore, LayerSpec,
    Rope, RopeScaling, WindowCache, by_layer_type,
};

pub use eviction::{Evicting, Eviction, duo_attention};
use packed::PACKED;
pub use policy::{Policy, Size};
use split::SplitCache;
pub use store::Store;

/// The compression ratios of arXiv 2407.01527.
pub const RATIOS: [u32; 4] = [2, 4, 6, 8];

const DENSE: [(&str, DType); 3] =
    [("dense-f32", DType::F32), ("dense-f16", DType::F16), ("dense-bf16", DType::BF16)];

/// A cache method.
#[derive(Debug, Clone)]
pub struct Method {
    name: String,
    kind: Kind,
    compress: Compress,
}

/// The tokens that a packed format or an eviction policy compresses. Dense caches and layers with a
/// sliding window or latent attention are not affected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// All tokens, as the method was published.
    #[default]
    Published,
    /// The tokens of the prompt, after each of its calls. Decoded tokens are kept in f16.
    Prompt,
    /// Decoded tokens. The prompt is kept in f16.
    Decoded,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Dense(DType),
    Packed(packed::NewCache),
    Policy(Policy, Size, Store),
}

impl Method {
    /// Returns the method with a name.
    ///
    /// # Errors
    /// If the name is unknown; the error lists the known names.
    pub fn named(name: &str) -> Result<Self> {
        let dense = || DENSE.iter().find(|known| known.0 == name).map(|&(_, x)| Kind::Dense(x));
        let packed = || PACKED.iter().find(|known| known.0 == name).map(|&(_, x)| Kind::Packed(x));
        match dense().or_else(packed).or_else(|| of_policy(name)) {
            Some(kind) => Ok(Self { name: name.to_owned(), kind, compress: Compress::default() }),
            None => bail!(
                "no method {name:?}. There are {}; and POLICY-SIZE[-STORE], with POLICY one of {}, \
                 SIZE a share of the prompt such as 4x or a number of tokens, STORE one of {}",
                whole_caches().collect::<Vec<_>>().join(", "),
                Policy::all().map(Policy::name).collect::<Vec<_>>().join(", "),
                Store::value_variants().iter().map(|s| s.name()).collect::<Vec<_>>().join(", "),
            ),
        }
    }

    /// Returns the method for a part of the tokens.
    #[must_use]
    pub fn compressing(self, compress: Compress) -> Self {
        Self { compress, ..self }
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether a prompt in one call attends to its keys and values as passed, before they
    /// are compressed.
    pub fn has_exact_prefill(&self) -> bool {
        let make = match self.kind {
            Kind::Dense(dtype) => return dtype == DType::F32,
            Kind::Policy(policy, ..) => return !matches!(policy, Policy::Quest | Policy::InfLlm),
            Kind::Packed(make) => make,
        };
        let spec = || -> longctx_core::Result<LayerSpec> {
            let rope = Arc::new(Rope::new(128, 128, 10_000.0, RopeScaling::None)?);
            Ok(LayerSpec::new(AttentionShape::new(1, 1, 128)?).with_rope(rope))
        };
        let cache = spec().and_then(make);
        cache.is_ok_and(|cache| cache.order() == Order::AttendFirst)
    }

    /// Creates an empty cache for one layer, whose memory grows.
    ///
    /// # Errors
    /// If the method does not support the layer.
    pub fn cache(&self, spec: &LayerSpec) -> longctx_core::Result<Box<dyn KvCache>> {
        self.cache_within(spec, None)
    }

    /// Creates the same cache with at most `capacity` bytes of keys and values. Sinks and InfLLM's
    /// local window are additional.
    ///
    /// # Errors
    /// As [`cache`](Self::cache).
    pub fn cache_within(
        &self,
        spec: &LayerSpec,
        capacity: Option<usize>,
    ) -> longctx_core::Result<Box<dyn KvCache>> {
        if spec.latent {
            return self.latent(spec, capacity);
        }
        let make = by_layer_type(
            |spec| self.full(spec, capacity),
            |spec| windowed(spec, self.format(spec)?, capacity),
        );
        make(spec)
    }

    /// Returns the packed format of a layer with a sliding window or latent attention; `None` for
    /// f16, or for the dense method's dtype. Sinks do not apply to such layers, and a call's tokens
    /// attend before they are packed.
    fn format(&self, spec: &LayerSpec) -> longctx_core::Result<Option<Format>> {
        match self.kind {
            Kind::Dense(_) => Ok(None),
            Kind::Policy(_, _, store) => Ok(store.format()?),
            Kind::Packed(make) => {
                let shape = AttentionShape { window: None, ..spec.shape };
                let format = make(LayerSpec { shape, ..spec.clone() })?.format();
                // Formats of unrotated keys derive a key's position from its index, which a window
                // shifts. They also rotate keys during scoring, which is not possible with latents.
                Ok(Some(match format.key_basis() {
                    KeyBasis::BeforeRope => format.with_key_basis(KeyBasis::Given),
                    _ => format,
                }))
            }
        }
    }

    /// Creates a cache for a layer with latent attention, which holds the latents once.
    fn latent(
        &self,
        spec: &LayerSpec,
        capacity: Option<usize>,
    ) -> longctx_core::Result<Box<dyn KvCache>> {
        let shape = spec.shape;
        let parts = AttentionShape { head_dim: shape.head_dim - shape.value_dim, ..shape };
        let Some(format) = self.format(&LayerSpec { shape: parts, ..spec.clone() })? else {
            let dtype = match self.kind {
                Kind::Dense(dtype) => dtype,
                _ => DType::F16,
            };
            let bytes = capacity.unwrap_or(usize::MAX);
            let make = |parts| DenseStore::with_capacity(parts, dtype, bytes);
            return self.over_latents(spec, LatentStore::new(shape, make)?, 1);
        };
        let store = LatentStore::new(shape, |parts| packed_store(parts, format, capacity))?;
        self.over_latents(spec, store, format.block_tokens())
    }

    fn over_latents<S: KvStore + 'static>(
        &self,
        spec: &LayerSpec,
        store: LatentStore<S>,
        step: usize,
    ) -> longctx_core::Result<Box<dyn KvCache>> {
        match self.kind {
            Kind::Policy(policy, size, _) => {
                policy.cache(spec.clone(), store, size, step, self.compress)
            }
            _ => Ok(Box::new(LatentCache::new(spec.clone(), store)?)),
        }
    }

    /// Creates a cache for a layer without a sliding window.
    fn full(
        &self,
        spec: &LayerSpec,
        capacity: Option<usize>,
    ) -> longctx_core::Result<Box<dyn KvCache>> {
        let bytes = capacity.unwrap_or(usize::MAX);
        Ok(match self.kind {
            Kind::Dense(dtype) => Box::new(DenseCache::with_capacity(spec.clone(), dtype, bytes)?),
            Kind::Packed(make) => {
                let cache = make(spec.clone())?;
                match self.compress {
                    Compress::Published => match capacity {
                        Some(bytes) => Box::new(cache.with_capacity(bytes)),
                        None => Box::new(cache),
                    },
                    part => split(spec, cache.format(), capacity, part)?,
                }
            }
            Kind::Policy(policy, size, store) => match store.format()? {
                None => {
                    let store = DenseStore::with_capacity(spec.shape, DType::F16, bytes)?;
                    policy.cache(spec.clone(), store, size, 1, self.compress)?
                }
                Some(format) => {
                    let store = packed_store(spec.shape, format, capacity)?;
                    policy.cache(spec.clone(), store, size, format.block_tokens(), self.compress)?
                }
            },
        })
    }
}

/// Creates a cache for a layer with a sliding window: f16, or a packed format.
///
/// # Errors
/// If the format does not support the layer.
pub fn windowed(
    spec: &LayerSpec,
    format: Option<Format>,
    capacity: Option<usize>,
) -> longctx_core::Result<Box<dyn KvCache>> {
    let Some(format) = format else {
        let bytes = capacity.unwrap_or(usize::MAX);
        return Ok(Box::new(DenseCache::with_capacity(spec.clone(), DType::F16, bytes)?));
    };
    let store = packed_store(spec.shape, format, capacity)?;
    Ok(Box::new(WindowCache::new(spec.clone(), store, format.block_tokens())?))
}

/// Creates a cache that packs the tokens of the prompt, or decoded tokens, and keeps the others in
/// f16. Keys are packed after the rotary embedding.
fn split(
    spec: &LayerSpec,
    format: Format,
    capacity: Option<usize>,
    packed: Compress,
) -> longctx_core::Result<Box<dyn KvCache>> {
    let format = match format.key_basis() {
        KeyBasis::BeforeRope => format.with_key_basis(KeyBasis::Given),
        _ => format,
    };
    let bytes = capacity.unwrap_or(usize::MAX);
    let dense = DenseStore::with_capacity(spec.shape, DType::F16, bytes)?;
    let store = packed_store(spec.shape, format, capacity)?;
    Ok(match packed {
        Compress::Decoded => Box::new(SplitCache::new(spec.clone(), dense, store)),
        _ => Box::new(SplitCache::new(spec.clone(), store, dense)),
    })
}

fn packed_store(
    shape: AttentionShape,
    format: Format,
    capacity: Option<usize>,
) -> longctx_core::Result<QuantStore> {
    let store = QuantStore::new(shape, format)?;
    Ok(match capacity {
        Some(bytes) => store.with_capacity(bytes),
        None => store,
    })
}

/// Returns the methods in lists: all caches without a policy, and all policies at the paper's
/// ratios.
pub fn listed() -> impl Iterator<Item = Method> {
    let at_ratio = |times| {
        let policies = Policy::all().filter(|policy| *policy != Policy::Quest);
        policies.map(move |policy| format!("{}-{times}x", policy.name()))
    };
    let others = ["quest-512", "streaming-llm-4x-kivi-4", "snap-kv-4x-kivi-4"];
    let names = whole_caches().chain(others).map(String::from);
    let names = names.chain(RATIOS.into_iter().flat_map(at_ratio));
    names.map(|name| Method::named(&name).expect("a name that the tables know"))
}

fn whole_caches() -> impl Iterator<Item = &'static str> {
    DENSE.iter().map(|known| known.0).chain(PACKED.iter().map(|known| known.0))
}

/// Parses `POLICY-SIZE[-STORE]`.
fn of_policy(name: &str) -> Option<Kind> {
    Policy::all().find_map(|policy| {
        let rest = name.strip_prefix(policy.name())?.strip_prefix('-')?;
        let (size, store) = match rest.split_once('-') {
            Some((size, store)) => (size, Store::from_str(store, false).ok()?),
            None => (rest, Store::F16),
        };
        let number = |digits: &str| digits.parse::<u32>().ok().filter(|&number| number > 0);
        let size = match size.strip_suffix('x') {
            Some(times) => Size::Share(1.0 / f64::from(number(times)?)),
            None => Size::Tokens(number(size)? as usize),
        };
        Some(Kind::Policy(policy, size, store))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use longctx_core::{Batch, Step};

    fn spec() -> LayerSpec {
        let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap());
        LayerSpec::new(AttentionShape::new(4, 2, 64).unwrap()).with_rope(rope).at(1, 3)
    }

    fn feed(cache: &mut dyn KvCache, batch: &Batch) {
        let x = |heads| Tensor::randn(0f32, 1., (batch.tokens(), heads, 64), &Device::Cpu).unwrap();
        let (q, k, v) = (x(4), x(2), x(2));
        cache.attend(&Step { batch, q: &q, k: &k, v: &v }).unwrap();
    }

    /// Feeds two prompts of unequal length, and a token of each.
    #[test]
    fn every_listed_method_holds_sequences() {
        for method in listed() {
            let mut cache = method.cache(&spec()).unwrap();
            feed(&mut *cache, &Batch::new(&[(3, 600), (5, 90)]).unwrap());
            feed(&mut *cache, &Batch::decode(&[5, 3]).unwrap());
            assert_eq!((cache.seen(3), cache.seen(5)), (601, 91), "{}", method.name());
            assert!(cache.footprint().total() > 0, "{}", method.name());
            assert!(cache.remove(3) && cache.remove(5), "{}", method.name());
        }
    }

    /// The bytes of windowed layers depend on the window and the format, not on the prompt.
    #[test]
    fn every_listed_method_holds_windows() {
        let shape = AttentionShape { window: Some(128), ..spec().shape };
        let windowed = LayerSpec { shape, ..spec() };
        for method in listed() {
            let mut cache = method.cache(&windowed).unwrap();
            feed(&mut *cache, &Batch::new(&[(3, 600), (5, 90)]).unwrap());
            feed(&mut *cache, &Batch::new(&[(5, 30), (3, 1)]).unwrap());
            feed(&mut *cache, &Batch::decode(&[5, 3]).unwrap());
            assert_eq!((cache.seen(3), cache.seen(5)), (602, 121), "{}", method.name());
            assert_eq!(cache.held(5), 121, "{}", method.name());
            // The exact cache lets sequences outgrow their window by 256 tokens.
            assert!(cache.held(3) < 128 + 260, "{}: {}", method.name(), cache.held(3));
        }
    }

    /// Every method holds latents once: in f16 they take 2 bytes per channel.
    #[test]
    fn every_listed_method_holds_latents() {
        let shape = AttentionShape { value_dim: 128, ..AttentionShape::new(4, 1, 192).unwrap() };
        let rope = Arc::new(Rope::new(192, 64, 10_000.0, RopeScaling::None).unwrap());
        let spec = LayerSpec::new(shape).with_rope(rope).with_latent().unwrap().at(1, 3);
        for method in listed() {
            let mut cache = method.cache(&spec).unwrap();
            for batch in
                [Batch::new(&[(3, 600), (5, 90)]).unwrap(), Batch::decode(&[5, 3]).unwrap()]
            {
                let x = |heads| Tensor::randn(0f32, 1., (batch.tokens(), heads, 192), &Device::Cpu);
                let (q, k) = (x(4).unwrap(), x(1).unwrap());
                let v = k.narrow(2, 64, 128).unwrap();
                cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
            }
            assert_eq!((cache.seen(3), cache.seen(5)), (601, 91), "{}", method.name());
            let most = 601 * 192 * if method.name() == "dense-f32" { 4 } else { 2 };
            let held = cache.seq_footprint(3).payload;
            // InfLLM's local window is a dense store of keys and values.
            let infllm = method.name().starts_with("infllm");
            assert!(held <= most || infllm, "{}: {held} bytes, not {most}", method.name());
        }
    }

    #[test]
    fn a_policy_accepts_ratios_tokens_and_stores() {
        let held = |name: &str| {
            let mut cache = Method::named(name).unwrap().cache(&spec()).unwrap();
            feed(&mut *cache, &Batch::single(0, 400).unwrap());
            (cache.held(0), cache.footprint().payload)
        };
        assert_eq!(held("snap-kv-4x"), (100, 100 * 2 * 64 * 2 * 2));
        assert_eq!(held("snap-kv-200").0, 200);
        let (tokens, packed) = held("snap-kv-200-kivi-4");
        assert!(tokens == 200 && packed < held("snap-kv-200").1 / 2);
    }

    /// A prompt of 400 tokens and 400 decoded tokens: either part is evicted or packed.
    #[test]
    fn either_the_prompt_or_decoded_tokens_are_compressed() {
        let bytes = |name: &str, compress| {
            let method = Method::named(name).unwrap().compressing(compress);
            let mut cache = method.cache(&spec()).unwrap();
            feed(&mut *cache, &Batch::single(0, 400).unwrap());
            let prompt = cache.seq_footprint(0).payload;
            for _ in 0..400 {
                feed(&mut *cache, &Batch::decode(&[0]).unwrap());
            }
            (prompt, cache.seq_footprint(0).payload - prompt)
        };
        let whole = bytes("dense-f16", Compress::Published).0;
        let policies = Policy::all().filter(|policy| matches!(policy, Policy::Eviction(_)));
        let policies = policies.map(|policy| format!("{}-4x", policy.name()));
        for name in policies.chain(["kivi-4".into(), "kivi-2".into()]) {
            let (prompt, decoded) = bytes(&name, Compress::Prompt);
            assert!(prompt < whole * 3 / 4 && decoded == whole, "{name}: {prompt}, {decoded}");
            let (prompt, decoded) = bytes(&name, Compress::Decoded);
            assert!(prompt == whole && decoded < whole * 3 / 4, "{name}: {prompt}, {decoded}");
        }
        let infllm = Method::named("infllm-4x").unwrap().compressing(Compress::Prompt);
        assert!(infllm.cache(&spec()).err().unwrap().to_string().contains("infllm"));
    }

    #[test]
    fn capacity_bounds_every_kind_of_store() {
        for name in ["dense-f16", "kivi-4", "h2o-4x", "snap-kv-2x-kivi-2"] {
            let cache = Method::named(name).unwrap().cache_within(&spec(), Some(1 << 16)).unwrap();
            assert!(cache.can_append(&Batch::single(0, 16).unwrap()), "{name}");
            assert!(!cache.can_append(&Batch::single(0, 100_000).unwrap()), "{name}");
        }
    }

    /// With a prompt longer than any window, the outputs of one call equal those of an f32 cache,
    /// which attends exactly, for the methods that say so and for no others.
    #[test]
    fn only_methods_with_an_exact_prefill_equal_exact_attention() {
        let batch = Batch::single(0, 1300).unwrap();
        let x = |heads: usize, shift: f32| {
            let wave = |i: usize| (i as f32 * 0.37 + shift).sin();
            let values: Vec<f32> = (0..batch.tokens() * heads * 64).map(wave).collect();
            Tensor::from_vec(values, (batch.tokens(), heads, 64), &Device::Cpu).unwrap()
        };
        let (q, k, v) = (x(4, 0.0), x(2, 1.0), x(2, 2.0));
        let outputs = |name: &str| {
            let mut cache = Method::named(name).unwrap().cache(&spec()).unwrap();
            let out = cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
            out.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let exact = outputs("dense-f32");
        for name in ["kivi-2", "h2o-4x", "streaming-llm-4x", "infllm-4x", "quest-512", "flexgen-4"]
        {
            let pairs = outputs(name).into_iter().zip(&exact);
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let is_exact = Method::named(name).unwrap().has_exact_prefill();
            assert_eq!(worst < 1e-4, is_exact, "{name}: {worst}");
        }
    }

    #[test]
    fn errors_of_unknown_names_list_the_known_ones() {
        for name in ["", "kivi", "h2o", "h2o-", "h2o-0x", "h2o-x", "h2o-4x-kivi-5", "snap-kv--4x"] {
            let error = Method::named(name).expect_err(name).to_string();
            assert!(error.contains("flexgen-4") && error.contains("snap-kv"), "{error}");
        }
        let error = Method::named("quest-4x").unwrap().cache(&spec()).err().unwrap().to_string();
        assert!(error.contains("quest"), "{error}");
    }
}
