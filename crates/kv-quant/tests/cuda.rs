//! The device's kernels behind the crate's types, beside the host's on the same numbers. Needs a CUDA device.
#![cfg(feature = "cuda")]

use candle_core::{CudaDevice, DType, Device, Tensor};
use kv_quant::{Bits, CudaStore, Format, QuantCache, QuantStore};
use longctx_core::{AttentionShape, KvCache, KvStore, Rope, RopeScaling, Step, Visible};

fn device() -> Option<(CudaDevice, Device)> {
    match Device::new_cuda(0) {
        Ok(Device::Cuda(device)) => Some((device.clone(), Device::Cuda(device))),
        _ => {
            println!("skipped: no CUDA device");
            None
        }
    }
}

/// Numbers that f16 holds, so that both sides begin with the same.
fn numbers(shape: (usize, usize, usize, usize)) -> Tensor {
    Tensor::randn(0f32, 1., shape, &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap()
}

fn relative(got: &Tensor, want: &Tensor) -> f32 {
    let f32 = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let (got, want) = (f32(got), f32(want));
    let norm = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    norm((&got - &want).unwrap()) / norm(want)
}

#[test]
fn stores_attend_as_on_the_host() {
    let Some((cuda, device)) = device() else { return };
    for (heads, kv_heads, d) in [(4, 4, 64), (8, 2, 128), (8, 1, 256)] {
        let shape = AttentionShape::new(heads, kv_heads, d).unwrap();
        for bits in [Bits::Two, Bits::Four, Bits::Eight] {
            for (group, residual) in [(32, 128), (64, 64), (128, 128)] {
                let format = Format::kivi(bits, bits, group, residual).unwrap();
                let mut host = QuantStore::new(shape, format).unwrap();
                let mut store = CudaStore::new(shape, format, &cuda).unwrap();
                for tokens in [1, 31, 1, 33, 127, 300, 1, 1, 1200, 17, 1] {
                    let [k, v] = [0; 2].map(|_| numbers((2, kv_heads, tokens, d)));
                    let q = numbers((2, heads, tokens, d));
                    let [dk, dv, dq] = [&k, &v, &q].map(|x| x.to_device(&device).unwrap());
                    host.append(&k, &v).unwrap();
                    store.append(&dk, &dv).unwrap();
                    assert_eq!(store.lens(), host.lens());
                    let want = host.attend(&q, Visible::Causal).unwrap();
                    let got = store.attend(&dq, Visible::Causal).unwrap();
                    let what =
                        format!("{bits:?}, group {group}, head_dim {d}, {} held", host.len());
                    let error = relative(&got.out, &want.out);
                    assert!(error <= 2e-3, "{what}: {error}");
                    let error = relative(&got.lse, &want.lse);
                    assert!(error <= 2e-3, "lse, {what}: {error}");
                    let want = host.mass(&q, &want.lse, Visible::Causal).unwrap();
                    let got = store.mass(&dq, &got.lse, Visible::Causal).unwrap();
                    let flat = |masses: Vec<Vec<f32>>| {
                        let numbers = masses.concat();
                        Tensor::from_vec(numbers, 2 * heads * host.len(), &Device::Cpu).unwrap()
                    };
                    let error = relative(&flat(got), &flat(want));
                    assert!(error <= 2e-3, "mass, {what}: {error}");
                }
                let (k, v) = host.read(1, kv_heads - 1).unwrap();
                let (dk, dv) = store.read(1, kv_heads - 1).unwrap();
                assert!(relative(&dk, &k) < 2e-3 && relative(&dv, &v) < 2e-3);
            }
        }
    }
}

#[test]
fn caches_find_the_kernels_or_do_without() {
    let Some((_, device)) = device() else { return };
    let shape = AttentionShape::new(8, 2, 64).unwrap();
    let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap();
    let kivi = Format::kivi(Bits::Four, Bits::Four, 32, 128).unwrap();
    let flexgen = Format::flexgen(Bits::Four, Bits::Four, 64).unwrap();
    for format in [kivi, flexgen] {
        let mut host = QuantCache::new(shape, format).unwrap();
        let mut other = host.clone();
        for tokens in [400, 1, 1, 60, 1] {
            let [k, v] = [0; 2].map(|_| numbers((1, 2, tokens, 64)));
            let q = numbers((1, 8, tokens, 64));
            let [dk, dv, dq] = [&k, &v, &q].map(|x| x.to_device(&device).unwrap());
            let want = host.attend(&Step { q: &q, k: &k, v: &v, shape: &shape, rope: &rope });
            let got = other.attend(&Step { q: &dq, k: &dk, v: &dv, shape: &shape, rope: &rope });
            let error = relative(&got.unwrap(), &want.unwrap());
            // Each side rotates keys in f16 on its own: a last bit that differs now and then makes another code.
            assert!(error <= 2e-2, "{format:?}, {tokens} tokens: {error}");
            assert_eq!(host.held(), other.held());
        }
    }
}

#[test]
fn a_number_that_cannot_be_packed_is_reported() {
    let Some((cuda, device)) = device() else { return };
    let shape = AttentionShape::new(2, 1, 64).unwrap();
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap();
    let mut store = CudaStore::new(shape, format, &cuda).unwrap();
    let mut numbers = vec![1f32; 200 * 64];
    numbers[40 * 64 + 7] = f32::INFINITY;
    let bad = Tensor::from_vec(numbers, (1, 1, 200, 64), &device).unwrap();
    let message = store.append(&bad, &bad).unwrap_err().to_string();
    assert!(message.contains("group of 32") && message.contains("finite"), "{message}");
}
