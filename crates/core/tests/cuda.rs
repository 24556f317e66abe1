//! Dense caches on a CUDA device beside those of the host. Needs a CUDA device.
#![cfg(feature = "cuda")]

use candle_core::{DType, Device, Tensor};
use longctx_core::{AttentionShape, DenseCache, KvCache, Rope, RopeScaling, Step};

fn random(heads: usize, tokens: usize, d: usize, dtype: DType) -> Tensor {
    Tensor::randn(0f32, 1., (2, heads, tokens, d), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

#[test]
fn caches_attend_as_on_the_host() {
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
    for shape in shapes {
        let (heads, kv_heads, d) = (shape.heads, shape.kv_heads, shape.head_dim);
        let rope = Rope::new(d, d, 10_000.0, RopeScaling::None).unwrap();
        // Scores in f16, and bf16 outputs, carry those formats' rounding.
        for (dtype, bound) in [(DType::F32, 1e-4), (DType::F16, 2e-3), (DType::BF16, 1e-2)] {
            let mut host = DenseCache::new(shape, dtype).unwrap();
            let mut other = DenseCache::new(shape, dtype).unwrap();
            for tokens in [300, 1, 1, 2000, 3, 1] {
                let (q, k) = (random(heads, tokens, d, dtype), random(kv_heads, tokens, d, dtype));
                // Large values: their plain sum would not fit f16.
                let v = (random(kv_heads, tokens, d, dtype) + 300.0).unwrap();
                let [dq, dk, dv] = [&q, &k, &v].map(|x| x.to_device(&device).unwrap());
                let step = Step { q: &q, k: &k, v: &v, shape: &shape, rope: &rope };
                let want = host.attend(&step).unwrap();
                let step = Step { q: &dq, k: &dk, v: &dv, ..step };
                let got = other.attend(&step).unwrap().to_device(&Device::Cpu).unwrap();
                let f32 = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
                let error = (f32(&got) - f32(&want)).unwrap().abs().unwrap().max_all().unwrap();
                let error = error.to_scalar::<f32>().unwrap();
                assert!(error < 300.0 * bound, "{dtype:?}, {tokens} tokens, {shape:?}: {error}");
                assert_eq!(host.held(), other.held());
                assert_eq!(host.footprint().payload, other.footprint().payload);
            }
        }
    }
}
