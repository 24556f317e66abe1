//! Attention and dense caches on a CUDA device against the CPU. Needs a CUDA device.
#![cfg(feature = "cuda")]

mod common;

use std::sync::Arc;

use candle_core::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda::cudarc::driver::{CudaContext, DevicePtr};
use candle_core::{DType, Device, Tensor};
use common::{random, relative};
use half::f16;
use longctx_core::cuda::DecodeGraphs;
use longctx_core::{
    AttentionShape, AttentionState, Batch, DenseCache, Error, Greedy, KvCache, LayerSpec, Mask,
    PostAttention, PostAttentionWeights, Rope, RopeScaling, SeqId, Step, StepLists, add_rms_norm,
    attention, linear, silu_mul,
};
use longctx_cuda::compute_capability;
use longctx_kernels::{Half, PAGE, PostAttentionArgs, PrefillArgs, has_post_attention, prefill};

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
        // f16 scores and bf16 outputs carry the rounding of those formats.
        for (dtype, bound) in [(DType::F32, 1e-4), (DType::F16, 2e-3), (DType::BF16, 1e-2)] {
            let mut host = DenseCache::new(spec.clone(), dtype).unwrap();
            let mut other = DenseCache::new(spec.clone(), dtype).unwrap();
            for call in calls {
                let batch = Batch::new(call).unwrap();
                let tokens = batch.tokens();
                let (q, k) = (random(tokens, heads, d, dtype), random(tokens, kv_heads, d, dtype));
                // Large values: their plain sum would overflow f16.
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

#[test]
fn prompts_attend_as_on_the_cpu() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let batch = Batch::new(&[(3, 1), (1, 300), (7, 64), (2, 129)]).unwrap();
    for (heads, kv_heads, d) in
        [(8, 2, 64), (2, 2, 80), (7, 1, 96), (8, 2, 128), (4, 2, 192), (6, 2, 256)]
    {
        let plain = AttentionShape::new(heads, kv_heads, d).unwrap();
        let shapes = [
            plain,
            AttentionShape { window: Some(70), ..plain },
            AttentionShape { soft_cap: Some(3.0), scale: 0.3, ..plain },
        ];
        for shape in shapes {
            for (dtype, bound) in [(DType::F16, 1e-3), (DType::BF16, 6e-3), (DType::F32, 1e-4)] {
                // Queries, keys and values are views into the output of one projection.
                let qkv = random(batch.tokens(), heads + 2 * kv_heads, d, dtype);
                let parts = |qkv: &Tensor| {
                    let of = |first, count| qkv.narrow(1, first, count).unwrap();
                    (of(0, heads), of(heads, kv_heads), of(heads + kv_heads, kv_heads))
                };
                let (q, k, v) = parts(&qkv);
                let want = attention::attend(&batch, &q, &k, &v, &shape).unwrap();
                let on_device = qkv.to_device(&device).unwrap();
                let (q, k, v) = parts(&on_device);
                let got = attention::attend(&batch, &q, &k, &v, &shape).unwrap();
                let error = relative(&got.out, &want.out);
                assert!(error < bound, "{dtype:?}, {shape:?}: {error}");
                let error = relative(&got.lse, &want.lse);
                assert!(error < 1e-4, "{dtype:?}, {shape:?}: log-sum-exp {error}");
            }
        }
    }
}

#[test]
fn gates_are_as_on_the_cpu() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    for (rows, columns) in [(1, 8), (37, 1000), (300, 4096), (5, 13)] {
        for (dtype, bound) in [(DType::F16, 1e-3), (DType::BF16, 6e-3)] {
            let both = random(rows, 1, 2 * columns, dtype).squeeze(1).unwrap();
            let halves = |x: &Tensor| [0, columns].map(|at| x.narrow(1, at, columns).unwrap());
            let [gate, up] = halves(&both.to_dtype(DType::F32).unwrap());
            let want = silu_mul(&gate, &up).unwrap();
            let [gate, up] = halves(&both.to_device(&device).unwrap());
            let got = silu_mul(&gate, &up).unwrap();
            assert_eq!(got.dtype(), dtype);
            assert!(relative(&got, &want) < bound, "{rows} x {columns}, {dtype:?}");
        }
    }
}

#[test]
fn norms_are_as_on_the_cpu() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    for (rows, columns) in [(1, 8), (37, 1000), (3, 4096), (2, 16_384), (5, 13)] {
        for (dtype, bound) in [(DType::F16, 2e-3), (DType::BF16, 1e-2)] {
            let [x, y] = [0; 2].map(|_| random(rows, 1, columns, dtype).squeeze(1).unwrap());
            let weights = random(1, 1, columns, dtype).flatten_all().unwrap();
            let f32 = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
            let there = |x: &Tensor| x.to_device(&device).unwrap();
            for y in [None, Some(&y)] {
                let host = y.map(f32);
                let want = add_rms_norm(&f32(&x), host.as_ref(), &f32(&weights), 1e-5).unwrap();
                let other = y.map(there);
                let got = add_rms_norm(&there(&x), other.as_ref(), &there(&weights), 1e-5).unwrap();
                assert!(relative(&got.0, &want.0) < bound, "{rows} x {columns}, {dtype:?}: sum");
                assert!(relative(&got.1, &want.1) < bound, "{rows} x {columns}, {dtype:?}: norm");
            }
        }
    }
}

#[test]
fn parts_merge_as_on_the_cpu() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    for (tokens, heads, d) in [(2, 1, 64), (37, 6, 80), (300, 8, 128)] {
        let part = |hidden: usize| {
            let lse = Tensor::randn(0f32, 9.0, (tokens, heads), &Device::Cpu).unwrap();
            let mut lse = lse.to_vec2::<f32>().unwrap();
            // Some queries see nothing in this part, the first one in no part.
            lse.iter_mut().step_by(hidden).for_each(|lse| lse.fill(f32::NEG_INFINITY));
            let mut out = random(tokens, heads, d, DType::F32).to_vec3::<f32>().unwrap();
            out.iter_mut().step_by(hidden).flatten().for_each(|out| out.fill(0.0));
            let tensor = |device: &Device| AttentionState {
                out: Tensor::new(out.clone(), device).unwrap(),
                lse: Tensor::new(lse.clone(), device).unwrap(),
            };
            (tensor(&Device::Cpu), tensor(&device))
        };
        let (host, other): (Vec<_>, Vec<_>) = [2, 3, 5].map(part).into_iter().unzip();
        for count in 1..=3 {
            let want = AttentionState::merge(&host[..count]).unwrap();
            let got = AttentionState::merge(&other[..count]).unwrap();
            assert!(relative(&got.out, &want.out) < 1e-5);
            let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (got, want) in numbers(&got.lse).into_iter().zip(numbers(&want.lse)) {
                assert!(got == want || (got - want).abs() < 1e-4, "{got} instead of {want}");
            }
        }
    }
}

/// A kernel must not read the memory of another device.
#[test]
fn tensors_of_two_devices_are_refused() {
    let (Ok(device), Ok(other)) = (Device::new_cuda(0), Device::new_cuda(1)) else {
        println!("skipped: fewer than two CUDA devices");
        return;
    };
    let rows = random(4, 1, 64, DType::F16).squeeze(1).unwrap();
    let on = |x: &Tensor| [x.to_device(&device).unwrap(), x.to_device(&other).unwrap()];
    let [here, there] = on(&rows);
    let weights = there.get(0).unwrap();
    assert!(silu_mul(&here, &there).is_err());
    assert!(linear(&here, &there).is_err());
    assert!(add_rms_norm(&here, Some(&there), &weights, 1e-5).is_err());
    let [q, k] = on(&random(4, 2, 64, DType::F16));
    let (batch, shape) = (Batch::single(0, 4).unwrap(), AttentionShape::new(2, 2, 64).unwrap());
    assert!(attention::attend(&batch, &q, &k, &k, &shape).is_err());
    let state = |x: &Tensor| attention::attend(&batch, x, x, x, &shape).unwrap();
    assert!(AttentionState::merge(&[state(&q), state(&k)]).is_err());
    // Each is rotated on its own device.
    let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap();
    let both = rope.apply_both(&q, &k, &[5, 6, 7, 8]).unwrap();
    assert_eq!(relative(&both.0, &both.1), 0.0);
}

#[test]
fn greedy_tokens_are_the_cpus() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    for (rows, vocab) in [(1, 1), (3, 7), (2, 1023), (4, 1025), (70, 128_256)] {
        // Rounded, so that rows have ties and both zeros.
        let x = Tensor::randn(0f32, 1.0, (rows, vocab), &Device::Cpu).unwrap().round().unwrap();
        let mut numbers = x.to_vec2::<f32>().unwrap();
        if rows > 2 {
            numbers[0].fill(f32::NEG_INFINITY);
            numbers[1][vocab - 1] = -f32::NAN;
            numbers[2][vocab / 2] = f32::INFINITY;
        }
        let x = Tensor::new(numbers, &Device::Cpu).unwrap();
        let tokens = |x: &Tensor| -> Vec<Option<u32>> {
            Greedy::default().choose(x).unwrap().into_iter().map(Result::ok).collect()
        };
        assert_eq!(tokens(&x.to_device(&device).unwrap()), tokens(&x), "{rows} x {vocab}");
    }
}

#[test]
fn products_are_as_on_the_cpu() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    for (out, inner) in [(1, 8), (1003, 1096), (9001, 512), (300, 4104), (64, 13)] {
        for rows in [1, 3, 4, 5, 9, 32, 33] {
            for (dtype, bound) in [(DType::F16, 1e-3), (DType::BF16, 6e-3), (DType::F32, 1e-4)] {
                let x = random(rows, 1, inner, dtype).squeeze(1).unwrap();
                let w = random(out, 1, inner, dtype).squeeze(1).unwrap();
                let f32 = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
                let want = linear(&f32(&x), &f32(&w)).unwrap();
                let there = |x: &Tensor| x.to_device(&device).unwrap();
                let got = linear(&there(&x), &there(&w)).unwrap();
                let error = relative(&got, &want);
                assert!(error < bound, "{rows} rows, {out} x {inner}, {dtype:?}: {error}");
            }
        }
    }
}

/// On devices without the kernels, both sides are the same launches.
#[test]
fn the_part_between_attentions_equals_separate_calls() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    // Sizes of attention, the residual stream, the feed-forward block and the next projection.
    let cases =
        [(64, 72, 200, 33), (1024, 2048, 5120, 1536), (576, 576, 1536, 960), (8, 8, 9000, 8)];
    for ((attention, hidden, inner, next), dtype) in
        cases.into_iter().flat_map(|sizes| [DType::F16, DType::BF16].map(|dtype| (sizes, dtype)))
    {
        let make = |rows: usize, columns: usize, scale: f64| -> Tensor {
            let x = random(rows, 1, columns, DType::F32).reshape((rows, columns)).unwrap();
            (x * scale).unwrap().to_dtype(dtype).unwrap().to_device(&device).unwrap()
        };
        let weight = |out: usize, inner: usize| make(out, inner, 1.0 / (inner as f64).sqrt());
        let norm = || make(1, hidden, 1.0).flatten_all().unwrap();
        let (output, gate_up, down) =
            (weight(hidden, attention), weight(2 * inner, hidden), weight(hidden, inner));
        let (norm, next_norm, next) = (norm(), norm(), weight(next, hidden));
        let weights = PostAttention::new(PostAttentionWeights {
            output: output.clone(),
            norm: norm.clone(),
            gate_up: gate_up.clone(),
            down: down.clone(),
            next_norm: next_norm.clone(),
            next: next.clone(),
            eps: 1e-5,
        })
        .unwrap();
        for tokens in [1, 2, 8, 9, 31, 33] {
            let (x, residual) = (make(tokens, attention, 1.0), make(tokens, hidden, 1.0));
            let (sum, y) = weights.forward(&x, &residual).unwrap();
            let projected = linear(&x, &output).unwrap();
            let (middle, normed) = add_rms_norm(&residual, Some(&projected), &norm, 1e-5).unwrap();
            let both = linear(&normed, &gate_up).unwrap();
            let gate = both.narrow(1, 0, inner).unwrap();
            let gated = silu_mul(&gate, &both.narrow(1, inner, inner).unwrap()).unwrap();
            let block = linear(&gated, &down).unwrap();
            let (want, normed) = add_rms_norm(&middle, Some(&block), &next_norm, 1e-5).unwrap();
            let what = format!("{tokens} tokens of {hidden}, {dtype:?}");
            let projection = linear(&normed, &next).unwrap();
            for (part, got, want) in [("residual", &sum, &want), ("projection", &y, &projection)] {
                // One or two tokens may take one launch, which adds products in another order.
                let bound = if tokens <= 2 { 1e-2 } else { 0.0 };
                let error = relative(got, want);
                assert!(error <= bound, "{what}, {part}: {error}");
            }
        }
    }
}

#[test]
fn hopper_has_the_kernels_between_attentions() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let stream = device.as_cuda_device().unwrap().cuda_stream();
    let context = stream.context();
    let args = PostAttentionArgs {
        attention_size: 4096,
        hidden: 4096,
        inner: 14_336,
        next_size: 6144,
        ..Default::default()
    };
    let has = |rows| has_post_attention(context, &PostAttentionArgs { rows, ..args }).unwrap();
    let expected = compute_capability(context).unwrap() == (9, 0);
    assert_eq!([0, 1, 32, 33].map(has), [false, expected, expected, false]);
    let odd = PostAttentionArgs { hidden: 4100, rows: 2, ..args };
    assert!(!has_post_attention(context, &odd).unwrap());
}

/// After a failed step the caches have counted tokens whose entries may be missing.
#[test]
fn a_prepared_step_that_fails_is_incomplete() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let rope = Arc::new(Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap());
    let cache = DenseCache::new(LayerSpec::new(shape).with_rope(rope), DType::F16).unwrap();
    let mut caches: Vec<Box<dyn KvCache>> = vec![Box::new(cache)];
    let x = |tokens, heads| random(tokens, heads, 64, DType::F16).to_device(&device).unwrap();
    let attend = |caches: &mut [Box<dyn KvCache>], batch: &Batch| {
        let (q, k, v) = (x(batch.tokens(), 4), x(batch.tokens(), 2), x(batch.tokens(), 2));
        caches[0].attend(&Step { batch, q: &q, k: &k, v: &v })
    };
    attend(&mut caches, &Batch::single(0, 5).unwrap()).unwrap();
    let batch = Batch::decode(&[0]).unwrap();
    let mut graphs = DecodeGraphs::new(&device, 8).unwrap();
    let mut attends =
        |caches: &mut [Box<dyn KvCache>], batch: &Batch, _: &Tensor| attend(caches, batch);
    let done = graphs.step(&batch, &[7], &mut caches, &[], &mut attends, |_| ());
    assert!(done.is_ok() && !graphs.take_incomplete());
    let fails = &mut |_: &mut [Box<dyn KvCache>], _: &Batch, _: &Tensor| {
        Err(Error::Unsupported("a test".into()))
    };
    assert!(graphs.step(&batch, &[7], &mut caches, &[], fails, |_| ()).is_err());
    // The caller has to know of it before the next step.
    let refused = graphs.step(&batch, &[7], &mut caches, &[], &mut attends, |_| ()).unwrap_err();
    assert!(refused.to_string().starts_with("last decode step"), "{refused}");
    assert!(graphs.take_incomplete() && !graphs.take_incomplete());
    caches[0].truncate(0, 6).unwrap();
    assert!(graphs.step(&batch, &[7], &mut caches, &[], &mut attends, |_| ()).is_ok());
}

/// A prepared step has one token of each sequence.
#[test]
fn steps_of_several_tokens_are_not_prepared() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let spec = LayerSpec::new(AttentionShape::new(4, 2, 64).unwrap());
    let cache = DenseCache::new(spec, DType::F16).unwrap();
    let mut caches: Vec<Box<dyn KvCache>> = vec![Box::new(cache)];
    let mut graphs = DecodeGraphs::new(&device, 8).unwrap();
    let mut attends = |caches: &mut [Box<dyn KvCache>], batch: &Batch, _: &Tensor| {
        assert!(batch.prepared().is_none());
        let x = |heads| random(batch.tokens(), heads, 64, DType::F16).to_device(&device).unwrap();
        caches[0].attend(&Step { batch, q: &x(4), k: &x(2), v: &x(2) })
    };
    let batch = Batch::single(0, 5).unwrap();
    for _ in 0..3 {
        graphs.step(&batch, &[7; 5], &mut caches, &[], &mut attends, |_| ()).unwrap();
    }
    let error = graphs.step(&batch, &[7], &mut caches, &[], &mut attends, |_| ()).unwrap_err();
    assert!(error.to_string().starts_with("token ids of a decode step: expected 5, got 1"));
    assert!(caches[0].held(0) == 15 && !graphs.take_incomplete());
    assert!(caches[0].prepared_decode(&batch).is_none());
    assert!(caches[0].prepared_decode(&Batch::decode(&[0]).unwrap()).is_some());
}

/// Copies of shared blocks would take the room that the token needs.
#[test]
fn a_prepared_step_postpones_an_eviction_without_room() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    // Blocks of 64 entries of one head: keys and values in f16.
    const BLOCK: usize = 64 * (64 + 64) * 2;
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let shape = AttentionShape { window: Some(192), ..shape };
    let spec = LayerSpec::new(shape);
    let mut cache = DenseCache::with_capacity(spec, DType::F16, 22 * BLOCK).unwrap();
    let attend = |cache: &mut DenseCache, seq, tokens| {
        let x = |heads| random(tokens, heads, 64, DType::F16).to_device(&device).unwrap();
        let batch = Batch::single(seq, tokens).unwrap();
        cache.attend(&Step { batch: &batch, q: &x(4), k: &x(2), v: &x(2) }).unwrap();
    };
    attend(&mut cache, 9, 192);
    attend(&mut cache, 0, 448);
    cache.fork(0, 1).unwrap();
    attend(&mut cache, 0, 64);
    cache.fork(0, 2).unwrap();
    // There are now six free blocks, as many as the copies of the window's blocks.
    assert!(cache.remove(9));
    let (batch, mut lists) = (Batch::decode(&[0]).unwrap(), StepLists::default());
    assert!(cache.held(0) == 512 && cache.can_append(&batch));
    cache.prepared_decode(&batch).unwrap().prepare_decode(&batch, &mut lists).unwrap();
    assert_eq!((cache.seen(0), cache.held(0)), (513, 513));
}

#[test]
fn rotary_embeddings_equal_the_cpus() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let tokens = 40;
    let positions: Vec<i64> = (0..tokens as i64).map(|i| i * i * 700 - 50_000).collect();
    for (d, rotary) in [(64, 64), (128, 128), (80, 32), (256, 256), (96, 24)] {
        let rope = Rope::new(d, rotary, 500_000.0, RopeScaling::None).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            // A view into one projection of queries and keys, and the same positions twice.
            let both = random(tokens, 7, d, dtype);
            let parts = [(0, 5), (5, 2)].map(|(first, heads)| {
                both.to_device(&device).unwrap().narrow(1, first, heads).unwrap()
            });
            let rotated = rope.apply_both(&parts[0], &parts[1], &positions).unwrap();
            for (first, heads, on_device, together) in
                [(0, 5, &parts[0], &rotated.0), (5, 2, &parts[1], &rotated.1)]
            {
                let x = both.narrow(1, first, heads).unwrap();
                let got = rope.apply(on_device, &positions).unwrap();
                assert_eq!(relative(together, &got), 0.0);
                let want = rope.apply(&x.to_dtype(DType::F32).unwrap(), &positions).unwrap();
                let error = relative(&got, &want);
                let bound = if dtype == DType::BF16 { 3e-3 } else { 5e-4 };
                let kernel = dtype != DType::F32 && rotary % 16 == 0;
                // Without a kernel, sine and cosine are rounded first.
                let bound = if kernel { bound } else { 3.0 * bound };
                assert!(error < bound, "{dtype:?}, {rotary} of {d}, {heads} heads: {error}");
            }
        }
    }
}

/// The kernels on cudarc's own memory. A captured graph is replayed with other lengths than at
/// capture.
#[test]
fn pages_attend_as_on_the_cpu() {
    let Ok(context) = CudaContext::new(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let (heads, kv_heads, d) = (4, 2, 128);
    let shape = AttentionShape::new(heads, kv_heads, d).unwrap();
    let (queries, entries) = ([40usize, 7], [200usize, 70]);
    let tokens = queries.iter().sum::<usize>();
    let stream = context.new_stream().unwrap();
    let rows = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f16>().unwrap();
    let f16s = |n, heads| random(n, heads, d, DType::F16);

    // The pages of both sequences and heads in reverse order; the rest of the last pages is NaN.
    let (q, kv) = (f16s(tokens, heads), entries.map(|n| (f16s(n, kv_heads), f16s(n, kv_heads))));
    let blocks = entries.map(|n| n.div_ceil(PAGE));
    let (most, total) = (blocks[0], kv_heads * (blocks[0] + blocks[1]));
    let mut pools = [(); 2].map(|()| vec![f16::NAN; total * PAGE * d]);
    let mut table = vec![0u32; 2 * kv_heads * most];
    let mut next = total;
    let mut held = Vec::new();
    for (s, (k, v)) in kv.iter().enumerate() {
        for head in 0..kv_heads {
            let of = |x: &Tensor| rows(&x.narrow(1, head, 1).unwrap());
            let (k, v) = (of(k), of(v));
            for (block, (k, v)) in k.chunks(PAGE * d).zip(v.chunks(PAGE * d)).enumerate() {
                next -= 1;
                table[(s * kv_heads + head) * most + block] = next as u32;
                pools[0][next * PAGE * d..][..k.len()].copy_from_slice(k);
                pools[1][next * PAGE * d..][..v.len()].copy_from_slice(v);
            }
            held.push((k, v));
        }
    }
    let batch = Batch::new(&[(0, queries[0]), (1, queries[1])]).unwrap();
    let pages: Vec<_> =
        held.iter().map(|(keys, values)| vec![attention::Page { keys, values }]).collect();
    let want = attention::attend_pages(&batch, &q, &pages, &shape, Mask::Causal).unwrap();

    let half = |x: &[f16]| stream.clone_htod(x).unwrap();
    let (dq, dk, dv) = (half(&rows(&q)), half(&pools[0]), half(&pools[1]));
    let table = stream.clone_htod(&table).unwrap();
    let [mut ends, mut lens] = [3, 4].map(|n| stream.alloc_zeros::<u32>(n).unwrap());
    let out = stream.clone_htod(&vec![f32::NAN; tokens * heads * d]).unwrap();
    let lse = stream.clone_htod(&vec![f32::NAN; tokens * heads]).unwrap();
    let args = PrefillArgs {
        q: dq.device_ptr(&stream).0,
        k: dk.device_ptr(&stream).0,
        v: dv.device_ptr(&stream).0,
        out: out.device_ptr(&stream).0,
        lse: lse.device_ptr(&stream).0,
        cu_seqlens_q: ends.device_ptr(&stream).0,
        seqlens_k: lens.device_ptr(&stream).0,
        block_table: table.device_ptr(&stream).0,
        q_token: (heads * d) as i64,
        q_head: d as i64,
        k_token: d as i64,
        k_head: (PAGE * d) as i64,
        v_token: d as i64,
        v_head: (PAGE * d) as i64,
        table_seq: (kv_heads * most) as i64,
        table_head: most as i64,
        lens_seq: kv_heads as i64,
        lens_head: 1,
        seqs: 2,
        tokens: tokens as i32,
        kv_extent: total as i32,
        heads: heads as i32,
        kv_heads: kv_heads as i32,
        causal: 1,
        scale: shape.scale,
        out_f32: 1,
        ..PrefillArgs::default()
    };
    // SAFETY: the arrays above have the sizes that `args` gives and live to the end of the test.
    let launch = || unsafe { prefill(&stream, Half::F16, d, &args) }.unwrap();
    launch(); // Loads the kernels; all lengths are 0.
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    launch();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).unwrap().unwrap();
    let lens_of = entries.map(|n| [n as u32; 2]).concat();
    stream.memcpy_htod(&[0, queries[0] as u32, tokens as u32], &mut ends).unwrap();
    stream.memcpy_htod(&lens_of, &mut lens).unwrap();
    graph.launch().unwrap();
    let tensor = |x, dims: &[usize]| {
        Tensor::from_vec(stream.clone_dtoh(x).unwrap(), dims, &Device::Cpu).unwrap()
    };
    assert!(relative(&tensor(&out, &[tokens, heads, d]), &want.out) < 1e-3);
    assert!(relative(&tensor(&lse, &[tokens, heads]), &want.lse) < 1e-4);

    let unfit = PrefillArgs { q_token: 4, ..args };
    // SAFETY: the call is refused before anything is launched.
    let error = unsafe { prefill(&stream, Half::F16, d, &unfit) }.unwrap_err().to_string();
    assert!(error.contains("strides of q"), "{error}");
    // SAFETY: as above.
    let error = unsafe { prefill(&stream, Half::F16, 72, &args) }.unwrap_err().to_string();
    assert!(error.contains("72"), "{error}");
}
