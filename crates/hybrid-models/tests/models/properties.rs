//! Properties of every model with any weights: see the name of each test.

use crate::common::{Fixture, SAME, advance, feed, feed_on, relative_distance, session};
use candle_core::{DType, Device, Tensor};
use hybrid_models::State;
use longctx_core::{CausalLm, Logits};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

const RECURRENT: [&str; 7] =
    ["mamba", "mamba2", "mamba2_groups", "rwkv4", "rwkv5", "rwkv6", "rwkv7"];

fn any_model() -> impl Strategy<Value = &'static str> {
    prop::sample::select([RECURRENT.as_slice(), &["recurrent_gemma"]].concat())
}

fn tokens(batch: usize, ids: &[u32]) -> Tensor {
    Tensor::from_slice(ids, (batch, ids.len() / batch), &Device::Cpu).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    let numbers: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    numbers.into_iter().map(f32::to_bits).collect()
}

fn config() -> ProptestConfig {
    let given = ProptestConfig::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { given.cases } else { 24 };
    let rng_seed = match given.rng_seed {
        RngSeed::Random => RngSeed::Fixed(7),
        fixed => fixed,
    };
    ProptestConfig { cases, rng_seed, failure_persistence: None, ..given }
}

proptest! {
    // The same cases on every run. PROPTEST_CASES and PROPTEST_RNG_SEED change their number and
    // choice.
    #![proptest_config(config())]

    #[test]
    fn chunks_equal_steps(
        name in any_model(),
        ids in prop::collection::vec(0u32..96, 1..140),
        cuts in prop::collection::vec(1usize..80, 1..6),
    ) {
        let model = Fixture::open(name).model(DType::F32);
        let ids = tokens(1, &ids);
        let error = relative_distance(&feed(&model, &ids, &cuts), &feed(&model, &ids, &[1]));
        prop_assert!(error <= SAME, "{name}: off by {error} of the largest logit");
    }

    #[test]
    fn a_saved_state_continues_bit_for_bit(
        name in prop::sample::select(RECURRENT.as_slice()),
        (before, after) in (prop::collection::vec(0u32..96, 2..60), prop::collection::vec(0u32..96, 2..40)),
    ) {
        let model = Fixture::open(name).model(DType::F32);
        let ids = |ids: &[u32]| tokens(2, &ids[..ids.len() / 2 * 2]);
        let (before, after) = (ids(&before), ids(&after));
        let (mut first, mut second) = (session(&model), session(&model));
        feed_on(&mut first, &before, &[17]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        for seq in [0, 1] {
            let state = first.state(seq).unwrap();
            state.save(&path).unwrap();
            let loaded = State::load(&path).unwrap();
            prop_assert_eq!(&loaded, &state);
            second.restore(seq, &loaded).unwrap();
            prop_assert_eq!(second.seen(seq), first.seen(seq));
        }
        let (a, b) = (feed_on(&mut first, &after, &[5]), feed_on(&mut second, &after, &[5]));
        prop_assert_eq!(bits(&a), bits(&b));
    }

    #[test]
    fn entries_of_a_batch_do_not_mix(
        name in any_model(),
        ids in prop::collection::vec(0u32..96, 120),
        cut in 1usize..50,
    ) {
        let model = Fixture::open(name).model(DType::F32);
        let together = feed(&model, &tokens(3, &ids), &[cut, 1]);
        for (entry, ids) in ids.chunks(40).enumerate() {
            let alone = feed(&model, &tokens(1, ids), &[cut, 1]);
            let error = relative_distance(&together.narrow(0, entry, 1).unwrap(), &alone);
            prop_assert!(error <= SAME, "{name}: off by {error} of the largest logit");
        }
    }
}

#[test]
fn a_state_has_as_many_bytes_after_100_000_tokens_as_after_one() {
    for name in RECURRENT {
        let model = Fixture::open(name).model(DType::F32);
        let mut session = session(&model);
        assert_eq!(session.footprint().total(), 0);
        advance(&mut session, &[(5, &[1])], Logits::Last).unwrap();
        let bytes = session.footprint();
        assert_eq!(session.state(5).unwrap().footprint(), bytes);
        let ids: Vec<u32> = (0..99_999).map(|i| i * 7 % 96).collect();
        let logits = advance(&mut session, &[(5, &ids)], Logits::Last).unwrap();
        assert_eq!(session.footprint(), bytes, "{name}");
        assert_eq!(session.seen(5), 100_000);
        let largest: f32 = logits.abs().unwrap().max_all().unwrap().to_scalar().unwrap();
        assert!(largest.is_finite() && largest < 100.0, "{name}: a logit of {largest}");
    }
}
