//! token-drop's caches over dense and packed stores on a CUDA device against the same on the CPU,
//! on the same numbers. Skipped if there is no device.
#![cfg(all(feature = "candle", feature = "cuda"))]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kv_quant::{Bits, Format, QuantStore};
use longctx_core::{
    AttentionShape, Batch, DenseStore, KvCache, KvStore, LayerSpec, Rope, RopeScaling, SeqId, Step,
};
use token_drop::*;

const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 64;

fn shape() -> AttentionShape {
    AttentionShape::new(HEADS, KV_HEADS, DIM).unwrap()
}

fn spec() -> LayerSpec {
    let rope = Rope::new(DIM, DIM, 10_000.0, RopeScaling::None).unwrap();
    LayerSpec::new(shape()).with_rope(Arc::new(rope))
}

/// Returns numbers that depend only on the seed, and that f16 represents.
fn numbers(seed: &mut u64, tokens: usize, heads: usize) -> Tensor {
    let mut number = || {
        *seed =
            seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((*seed >> 40) as f32 / (1 << 23) as f32 - 1.0) * 2.5
    };
    let data: Vec<f32> = (0..tokens * heads * DIM).map(|_| number()).collect();
    let x = Tensor::from_vec(data, (tokens, heads, DIM), &Device::Cpu).unwrap();
    x.to_dtype(DType::F16).unwrap()
}

fn relative(got: &Tensor, want: &Tensor) -> f32 {
    let f32 = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let (got, want) = (f32(got), f32(want));
    let norm = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    norm((&got - &want).unwrap()) / norm(want).max(1e-6)
}

/// The largest error of an output, by norm.
const LIMIT: f32 = 5e-3;

const CALLS: [&[(SeqId, usize)]; 6] = [
    &[(0, 500), (1, 70)],
    &[(0, 1), (1, 1)],
    &[(1, 1), (2, 140)],
    &[(0, 1), (1, 1), (2, 1)],
    &[(2, 6), (0, 1)],
    &[(2, 1), (1, 1), (0, 1)],
];

/// Feeds the same to a cache on each side, until `same` reports that they hold different entries.
/// Returns the number of compared calls and the largest relative error of an output.
fn compare<A: KvCache, B: KvCache>(
    name: &str,
    both: (&mut A, &mut B),
    device: &Device,
    same: impl FnMut(&A, &B, &str) -> bool,
) -> (usize, f32) {
    compare_calls((name, false), &CALLS, both, device, same)
}

/// `selects_first`: entries are selected before a call's attention, so that its output is comparable
/// only if the sides have selected the same.
fn compare_calls<A: KvCache, B: KvCache>(
    (name, selects_first): (&str, bool),
    calls: &[&[(SeqId, usize)]],
    (host, other): (&mut A, &mut B),
    device: &Device,
    mut same: impl FnMut(&A, &B, &str) -> bool,
) -> (usize, f32) {
    let mut seed = 11;
    let mut worst = 0f32;
    for (i, call) in calls.iter().enumerate() {
        let batch = Batch::new(call).unwrap();
        let q = numbers(&mut seed, batch.tokens(), HEADS);
        let [k, v] = [0; 2].map(|_| numbers(&mut seed, batch.tokens(), KV_HEADS));
        let [dq, dk, dv] = [&q, &k, &v].map(|x| x.to_device(device).unwrap());
        let want = host.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
        let got = other.attend(&Step { batch: &batch, q: &dq, k: &dk, v: &dv });
        let got = got.unwrap_or_else(|error| panic!("{name}, call {i}: {error}"));
        let same = same(host, other, &format!("{name}, call {i}"));
        if same || !selects_first {
            worst = worst.max(relative(&got, &want));
            assert!(worst <= LIMIT, "{name}, call {i}: {worst}");
        }
        if !same {
            return (i + 1, worst);
        }
    }
    (calls.len(), worst)
}

type Policies<S> = Vec<(&'static str, PolicyCache<S, Box<dyn EvictionPolicy>>)>;

fn policies<S: KvStore + 'static>(store: impl Fn() -> S) -> Policies<S> {
    let budget = Budget::Ratio(0.4);
    let adaptive = HeadBudgets::Adaptive { safeguard: 0.2 };
    let snap_kv = || {
        let policy = SnapKv::new(16).unwrap();
        PolicyCache::snap_kv(spec(), store(), policy, budget.clone()).unwrap()
    };
    let decoding = |policy: Box<dyn EvictionPolicy>| {
        let cache = PolicyCache::new(spec(), store(), policy, budget.clone()).unwrap();
        cache.with_decode_step(Some(2)).unwrap()
    };
    let finch = PolicyCache::finch(spec(), store(), Finch::new(9).unwrap(), budget.clone());
    let expected = ExpectedAttention::default();
    let expected = PolicyCache::expected_attention(spec(), store(), expected, budget.clone());
    let lag_kv = PolicyCache::lag_kv(spec(), store(), LagKv::new(4, 32).unwrap(), budget.clone());
    let duo = DuoAttention::new(vec![false, true], 4, 60).unwrap();
    vec![
        ("SnapKV", snap_kv().boxed()),
        ("SnapKV, adaptive", snap_kv().with_head_budgets(adaptive).unwrap().boxed()),
        ("SnapKV, chunks", snap_kv().with_granularity(Granularity::Chunk(10)).unwrap().boxed()),
        ("SnapKV, decoding", snap_kv().with_decode_step(Some(1)).unwrap().boxed()),
        ("H2O", PolicyCache::h2o(spec(), store(), H2o::default(), budget.clone()).unwrap().boxed()),
        (
            "TOVA",
            PolicyCache::tova(spec(), store(), Tova::default(), budget.clone()).unwrap().boxed(),
        ),
        ("Finch", finch.unwrap().boxed()),
        ("Expected Attention", expected.unwrap().boxed()),
        ("LagKV", lag_kv.unwrap().boxed()),
        ("K-norm", decoding(Box::new(KNorm))),
        ("KeyDiff", decoding(Box::new(KeyDiff))),
        ("KeyDiff, re-rotated", decoding(Box::new(KeyDiff)).with_rerotation().unwrap()),
        ("random", decoding(Box::new(Random::new(3)))),
        ("recent", PolicyCache::recent(spec(), store(), 4, budget.clone()).unwrap().boxed()),
        ("DuoAttention", PolicyCache::duo_attention(spec(), store(), &duo).unwrap().boxed()),
    ]
}

fn check_policies<S: KvStore + 'static>(store: impl Fn() -> S + Copy) {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let (mut compared, mut all) = (0, 0);
    for ((name, mut host), (_, mut other)) in policies(store).into_iter().zip(policies(store)) {
        let (calls, worst) =
            compare(name, (&mut host, &mut other), &device, |host, other, what| {
                (0..3).all(|seq| {
                    let lists = |cache: &PolicyCache<_, _>| cache.positions(seq).unwrap();
                    same_positions(&lists(host), &lists(other), what)
                })
            });
        println!("{name}: {calls} calls of {}, the worst error {worst:.1e}", CALLS.len());
        (compared, all) = (compared + calls, all + CALLS.len());
    }
    assert!(compared * 4 >= all * 3, "only {compared} calls of {all} were compared");
}

/// Returns whether both sides hold the same entries. Scores that differ only by rounding may be in
/// another order, so one or two entries of a head may differ.
fn same_positions(host: &[Vec<u32>], other: &[Vec<u32>], what: &str) -> bool {
    let missing = |a: &[Vec<u32>], b: &[Vec<u32>]| -> usize {
        a.iter().zip(b).map(|(a, b)| a.iter().filter(|x| !b.contains(x)).count()).sum()
    };
    assert_eq!(host.len(), other.len(), "{what}");
    let (gone, new) = (missing(host, other), missing(other, host));
    assert_eq!(gone, new, "{what}: the sides hold different numbers of entries");
    let held: usize = host.iter().map(Vec::len).sum();
    assert!(gone <= 2 + held / 50, "{what}: {gone} of {held} entries differ");
    if gone > 0 {
        println!("{what}: {gone} of {held} entries differ");
    }
    gone == 0
}

fn check_retrieval<S: KvStore>(store: impl Fn() -> S) {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let held = |host: &dyn KvCache, other: &dyn KvCache, what: &str| {
        (0..3).for_each(|seq| assert_eq!(host.held(seq), other.held(seq), "{what}"));
        true
    };
    let streaming = || StreamingLlm::new(spec(), store(), 4, 100).unwrap();
    let both = (&mut streaming(), &mut streaming());
    let (_, worst) = compare("StreamingLLM", both, &device, |a, b, what| held(a, b, what));
    println!("StreamingLLM: the worst error {worst:.1e}");
    let quest = || Quest::new(spec(), store(), 64).unwrap();
    let both = (&mut quest(), &mut quest());
    let (_, worst) = compare("Quest", both, &device, |a, b, what| held(a, b, what));
    println!("Quest: the worst error {worst:.1e}");
    for published in [false, true] {
        check_inf_llm(&store, &device, published);
    }
}

/// Compares InfLLM until rounding makes the sides retrieve different blocks.
fn check_inf_llm<S: KvStore>(store: &impl Fn() -> S, device: &Device, published: bool) {
    let sizes = InfLlmSettings {
        init: 4,
        local: 64,
        block: 16,
        top_blocks: 4,
        resident_blocks: 6,
        representatives: 3,
        chunk: 32,
    };
    let cache = || {
        let cache = InfLlm::new(spec(), store(), dense(), sizes).unwrap();
        if published { cache.with_published_remainder() } else { cache }
    };
    // A call is at most one chunk, which retrieves once.
    let mut calls: Vec<&[(SeqId, usize)]> = vec![&[(0, 32), (1, 20)]; 8];
    calls.extend([&[(0, 1), (1, 1)][..]; 20]);
    calls.extend([&[(1, 32), (2, 17), (0, 1)][..]; 4]);
    let both = (&mut cache(), &mut cache());
    let (compared, worst) =
        compare_calls(("InfLLM", true), &calls, both, device, |host, other, what| {
            (0..3).all(|seq| {
                assert_eq!(host.held(seq), other.held(seq), "{what}");
                assert_eq!(host.blocks(seq), other.blocks(seq), "{what}");
                host.retrieved(seq) == other.retrieved(seq)
            })
        });
    println!("InfLLM: {compared} calls of {}, the worst error {worst:.1e}", calls.len());
    assert!(compared >= 8, "only {compared} calls were compared");
}

fn dense() -> DenseStore {
    DenseStore::new(shape(), DType::F16).unwrap()
}

fn packed() -> QuantStore {
    QuantStore::new(shape(), Format::kivi(Bits::Eight, Bits::Eight, 32, 32).unwrap()).unwrap()
}

#[test]
fn policies_over_dense_stores_keep_what_they_keep_on_the_cpu() {
    check_policies(dense);
}

#[test]
fn policies_over_packed_stores_keep_what_they_keep_on_the_cpu() {
    check_policies(packed);
}

#[test]
fn retrieval_over_dense_stores_attends_as_on_the_cpu() {
    check_retrieval(dense);
}

#[test]
fn retrieval_over_packed_stores_attends_as_on_the_cpu() {
    check_retrieval(packed);
}
