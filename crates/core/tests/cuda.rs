//! Dense caches on a CUDA device beside those of the CPU. Needs a CUDA device.
#![cfg(feature = "cuda")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use longctx_core::{
    AttentionShape, Batch, DenseCache, KvCache, LayerSpec, Rope, RopeScaling, SeqId, Step,
};

fn random(tokens: usize, heads: usize, d: usize, dtype: DType) -> Tensor {
    Tensor::randn(0f32, 1., (tokens, heads, d), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

#[test]
fn caches_attend_as_on_the_cpu() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let plain = AttentionShape::new(8, 2, 64).unwrap();
    let shapes = [
        plain,
        AttentionShape { window: Some(200), ..plain },
        AttentionShape { soft_cap: Some(5.0), ..AttentionShape::new(3, 3, 128).unwrap() },
        AttentionShape::new(6, 1, 256).unwrap(),
        AttentionShape::new(2, 1, 80).unwrap(),
    ];
    let calls: [&[(SeqId, usize)]; 6] = [
        &[(0, 300), (1, 17)],
        &[(0, 1), (1, 1)],
        &[(1, 1)],
        &[(2, 2000), (0, 1)],
        &[(0, 3), (2, 1), (1, 90)],
        &[(0, 1), (1, 1), (2, 1)],
    ];
    for shape in shapes {
        let (heads, kv_heads, d) = (shape.heads, shape.kv_heads, shape.head_dim);
        let rope = Arc::new(Rope::new(d, d, 10_000.0, RopeScaling::None).unwrap());
        let spec = LayerSpec::new(shape).with_rope(rope);
        // Scores in f16, and bf16 outputs, carry those formats' rounding.
        for (dtype, bound) in [(DType::F32, 1e-4), (DType::F16, 2e-3), (DType::BF16, 1e-2)] {
            let mut host = DenseCache::new(spec.clone(), dtype).unwrap();
            let mut other = DenseCache::new(spec.clone(), dtype).unwrap();
            for call in calls {
                let batch = Batch::new(call).unwrap();
                let tokens = batch.tokens();
                let (q, k) = (random(tokens, heads, d, dtype), random(tokens, kv_heads, d, dtype));
                // Large values: their plain sum would not fit f16.
                let v = (random(tokens, kv_heads, d, dtype) + 300.0).unwrap();
                let [dq, dk, dv] = [&q, &k, &v].map(|x| x.to_device(&device).unwrap());
                let want = host.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
                let step = Step { batch: &batch, q: &dq, k: &dk, v: &dv };
                let got = other.attend(&step).unwrap().to_device(&Device::Cpu).unwrap();
                let f32 = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
                let error = (f32(&got) - f32(&want)).unwrap().abs().unwrap();
                let error =
                    error.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
                assert!(error < 300.0 * bound, "{dtype:?}, {call:?}, {shape:?}: {error}");
                for (seq, _) in call {
                    assert_eq!(host.held(*seq), other.held(*seq));
                    let payload = |cache: &DenseCache| cache.seq_footprint(*seq).payload;
                    assert_eq!(payload(&host), payload(&other));
                }
            }
        }
    }
}
