//! Attention and dense caches on a CUDA device against the CPU. Needs a CUDA device.
#![cfg(feature = "cuda")]

use std::sync::Arc;

use candle_core::cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda::cudarc::driver::{CudaContext, DevicePtr};
use candle_core::{DType, Device, Tensor};
use half::f16;
use longctx_core::cuda::{Half, PAGE, PrefillArgs, prefill};
use longctx_core::{
    AttentionShape, AttentionSums, Batch, DenseCache, DenseStore, EntryRanges, Error, KvCache,
    KvStore, LayerSpec, Mask, Rope, RopeScaling, Selection, SeqId, Step, add_rms_norm, attention,
    gather_entries, linear, silu_mul, top_entries,
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

fn relative(got: &Tensor, want: &Tensor) -> f32 {
    let f32 = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let (got, want) = (f32(got), f32(want));
    let norm = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    norm((&got - &want).unwrap()) / norm(want)
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
fn products_are_as_on_the_cpu() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    for (out, inner) in [(1, 8), (1003, 1096), (9001, 512), (64, 13)] {
        for rows in [1, 2, 3, 4, 5, 40] {
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
            for (first, heads) in [(0, 5), (5, 2)] {
                let x = both.narrow(1, first, heads).unwrap();
                let on_device = both.to_device(&device).unwrap().narrow(1, first, heads).unwrap();
                let got = rope.apply(&on_device, &positions).unwrap();
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

/// Returns a generator of numbers below its argument, the same in every run.
fn draws() -> impl FnMut(usize) -> usize {
    let mut state = 7u64;
    move |n: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    }
}

/// Returns some of `len` entries in runs, at least one.
fn some_of(len: usize, draw: &mut dyn FnMut(usize) -> usize) -> Vec<u32> {
    let longest = [2, 30, 200][draw(3)];
    let (mut list, mut from) = (Vec::new(), draw(3).min(len - 1) as u32);
    while (from as usize) < len {
        let end = (from + 1 + draw(longest) as u32).min(len as u32);
        list.extend(from..end);
        from = end + draw(longest) as u32;
    }
    list
}

/// Two stores of one layer.
struct Pair {
    shape: AttentionShape,
    dtype: DType,
    host: DenseStore,
    other: DenseStore,
    device: Device,
}

impl Pair {
    fn append(&mut self, parts: &[(SeqId, usize)], tokens: Option<&[Selection]>) {
        let batch = Batch::new(parts).unwrap();
        let (kv_heads, d) = (self.shape.kv_heads, self.shape.head_dim);
        let [k, v] = [0; 2].map(|_| random(batch.tokens(), kv_heads, d, self.dtype));
        let [dk, dv] = [&k, &v].map(|x| x.to_device(&self.device).unwrap());
        match tokens {
            None => {
                self.host.append(&batch, &k, &v).unwrap();
                self.other.append(&batch, &dk, &dv).unwrap();
            }
            Some(tokens) => {
                self.host.append_selected(&batch, &k, &v, tokens).unwrap();
                self.other.append_selected(&batch, &dk, &dv, tokens).unwrap();
            }
        }
    }

    /// Appends `count` tokens of each sequence. `select` returns a selection on the host and on the
    /// device.
    fn append_chosen(
        &mut self,
        parts: &[(SeqId, usize)],
        count: usize,
        mut select: impl FnMut(usize, usize) -> (Selection, Selection),
    ) {
        let chosen = parts.iter().map(|&(_, len)| select(len, count.min(len)));
        let (host, other): (Vec<_>, Vec<_>) = chosen.unzip();
        let batch = Batch::new(parts).unwrap();
        let (kv_heads, d) = (self.shape.kv_heads, self.shape.head_dim);
        let [k, v] = [0; 2].map(|_| random(batch.tokens(), kv_heads, d, self.dtype));
        let [dk, dv] = [&k, &v].map(|x| x.to_device(&self.device).unwrap());
        self.host.append_selected(&batch, &k, &v, &host).unwrap();
        self.other.append_selected(&batch, &dk, &dv, &other).unwrap();
    }

    fn check(&self, parts: &[(SeqId, usize)], mask: Mask<'_>) {
        let batch = Batch::new(parts).unwrap();
        let q = random(batch.tokens(), self.shape.heads, self.shape.head_dim, self.dtype);
        let dq = q.to_device(&self.device).unwrap();
        let what = format!("{:?}, {:?}, {parts:?}", self.shape, self.dtype);
        let bound = if self.dtype == DType::BF16 { 6e-3 } else { 2e-3 };
        let want = self.host.attend(&batch, &q, mask).unwrap();
        let got = self.other.attend(&batch, &dq, mask).unwrap();
        assert!(relative(&got.out, &want.out) < bound, "{what}");
        let finite = |lse: &Tensor| lse.clamp(-10f32, f32::MAX).unwrap();
        assert!(relative(&finite(&got.lse), &finite(&want.lse)) < bound, "{what}");
        let sums = self.host.attention_sums(&batch, &q, &want.lse, mask).unwrap();
        let other = self.other.attention_sums(&batch, &dq, &want.lse, mask).unwrap();
        let heads = |sums: &[AttentionSums]| -> Vec<_> {
            sums.iter().flat_map(|sums| sums.split().unwrap()).collect()
        };
        for (sums, other) in heads(&sums).iter().zip(&heads(&other)) {
            assert_eq!(sums.dims(), other.dims(), "{what}");
            assert!(sums.elem_count() == 0 || relative(other, sums) < bound, "{what}");
        }
        for &(seq, _) in parts {
            assert_eq!(self.host.lens(seq), self.other.lens(seq), "{what}");
            let payload = |store: &DenseStore| store.seq_footprint(seq).payload;
            assert_eq!(payload(&self.host), payload(&self.other), "{what}");
        }
    }

    fn check_read(&self, seq: SeqId) {
        for head in 0..self.shape.kv_heads {
            let ((k, v), (dk, dv)) =
                (self.host.read(seq, head).unwrap(), self.other.read(seq, head).unwrap());
            let rows = |x: &Tensor| x.to_vec2::<f32>().unwrap();
            assert_eq!((rows(&k), rows(&v)), (rows(&dk), rows(&dv)));
        }
    }
}

#[test]
fn blocks_hold_and_attend_as_on_the_cpu() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let mut draw = draws();
    for (heads, kv_heads, d, dtype) in [
        (8, 2, 128, DType::F16),
        (4, 4, 64, DType::BF16),
        (12, 2, 80, DType::F16),
        (3, 1, 96, DType::F16),
        (16, 1, 192, DType::BF16),
        (2, 2, 256, DType::F16),
    ] {
        let shape = AttentionShape::new(heads, kv_heads, d).unwrap();
        let shape = AttentionShape { soft_cap: (d == 96).then_some(4.0), ..shape };
        let store = || DenseStore::new(shape, dtype).unwrap();
        let mut pair = Pair { shape, dtype, host: store(), other: store(), device: device.clone() };
        pair.append(&[(0, 700), (1, 33)], None);
        pair.check(&[(0, 70), (1, 3)], Mask::Causal);
        for round in 0..8 {
            for seq in 0..2 {
                let lens = pair.host.lens(seq);
                let keep = lens.iter().map(|&len| some_of(len, &mut draw)).collect();
                let keep = Selection::new(keep);
                pair.host.retain(seq, &keep).unwrap();
                pair.other.retain(seq, &keep).unwrap();
                let own = [40, 300][seq as usize];
                let lists = lens.iter().map(|_| some_of(own, &mut draw)).collect();
                pair.append(&[(seq, own)], Some(&[Selection::new(lists)]));
            }
            if round % 3 == 1 {
                let to = 7 + round;
                pair.host.fork(0, to).unwrap();
                pair.other.fork(0, to).unwrap();
                pair.append(&[(to, 3)], None);
            }
            if round == 4 {
                let least = pair.host.lens(0).into_iter().min().unwrap();
                let len = least - draw(least.min(90));
                pair.host.truncate(0, len).unwrap();
                pair.other.truncate(0, len).unwrap();
            }
            let least = pair.host.lens(0).into_iter().min().unwrap();
            pair.check(&[(0, 1 + draw(least.min(20))), (1, 1)], Mask::Causal);
            pair.check(&[(1, 1), (99, 1), (0, 1)], Mask::Full);
            let mut lists = Vec::new();
            for len in [pair.host.lens(0), pair.host.lens(1)].concat() {
                let entries = some_of(len, &mut draw);
                let runs = entries.chunk_by(|a, b| a + 1 == *b);
                let run = |run: &[u32]| run[0] as usize..run[run.len() - 1] as usize + 1;
                lists.push(runs.map(run).collect());
            }
            let ranges = EntryRanges::new(lists).unwrap();
            pair.check(&[(0, 1), (1, 1)], Mask::Entries(&ranges));
            pair.check(&[(0, 9), (1, 20)], Mask::Entries(&ranges));
            pair.append(&[(0, 1), (1, 50)], None);
        }
        pair.host.seqs().into_iter().for_each(|seq| pair.check_read(seq));
        for seq in pair.host.seqs() {
            assert!(pair.host.remove(seq) && pair.other.remove(seq));
        }
        assert_eq!(pair.other.footprint().payload, 0);
    }
}

#[test]
fn a_full_pool_of_blocks_changes_nothing() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let mut store = DenseStore::with_capacity(shape, DType::F16, 1 << 20).unwrap();
    let x = |batch: &Batch| random(batch.tokens(), 2, 64, DType::F16).to_device(&device).unwrap();
    let (small, large) = (Batch::single(0, 500).unwrap(), Batch::single(1, 5000).unwrap());
    store.append(&small, &x(&small), &x(&small)).unwrap();
    let before = store.footprint();
    assert!(store.can_append(&small) && !store.can_append(&large));
    let error = store.append(&large, &x(&large), &x(&large)).unwrap_err();
    assert!(matches!(error, Error::PoolFull { .. }), "{error}");
    assert_eq!((store.footprint(), store.seqs()), (before, vec![0]));
}

/// The entries that stay, by sorting: protected ones first, then by score, then by age.
fn best(scores: &[f32], count: usize, sinks: usize, recent: usize) -> Vec<u32> {
    let protected = |i: u32| (i as usize) < sinks || i as usize >= scores.len() - recent;
    let score = |i: u32| match scores[i as usize] {
        x if x.is_nan() => f32::NEG_INFINITY,
        x => x,
    };
    let mut all: Vec<u32> = (0..scores.len() as u32).collect();
    all.sort_by(|&a, &b| {
        let by_score = score(b).total_cmp(&score(a)).then(a.cmp(&b));
        protected(b).cmp(&protected(a)).then(by_score)
    });
    all.truncate(count);
    all.sort_unstable();
    all
}

#[test]
fn the_entries_of_the_highest_scores_are_those_of_a_sorted_list() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let mut draw = draws();
    let some = [0.0, -0.0, 1.5, -1.5, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, -3e8];
    for len in [1usize, 2, 31, 500, 1024, 1025, 8192, 70_001] {
        for round in 0..6 {
            let mut score = |_| match round % 3 {
                0 => some[draw(some.len())],
                1 => draw(1 << 20) as f32 / 1e6,
                _ => (draw(7) as f32).exp(),
            };
            let heads: Vec<Vec<f32>> = (0..3).map(|_| (0..len).map(&mut score).collect()).collect();
            let count = if round == 5 { len } else { 1 + draw(len) };
            let sinks = draw(4).min(count);
            let recent = draw(40).min(count - sinks);
            let scores = Tensor::new(heads.clone(), &device).unwrap();
            let keep = top_entries(&scores, count, sinks, recent).unwrap().unwrap();
            let want: Vec<_> =
                heads.iter().map(|scores| best(scores, count, sinks, recent)).collect();
            assert!(keep.heads().unwrap() == want, "{len} entries, {count}, {sinks}, {recent}");
            // Entries from the middle on have no value: they follow from 1,000.
            let held = len / 2;
            if held == 0 {
                continue;
            }
            let values: Vec<u32> =
                (0..3 * held as u32).map(|i| i.wrapping_mul(2654435761)).collect();
            let on_device = Tensor::from_vec(values.clone(), (3, held), &device).unwrap();
            let got = gather_entries(&on_device, &keep, 1000).unwrap().unwrap();
            for (head, got) in got.to_vec2::<u32>().unwrap().into_iter().enumerate() {
                let value = |&entry: &u32| match (entry as usize).checked_sub(held) {
                    Some(after) => 1000 + after as u32,
                    None => values[head * held + entry as usize],
                };
                assert_eq!(got, want[head].iter().map(value).collect::<Vec<_>>());
            }
        }
    }
}

/// Selections on the device have the same effect as equal selections on the host.
#[test]
fn selections_on_the_device_are_those_of_the_host() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let mut draw = draws();
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let store = || DenseStore::new(shape, DType::F16).unwrap();
    let mut pair =
        Pair { shape, dtype: DType::F16, host: store(), other: store(), device: device.clone() };
    let mut select = |len: usize, count: usize| {
        let mut list = |_| {
            let mut left: Vec<u32> = (0..len as u32).collect();
            while left.len() > count {
                left.remove(draw(left.len()));
            }
            left
        };
        let lists: Vec<Vec<u32>> = (0..2).map(&mut list).collect();
        let on_device = Selection::on_device(&Tensor::new(lists.clone(), &device).unwrap());
        (Selection::new(lists), on_device.unwrap())
    };
    pair.append_chosen(&[(0, 300), (1, 90)], 130, &mut select);
    for round in 0..8 {
        if round == 3 {
            pair.host.fork(0, 7).unwrap();
            pair.other.fork(0, 7).unwrap();
        }
        pair.append_chosen(&[(1, 40), (0, 70)], 30, &mut select);
        for seq in 0..2 {
            let len = pair.host.len(seq);
            let count = if round % 2 == 0 { len - 1 } else { len / 2 + 1 };
            let (host, other) = select(len, count);
            pair.host.retain(seq, &host).unwrap();
            pair.other.retain(seq, &other).unwrap();
        }
        pair.check(&[(0, 1), (1, 2)], Mask::Causal);
    }
    for seq in [0, 1, 7] {
        let seqs: &[SeqId] = if seq == 7 { &[7] } else { &[0, 1] };
        assert!(seqs.iter().all(|&seq| pair.host.lens(seq) == pair.other.lens(seq)));
        for head in 0..2 {
            let (k, v) = pair.host.read(seq, head).unwrap();
            let (dk, dv) = pair.other.read(seq, head).unwrap();
            assert_eq!((relative(&dk, &k), relative(&dv, &v)), (0.0, 0.0));
        }
    }
    // Indices past a head's end are not read.
    let wild = Tensor::new(vec![vec![0u32, u32::MAX]; 2], &device).unwrap();
    pair.other.retain(0, &Selection::on_device(&wild).unwrap()).unwrap();
    assert_eq!(pair.other.lens(0), [2, 2]);
    assert!(pair.other.read(0, 0).is_ok());
}
