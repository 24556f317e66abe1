//! Eviction over packed stores: the policies of token-drop on the stores of kv-quant.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::f16;
use kv_quant::{Bits, Format, QuantStore};
use longctx_core::{
    AttentionShape, Batch, DenseStore, KvCache, KvStore, LayerSpec, Rope, RopeScaling, Selection,
    SeqId, Step,
};
use longctx_examples::methods::{Evicting, Eviction};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use token_drop::{Budget, HeadBudgets, PolicyCache, SnapKv};

const TOKENS: usize = 400;
/// Two sequences of unequal length.
const SEQS: [(SeqId, usize); 2] = [(3, TOKENS), (8, 230)];
const RESIDUAL: usize = 32;

const POLICIES: [Eviction; 8] = [
    Eviction::KNorm,
    Eviction::Recent,
    Eviction::H2o,
    Eviction::Tova,
    Eviction::SnapKv,
    Eviction::AdaSnapKv,
    Eviction::ChunkSnapKv,
    Eviction::RerotatedSnapKv,
];

fn spec() -> LayerSpec {
    let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap());
    LayerSpec::new(AttentionShape::new(4, 2, 64).unwrap()).with_rope(rope)
}

fn packed(policy: Eviction, bits: Bits, budget: Budget) -> Evicting<QuantStore> {
    let format = Format::kivi(bits, bits, 32, RESIDUAL).unwrap();
    policy.cache(spec(), QuantStore::new(spec().shape, format).unwrap(), budget).unwrap()
}

/// A call's queries, keys and values.
struct Call {
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Call {
    /// Returns roughly normal numbers, the same in every run, because the tests' bounds are tight.
    fn random(seed: u64, seqs: &[(SeqId, usize)]) -> Self {
        let batch = Batch::new(seqs).unwrap();
        let mut random = StdRng::seed_from_u64(seed);
        let mut normal = || (0..12).map(|_| random.random::<f32>()).sum::<f32>() - 6.0;
        let mut x = |heads: usize| {
            let numbers = (0..batch.tokens() * heads * 64).map(|_| normal()).collect();
            Tensor::from_vec(numbers, (batch.tokens(), heads, 64), &Device::Cpu).unwrap()
        };
        let (q, k, v) = (x(4), x(2), x(2));
        Self { batch, q, k, v }
    }

    fn feed(&self, cache: &mut impl KvCache) -> Tensor {
        let Self { batch, q, k, v } = self;
        cache.attend(&Step { batch, q, k, v }).unwrap()
    }
}

/// The prompt attends exactly, and scores are computed from its keys and queries. So a packed store
/// keeps the same tokens as a dense one, and outputs of decoded tokens are close.
#[test]
fn packed_stores_keep_the_same_tokens_of_a_prompt() {
    let (prompt, token) = (Call::random(1, &SEQS), Call::random(2, &[(8, 1), (3, 1)]));
    for policy in POLICIES {
        let name = policy.name();
        let mut small = packed(policy, Bits::Four, Budget::Ratio(0.5));
        let dense = DenseStore::new(spec().shape, DType::F32).unwrap();
        let mut large = policy.cache(spec(), dense, Budget::Ratio(0.5)).unwrap();
        prompt.feed(&mut small);
        prompt.feed(&mut large);
        for (seq, _) in SEQS {
            assert_eq!(
                small.positions(seq).unwrap(),
                large.positions(seq).unwrap(),
                "{name}, sequence {seq}"
            );
        }
        let (bytes, dense) = (small.footprint(), large.footprint());
        assert!((bytes.total() - bytes.slack) * 3 < dense.total() - dense.slack, "{name}");
        let (a, b) = (token.feed(&mut small), token.feed(&mut large));
        let error = (a - b).unwrap().abs().unwrap().max_all().unwrap();
        let error = error.to_scalar::<f32>().unwrap();
        assert!(error > 0.0 && error < 0.1, "{name}: off by {error}");
    }
}

#[test]
fn budgets_hold_over_packed_stores_while_decoding() {
    for policy in POLICIES {
        let mut cache = packed(policy, Bits::Two, Budget::Tokens(100));
        cache = cache.with_decode_step(Some(10)).unwrap();
        Call::random(1, &SEQS).feed(&mut cache);
        for token in 0..40 {
            Call::random(2 + token, &[(3, 1), (8, 1)]).feed(&mut cache);
            for (seq, _) in SEQS {
                let held: usize = cache.store().lens(seq).iter().sum();
                assert!(held <= 2 * 100, "{}", policy.name());
                assert_eq!(held, cache.positions(seq).unwrap().iter().map(Vec::len).sum::<usize>());
            }
        }
    }
}

/// A head's bytes depend only on its own entries, rounded up to a block, not on those of the
/// longest head.
#[test]
fn heads_of_unequal_length_free_their_own_blocks() {
    // 32 keys and values of 64 channels: 4 bits per number, a scale and a minimum per 32 numbers.
    const BLOCK: usize = 2 * 64 * 32 / 2 + 2 * 64 * 4;
    let call = Call::random(1, &SEQS);
    let format = Format::kivi(Bits::Four, Bits::Four, 32, RESIDUAL).unwrap();
    let first = |count| (0..count).collect();
    let keep = [vec![first(200), first(25)], vec![first(40), first(130)]].map(Selection::new);
    let mut selected = QuantStore::new(spec().shape, format).unwrap();
    selected.append_selected(&call.batch, &call.k, &call.v, &keep).unwrap();
    let mut retained = QuantStore::new(spec().shape, format).unwrap();
    retained.append(&call.batch, &call.k, &call.v).unwrap();
    for ((seq, _), keep) in SEQS.iter().zip(&keep) {
        retained.retain(*seq, keep).unwrap();
    }
    for store in [selected, retained] {
        for ((seq, _), keep) in SEQS.iter().zip(&keep) {
            let held = store.seq_footprint(*seq);
            let blocks = |of: fn(usize) -> usize| -> usize {
                keep.lens().into_iter().map(|kept| of(kept) * BLOCK).sum()
            };
            let least = blocks(|kept| kept.saturating_sub(RESIDUAL) / 32);
            let most = blocks(|kept| kept.div_ceil(32) + 1);
            let bytes = held.payload + held.scales;
            assert!((least..=most).contains(&bytes), "{bytes} bytes of {least} to {most}");
        }
    }
}

/// Heads with separate budgets hold different numbers of entries. Each head's newest entries stay
/// in full precision, independent of the other heads. A head with few entries is not padded to the
/// length of the longest.
#[test]
fn heads_of_unequal_length_keep_their_newest_values_in_full_precision() {
    const WINDOW: usize = 16;
    let prompt = Call::random(1, &SEQS);
    // All keys of the second head are equal. The first head's scores vary, so its share differs.
    let even = prompt.k.narrow(1, 1, 1).unwrap().zeros_like().unwrap();
    let k = Tensor::cat(&[&prompt.k.narrow(1, 0, 1).unwrap(), &even], 1).unwrap();
    let prompt = Call { k, ..prompt };
    let format = Format::kivi(Bits::Two, Bits::Two, 32, RESIDUAL).unwrap();
    let store = QuantStore::new(spec().shape, format).unwrap();
    let policy = SnapKv::new(WINDOW).unwrap();
    let mut cache = PolicyCache::snap_kv(spec(), store, policy, Budget::Tokens(120))
        .unwrap()
        .with_head_budgets(HeadBudgets::Adaptive { safeguard: 0.2 })
        .unwrap();
    prompt.feed(&mut cache);
    for (seq, tokens) in prompt.batch.iter() {
        let lens = cache.store().lens(seq);
        assert!(lens[0] != lens[1], "the heads of sequence {seq} hold {lens:?} entries");
        for head in 0..2 {
            let held = cache.store().read(seq, head).unwrap().1;
            let held = held.narrow(0, lens[head] - WINDOW, WINDOW).unwrap();
            let came = prompt.v.narrow(1, head, 1).unwrap().squeeze(1).unwrap();
            let came = came.narrow(0, tokens.end - WINDOW, WINDOW).unwrap();
            let rounded = |x: &f32| f16::from_f32(*x).to_f32();
            let came = came.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let came: Vec<_> = came.iter().map(rounded).collect();
            let held = held.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(held == came, "sequence {seq}, head {head} of {lens:?}");
        }
    }
}
