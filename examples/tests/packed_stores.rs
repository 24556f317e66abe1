//! Eviction over packed stores: the policies of token-drop on the stores of kv-quant.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::f16;
use kv_quant::{Bits, Format, QuantStore};
use longctx_core::{
    AttentionShape, Batch, DenseStore, KvCache, KvStore, LayerSpec, Rope, RopeScaling, SeqId, Step,
};
use longctx_examples::methods::{Evicting, Eviction};
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
    fn random(seqs: &[(SeqId, usize)]) -> Self {
        let batch = Batch::new(seqs).unwrap();
        let x = |heads| Tensor::randn(0f32, 1., (batch.tokens(), heads, 64), &Device::Cpu).unwrap();
        let (q, k, v) = (x(4), x(2), x(2));
        Self { batch, q, k, v }
    }

    fn feed(&self, cache: &mut impl KvCache) -> Tensor {
        let Self { batch, q, k, v } = self;
        cache.attend(&Step { batch, q, k, v }).unwrap()
    }
}

/// The prompt attends exactly and scores come from its own keys and queries, so that a packed store
/// is left with the same tokens as a dense one; decoded tokens then see nearly the same.
#[test]
fn packed_stores_keep_the_same_tokens_of_a_prompt() {
    let (prompt, token) = (Call::random(&SEQS), Call::random(&[(8, 1), (3, 1)]));
    for policy in POLICIES {
        let name = policy.name();
        let mut small = packed(policy, Bits::Four, Budget::Ratio(0.5));
        let dense = DenseStore::new(spec().shape, DType::F32).unwrap();
        let mut large = policy.cache(spec(), dense, Budget::Ratio(0.5)).unwrap();
        prompt.feed(&mut small);
        prompt.feed(&mut large);
        for (seq, _) in SEQS {
            assert_eq!(small.positions(seq), large.positions(seq), "{name}, sequence {seq}");
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
        Call::random(&SEQS).feed(&mut cache);
        for _ in 0..40 {
            Call::random(&[(3, 1), (8, 1)]).feed(&mut cache);
            for (seq, _) in SEQS {
                let held: usize = cache.store().lens(seq).iter().sum();
                assert!(held <= 2 * 100, "{}", policy.name());
                assert_eq!(held, cache.positions(seq).iter().map(Vec::len).sum::<usize>());
            }
        }
    }
}

/// The newest tokens that SnapKV observes.
const WINDOW: usize = 16;

/// A prompt, and a cache with budgets per head that took it in.
fn unequal_heads(bits: Bits) -> (Call, PolicyCache<QuantStore, SnapKv>) {
    let prompt = Call::random(&SEQS);
    // Every query of the first head sees a token of its own. The second head's keys are all alike,
    // and so are its scores: it gets less.
    let head = |i| prompt.k.narrow(1, i, 1).unwrap();
    let (sharp, even) = ((head(0) * 30.).unwrap(), head(1).zeros_like().unwrap());
    let k = Tensor::cat(&[sharp, even], 1).unwrap();
    let prompt = Call { k, ..prompt };
    let format = Format::kivi(bits, bits, 32, RESIDUAL).unwrap();
    let store = QuantStore::new(spec().shape, format).unwrap();
    let policy = SnapKv::new(WINDOW).unwrap();
    let mut cache = PolicyCache::snap_kv(spec(), store, policy, Budget::Tokens(120))
        .unwrap()
        .with_head_budgets(HeadBudgets::Adaptive { safeguard: 0.2 })
        .unwrap();
    prompt.feed(&mut cache);
    (prompt, cache)
}

/// A head pays for its own entries, rounded up to a block, and not for the longest head's.
#[test]
fn heads_of_unequal_length_free_their_own_blocks() {
    // 32 keys and values of 64 channels: 4 bits a number, a scale and a zero point for 32 of them.
    const BLOCK: usize = 2 * 64 * 32 / 2 + 2 * 64 * 4;
    let (_, cache) = unequal_heads(Bits::Four);
    for (seq, _) in SEQS {
        let lens = cache.store().lens(seq);
        assert!(lens[0] > lens[1] + 32, "the heads hold {lens:?} entries");
        let held = cache.store().seq_footprint(seq);
        let most: usize = lens.iter().map(|len| (len / 32 + 1) * BLOCK).sum();
        let least: usize = lens.iter().map(|len| (len - RESIDUAL) / 32 * BLOCK).sum();
        let bytes = held.payload + held.scales;
        assert!((least..=most).contains(&bytes), "{bytes} bytes of {least} to {most}, {lens:?}");
    }
}

/// Heads with budgets of their own hold different numbers of entries. Each head's newest entries
/// stay in full precision, whatever the others hold: a head with few entries is not padded to the
/// length of the longest.
#[test]
fn heads_of_unequal_length_keep_their_newest_values_in_full_precision() {
    let (prompt, cache) = unequal_heads(Bits::Two);
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
