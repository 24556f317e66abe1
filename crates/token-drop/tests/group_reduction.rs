//! The scores of a kv head's query heads are reduced by mean or maximum, as the policy sets it.

mod common;

use candle_core::{Device, Tensor};
use common::*;
use longctx_core::{AttentionShape, LayerSpec};
use token_drop::*;

/// The attention that each of two query heads gave to four entries. The last entry is the window's.
const SUMS: [[f32; 4]; 2] = [[3.0, 0.0, 1.0, 9.0], [0.0, 2.0, 1.5, 9.0]];

/// Returns a view of one kv head without tensors.
fn view(spec: &LayerSpec, entries: usize) -> LayerView<'_> {
    LayerView {
        spec,
        seen: entries,
        queries: None,
        kv_heads: 0..1,
        entries,
        positions: None,
        keys: None,
        values: None,
        attention_sums: None,
        observed_queries: 0,
        previous_scores: None,
    }
}

/// Returns the scores of the first three entries.
fn scores(policy: &impl EvictionPolicy) -> Vec<f32> {
    let spec = LayerSpec::new(AttentionShape::new(2, 1, 4).unwrap());
    let sums = Tensor::new(&[SUMS], &Device::Cpu).unwrap();
    let view = LayerView { attention_sums: Some(sums), observed_queries: 1, ..view(&spec, 4) };
    policy.score(&view).unwrap().to_vec2::<f32>().unwrap()[0][..3].to_vec()
}

#[test]
fn attention_is_joined_by_mean_or_max() {
    let snap_kv = SnapKv::new(1).unwrap().with_kernel(1).unwrap();
    let (finch, h2o) = (Finch::new(1).unwrap(), H2o::default());
    let mean = [1.5, 1.0, 1.25];
    assert_eq!([scores(&snap_kv), scores(&finch), scores(&h2o)], [mean; 3]);
    let max = GroupReduction::Max;
    let joined = [
        scores(&snap_kv.with_group_reduction(max)),
        scores(&finch.with_group_reduction(max)),
        scores(&h2o.with_group_reduction(max)),
    ];
    assert_eq!(joined, [[3.0, 2.0, 1.5]; 3]);
}

/// Expected attention of each query head alone, reduced in the test.
#[test]
fn expected_attention_is_joined_by_mean_or_max() {
    let text = Input::random(60);
    let group = HEADS / KV_HEADS;
    let score = |policy: ExpectedAttention, q: &Tensor| {
        let shape = AttentionShape::new(q.dim(1).unwrap(), 1, DIM).unwrap();
        let spec = LayerSpec::new(shape).with_rope(rope(DIM));
        let head = |x: &Tensor| Some(x.narrow(1, 0, 1).unwrap().transpose(0, 1).unwrap());
        let (keys, values) = (head(&text.k), head(&text.v));
        let view = LayerView { queries: Some(q), keys, values, ..view(&spec, 60) };
        policy.score(&view).unwrap().to_vec2::<f32>().unwrap()[0].clone()
    };
    let policy = ExpectedAttention::new(0);
    let alone: Vec<_> =
        (0..group).map(|h| score(policy, &text.q.narrow(1, h, 1).unwrap())).collect();
    let together = text.q.narrow(1, 0, group).unwrap();
    for group in [GroupReduction::Mean, GroupReduction::Max] {
        let joined = score(policy.with_group_reduction(group), &together);
        for (i, score) in joined.into_iter().enumerate() {
            let (a, b) = (alone[0][i], alone[1][i]);
            let expected = if group == GroupReduction::Mean { (a + b) / 2.0 } else { a.max(b) };
            assert!((score - expected).abs() <= 1e-5 * expected, "{group:?}: {score}, {expected}");
        }
    }
}
