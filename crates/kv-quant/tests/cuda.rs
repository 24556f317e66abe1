//! Stores and caches on a CUDA device against those on the CPU, on the same numbers. Skipped if
//! there is no device.
#![cfg(all(feature = "candle", feature = "cuda"))]

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kv_quant::{
    Bits, Codes, Float8, Flush, Format, KeyBasis, Order, QuantCache, QuantStore, Rotary,
    StaticScale, TurboQuant,
};
use longctx_core::{
    AttentionShape, AttentionSums, Batch, EntryRanges, Error, KvCache, KvStore, LayerSpec, Mask,
    Rope, RopeScaling, Selection, SeqId, Step,
};

fn device() -> Option<Device> {
    let device = Device::new_cuda(0).ok();
    if device.is_none() {
        println!("skipped: no CUDA device");
    }
    device
}

thread_local! {
    /// Each test runs in a thread of its own, so its numbers are the same in every run.
    static RANDOM: RefCell<Box<dyn FnMut(usize) -> usize>> = RefCell::new(Box::new(random()));
}

/// Returns numbers that f16 represents, so that both sides start with the same: sums of 12 uniform
/// numbers, which are nearly normal.
fn numbers(tokens: usize, heads: usize, d: usize) -> Tensor {
    let x: Vec<f32> = RANDOM.with_borrow_mut(|random| {
        let mut normal = || (0..12).map(|_| random(1 << 16) as f32 / 65536.0).sum::<f32>() - 6.0;
        (0..tokens * heads * d).map(|_| normal()).collect()
    });
    let x = Tensor::from_vec(x, (tokens, heads, d), &Device::Cpu).unwrap();
    x.to_dtype(DType::F16).unwrap()
}

fn relative(got: &Tensor, want: &Tensor) -> f32 {
    let f32 = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let (got, want) = (f32(got), f32(want));
    let norm = |x: Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    norm((&got - &want).unwrap()) / norm(want).max(1e-6)
}

/// Returns the number of rows that differ by more than rounding.
fn unequal_rows(got: &Tensor, want: &Tensor) -> usize {
    let rows = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().to_vec2::<f32>().unwrap();
    let unequal = |(got, want): &(Vec<f32>, Vec<f32>)| {
        let largest = want.iter().fold(0f32, |top, x| top.max(x.abs()));
        got.iter().zip(want).any(|(got, want)| (got - want).abs() > 5e-3 * largest)
    };
    rows(got).into_iter().zip(rows(want)).filter(unequal).count()
}

/// Two stores of one layer.
struct Pair {
    shape: AttentionShape,
    host: QuantStore,
    other: QuantStore,
    device: Device,
    what: String,
    /// Bound of relative errors.
    limit: f32,
    /// The share of rows that may have other codes, and the factor of the limit if some do.
    ties: Option<(f32, f32)>,
}

impl Pair {
    fn new(shape: AttentionShape, format: Format, device: &Device) -> Self {
        let store = || QuantStore::new(shape, format).unwrap();
        let what = format!("{format:?}, head_dim {}", shape.head_dim);
        let (limit, ties) = match format.keys().codes {
            // A number at the midpoint of two levels may be rounded to either. A level apart, a
            // 3-bit key of a few entries changes its probability by a fifth.
            Codes::LloydMax { .. } => (2e-3, Some((1e-3, 50.0))),
            // Ties between codes of a tile depend on the last digits of its deviations. If two
            // iterations are as good, the sides may choose another one, with other factors for all
            // rows of the tile.
            Codes::VarianceNormalized { .. } => (1e-2, Some((0.125, 3.0))),
            _ => (2e-3, None),
        };
        let (host, other, device) = (store(), store(), device.clone());
        Self { shape, host, other, device, what, limit, ties }
    }

    fn append(&mut self, parts: &[(SeqId, usize)]) {
        let batch = Batch::new(parts).unwrap();
        let [k, v] =
            [0; 2].map(|_| numbers(batch.tokens(), self.shape.kv_heads, self.shape.head_dim));
        let [dk, dv] = [&k, &v].map(|x| x.to_device(&self.device).unwrap());
        self.host.append(&batch, &k, &v).unwrap();
        self.other.append(&batch, &dk, &dv).unwrap();
    }

    fn check(&self, parts: &[(SeqId, usize)], mask: Mask<'_>) {
        let batch = Batch::new(parts).unwrap();
        let q = numbers(batch.tokens(), self.shape.heads, self.shape.head_dim);
        let dq = q.to_device(&self.device).unwrap();
        let what = format!("{parts:?}, {mask:?}");
        for &(seq, _) in parts {
            assert_eq!(self.other.lens(seq), self.host.lens(seq), "{what}");
        }
        let want = self.host.attend(&batch, &q, mask).unwrap();
        let got = self.other.attend(&batch, &dq, mask).unwrap();
        let error = relative(&got.out, &want.out);
        self.check_error(parts, &what, error, self.limit);
        // A sequence without entries has -inf.
        let finite = |lse: &Tensor| lse.clamp(-10f32, f32::MAX).unwrap();
        let error = relative(&finite(&got.lse), &finite(&want.lse));
        self.check_error(parts, &format!("lse, {what}"), error, self.limit);
        let sums = self.host.attention_sums(&batch, &q, &want.lse, mask).unwrap();
        let other = self.other.attention_sums(&batch, &dq, &got.lse, mask).unwrap();
        let heads = |sums: &[AttentionSums]| -> Vec<_> {
            sums.iter().flat_map(|sums| sums.split().unwrap()).collect()
        };
        for (sums, other) in heads(&sums).iter().zip(&heads(&other)) {
            assert_eq!(sums.dims(), other.dims(), "{what}");
            let error = if sums.elem_count() == 0 { 0.0 } else { relative(other, sums) };
            self.check_error(parts, &format!("sums, {what}"), error, 1.5 * self.limit);
        }
    }

    /// Checks an error against its limit. It may be larger if some rows have other codes, because
    /// both sides sum a row's squares in their own order.
    fn check_error(&self, parts: &[(SeqId, usize)], what: &str, error: f32, limit: f32) {
        if error <= limit {
            return;
        }
        let (mut unequal, mut all) = (0, 0);
        for &(seq, _) in parts {
            for head in 0..self.shape.kv_heads {
                let (k, v) = self.host.read(seq, head).unwrap();
                let (dk, dv) = self.other.read(seq, head).unwrap();
                unequal += unequal_rows(&dk, &k) + unequal_rows(&dv, &v);
                all += 2 * k.dims()[0];
            }
        }
        let what = format!("{}, {what}: error {error}, {unequal} of {all} rows differ", self.what);
        println!("{what}");
        let (share, factor) = self.ties.unwrap_or((0.0, 1.0));
        let tied = (1..=1 + (share * all as f32) as usize).contains(&unequal);
        assert!(tied && error <= factor * limit, "{what}");
    }

    /// Compares attention over some ranges of each head's entries.
    fn check_selection(&self, parts: &[(SeqId, usize)], random: &mut dyn FnMut(usize) -> usize) {
        let mut lists = Vec::new();
        for (seq, _) in parts {
            for len in self.host.lens(*seq) {
                let (mut list, mut from) = (Vec::new(), random(40));
                while from < len {
                    let end = (from + 1 + random(70)).min(len);
                    list.push(from..end);
                    from = end + random(150);
                }
                lists.push(list);
            }
        }
        let ranges = EntryRanges::new(lists).unwrap();
        self.check(parts, Mask::Entries(&ranges));
    }

    fn retain(&mut self, seq: SeqId, keep: &Selection) {
        self.host.retain(seq, keep).unwrap();
        self.other.retain(seq, keep).unwrap();
    }

    fn append_selected(&mut self, parts: &[(SeqId, usize)], tokens: &[Selection]) {
        let batch = Batch::new(parts).unwrap();
        let [k, v] =
            [0; 2].map(|_| numbers(batch.tokens(), self.shape.kv_heads, self.shape.head_dim));
        let [dk, dv] = [&k, &v].map(|x| x.to_device(&self.device).unwrap());
        self.host.append_selected(&batch, &k, &v, tokens).unwrap();
        self.other.append_selected(&batch, &dk, &dv, tokens).unwrap();
    }

    /// Compares the entries of a sequence.
    fn check_read(&self, seq: SeqId) {
        for head in 0..self.shape.kv_heads {
            let (k, v) = self.host.read(seq, head).unwrap();
            let (dk, dv) = self.other.read(seq, head).unwrap();
            assert_eq!(k.dims(), dk.dims());
            let error = relative(&dk, &k).max(relative(&dv, &v));
            self.check_error(&[(seq, 1)], "read", error, self.limit);
        }
    }
}

fn formats() -> Vec<Format> {
    let mut formats = Vec::new();
    for (keys, values) in [
        (Bits::Two, Bits::Two),
        (Bits::Three, Bits::Three),
        (Bits::Four, Bits::Four),
        (Bits::Eight, Bits::Eight),
        (Bits::Four, Bits::Two),
        (Bits::Two, Bits::Four),
    ] {
        for (group, residual) in [(32, 128), (64, 64), (128, 128)] {
            formats.push(Format::kivi(keys, values, group, residual).unwrap());
        }
        formats.push(Format::kivi_rolling(keys, values, 32, 64).unwrap());
        formats.push(Format::kivi_rolling(keys, values, 64, 0).unwrap());
    }
    formats.extend(immediate().into_iter().map(rolling));
    for (keys, values) in [
        (Bits::Four, Bits::Four),
        (Bits::Four, Bits::Two),
        (Bits::Three, Bits::Three),
        (Bits::Two, Bits::Two),
    ] {
        for tile in [64, 128] {
            formats.push(Format::kvarn(keys, values, tile).unwrap());
        }
    }
    formats
}

/// Returns formats that keep nothing in full precision.
fn immediate() -> Vec<Format> {
    let scale = |scale: f32| StaticScale::new(scale).unwrap();
    let mut formats = Vec::new();
    for kind in [Float8::E4m3, Float8::E5m2] {
        formats.push(Format::float8(kind));
        formats.push(Format::float8_static(kind, scale(0.0173), scale(0.0117)));
    }
    for bits in [Bits::Four, Bits::Three] {
        formats.push(Format::rotated_symmetric(bits, bits));
        formats.push(Format::rotated_asymmetric(bits, bits));
    }
    for preset in
        [TurboQuant::K8V4, TurboQuant::FourBitNc, TurboQuant::K3V4Nc, TurboQuant::ThreeBitNc]
    {
        formats.push(Format::turboquant(preset));
    }
    formats
}

/// Returns whether a block that a truncation divides gives the same codes on both sides. A tile of
/// KVarN is unpacked and quantized again: its codes depend on every digit of its numbers.
fn cuts_blocks_alike(format: Format) -> bool {
    !matches!(format.keys().codes, Codes::VarianceNormalized { .. })
}

/// Returns the same format with whole blocks of tokens.
fn rolling(format: Format) -> Format {
    Format::new(format.keys(), format.values(), Flush::Rolling(0)).unwrap()
}

#[test]
fn what_is_packed_at_once_waits_for_whole_blocks() {
    let Some(device) = device() else { return };
    let shape = AttentionShape::new(8, 2, 128).unwrap();
    for format in immediate() {
        let mut pair = Pair::new(shape, rolling(format), &device);
        pair.other = QuantStore::new(shape, format).unwrap();
        pair.append(&[(0, 1), (1, 333)]);
        for _ in 0..3 {
            pair.check(&[(0, 1), (1, 1)], Mask::Causal);
            pair.append(&[(0, 40), (1, 1)]);
        }
        assert_eq!(pair.other.format(), format);
        pair.check_read(1);
        let (used, packed) = (pair.other.seq_footprint(1).payload, 320 * 2 * 2 * 128);
        let bits = format.keys().bits.count() + format.values().bits.count();
        assert_eq!(used, packed * bits / 16, "{}", pair.what);
    }
}

#[test]
fn unequal_sequences_attend_as_on_the_cpu() {
    let Some(device) = device() else { return };
    for (heads, kv_heads, d) in [(4, 4, 64), (8, 2, 128), (8, 1, 256)] {
        let shape = AttentionShape::new(heads, kv_heads, d).unwrap();
        for format in formats() {
            let mut pair = Pair::new(shape, format, &device);
            pair.append(&[(0, 1), (1, 300), (2, 31), (3, 1500)]);
            for step in 0..6 {
                pair.check(&[(0, 1), (1, 1), (2, 1), (3, 1)], Mask::Causal);
                pair.append(&[(3, 1), (0, 1 + 33 * (step % 2)), (1, 127), (2, 1)]);
            }
            pair.check(&[(3, 1), (0, 1), (1, 17), (2, 3)], Mask::Causal);
            pair.check(&[(1, 1), (9, 1), (3, 2)], Mask::Full);
            // Many queries attend to unpacked entries.
            pair.check(&[(3, 40), (0, 1), (9, 130), (1, 150)], Mask::Full);
            (0..4).for_each(|seq| pair.check_read(seq));
        }
    }
}

#[test]
fn random_operations_do_the_same_on_both() {
    let Some(device) = device() else { return };
    let mut random = random();
    let shape = AttentionShape::new(8, 2, 64).unwrap();
    for format in formats() {
        let mut pair = Pair::new(shape, format, &device);
        let mut next = 0;
        for _ in 0..60 {
            let seqs = pair.host.seqs();
            let some = |random: &mut dyn FnMut(usize) -> usize| {
                (!seqs.is_empty()).then(|| seqs[random(seqs.len())])
            };
            match random(8) {
                0 if seqs.len() < 6 => {
                    pair.append(&[(next, 1 + random(400))]);
                    next += 1;
                }
                1 => {
                    let Some(from) = some(&mut random) else { continue };
                    pair.host.fork(from, next).unwrap();
                    pair.other.fork(from, next).unwrap();
                    next += 1;
                }
                2 => {
                    let Some(seq) = some(&mut random) else { continue };
                    let len = pair.host.len(seq);
                    let alike = cuts_blocks_alike(format);
                    let most = match random(2) {
                        _ if !alike => format.block_tokens().min(40),
                        0 => 40,
                        _ => len + 1,
                    };
                    let len = len - random(most).min(len);
                    pair.host.truncate(seq, len).unwrap();
                    pair.other.truncate(seq, len).unwrap();
                    if !alike {
                        // The next truncation must not go back farther than this one.
                        pair.append(&[(seq, 2 * format.block_tokens())]);
                    }
                }
                3 if seqs.len() > 3 => {
                    let Some(seq) = some(&mut random) else { continue };
                    assert!(pair.host.remove(seq) && pair.other.remove(seq));
                }
                _ => {
                    let parts: Vec<_> =
                        seqs.iter().map(|&seq| (seq, 1 + random(4) * random(30))).collect();
                    if !parts.is_empty() {
                        pair.append(&parts);
                    }
                }
            }
            let held = pair.host.seqs().into_iter().filter(|&seq| pair.host.len(seq) > 2);
            let parts: Vec<_> = held.map(|seq| (seq, 1 + random(2))).collect();
            if !parts.is_empty() {
                pair.check(&parts, Mask::Causal);
            }
        }
        pair.host.seqs().into_iter().for_each(|seq| pair.check_read(seq));
    }
}

/// Returns a generator of numbers below its argument, the same in every run.
fn random() -> impl FnMut(usize) -> usize {
    let mut state = 7u64;
    move |n: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    }
}

/// Returns some of `len` entries, in runs.
fn some_of(len: usize, random: &mut dyn FnMut(usize) -> usize) -> Vec<u32> {
    let (mut list, mut from) = (Vec::new(), random(3) as u32);
    let longest = [2, 30, 200][random(3)];
    while (from as usize) < len {
        let end = (from + 1 + random(longest) as u32).min(len as u32);
        list.extend(from..end);
        from = end + random(longest) as u32;
    }
    list
}

#[test]
fn entries_are_dropped_and_selected_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let mut random = random();
    for (heads, kv_heads, d) in [(8, 2, 128), (3, 3, 64), (4, 1, 256)] {
        let shape = AttentionShape::new(heads, kv_heads, d).unwrap();
        for format in formats() {
            let mut pair = Pair::new(shape, format, &device);
            pair.append(&[(0, 700), (1, 33)]);
            pair.check_selection(&[(1, 1), (0, 2)], &mut random);
            for round in 0..6 {
                for seq in 0..2 {
                    let lens = pair.host.lens(seq);
                    let keep = lens.iter().map(|&len| some_of(len, &mut random)).collect();
                    pair.retain(seq, &Selection::new(keep));
                    let own = [40, 300][seq as usize];
                    let tokens =
                        Selection::new(lens.iter().map(|_| some_of(own, &mut random)).collect());
                    pair.append_selected(&[(seq, own)], &[tokens]);
                }
                if round == 2 {
                    pair.host.fork(0, 7).unwrap();
                    pair.other.fork(0, 7).unwrap();
                }
                if round == 3 && cuts_blocks_alike(format) {
                    let least = pair.host.lens(0).into_iter().min().unwrap();
                    let len = least - random(least.min(90));
                    pair.host.truncate(0, len).unwrap();
                    pair.other.truncate(0, len).unwrap();
                }
                let least = pair.host.lens(0).into_iter().min().unwrap();
                pair.check(&[(0, 1 + random(least.min(20))), (1, 3)], Mask::Causal);
                pair.check(&[(1, 1), (0, 2)], Mask::Full);
                pair.check_selection(&[(0, 1), (1, 2)], &mut random);
                pair.append(&[(0, 1), (1, 50)]);
            }
            [0, 1, 7].into_iter().for_each(|seq| pair.check_read(seq));
        }
    }
}

#[test]
fn whole_groups_are_dropped_and_records_come_back() {
    let Some(device) = device() else { return };
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let format = Format::kivi_rolling(Bits::Four, Bits::Four, 32, 32).unwrap();
    let mut pair = Pair::new(shape, format, &device);
    pair.append(&[(0, 400), (1, 90)]);
    let bytes = |store: &QuantStore| {
        let bytes = store.seq_footprint(0);
        (bytes.payload, bytes.scales)
    };
    assert_eq!(bytes(&pair.other), bytes(&pair.host));
    let keep = |first: u32| (0..400).filter(|i| i / 32 != first && i / 32 != 5).collect();
    let keep = Selection::new(vec![keep(0), keep(3)]);
    pair.host.retain(0, &keep).unwrap();
    pair.other.retain(0, &keep).unwrap();
    for _ in 0..5 {
        pair.check(&[(0, 1), (1, 1)], Mask::Causal);
        pair.append(&[(0, 20), (1, 1)]);
    }
    pair.check_read(0);
    let (used, fork) = (pair.other.footprint(), pair.other.seq_footprint(0));
    pair.other.fork(0, 7).unwrap();
    assert_eq!(pair.other.footprint().payload, used.payload);
    assert_eq!(pair.other.seq_footprint(7).payload, fork.payload);
    assert!(fork.payload > 0);
    let copy = pair.other.clone();
    assert!(pair.other.remove(0) && pair.other.remove(7) && pair.other.remove(1));
    assert_eq!(pair.other.footprint().payload, 0);
    // The entries of a clone stay, and are not overwritten.
    pair.append(&[(8, 400)]);
    pair.other = copy;
    pair.check_read(0);
}

#[test]
fn a_full_pool_changes_nothing() {
    let Some(device) = device() else { return };
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap();
    let mut store = QuantStore::new(shape, format).unwrap().with_capacity(1 << 20);
    let (small, large) = (Batch::single(0, 500).unwrap(), Batch::single(1, 20_000).unwrap());
    let tensor = |batch: &Batch| numbers(batch.tokens(), 2, 64).to_device(&device).unwrap();
    store.append(&small, &tensor(&small), &tensor(&small)).unwrap();
    let before = store.footprint();
    assert!(!store.can_append(&large));
    let error = store.append(&large, &tensor(&large), &tensor(&large)).unwrap_err();
    assert!(matches!(error, Error::PoolFull { .. }), "{error}");
    assert_eq!((store.footprint(), store.seqs()), (before, vec![0]));
}

#[test]
fn a_fork_without_room_leaves_no_sinks() {
    let Some(device) = device() else { return };
    let spec = LayerSpec::new(AttentionShape::new(4, 2, 64).unwrap());
    let cache = QuantCache::new(spec, Format::kivi(Bits::Four, Bits::Four, 32, 64).unwrap());
    let mut cache = cache.unwrap().with_sinks(4).unwrap();
    let x = |heads| numbers(50, heads, 64).to_device(&device).unwrap();
    let batch = Batch::single(0, 50).unwrap();
    cache.attend(&Step { batch: &batch, q: &x(4), k: &x(2), v: &x(2) }).unwrap();
    let mut cache = cache.with_capacity(0);
    assert!(matches!(cache.fork(0, 1), Err(Error::PoolFull { .. })));
    assert_eq!((cache.seqs(), cache.held(1)), (vec![0], 0));
}

#[test]
fn caches_attend_as_on_the_cpu() {
    let Some(device) = device() else { return };
    let spec = LayerSpec::new(AttentionShape::new(8, 2, 64).unwrap());
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 128).unwrap();
    let rope = Rope::new(64, 48, 10_000.0, RopeScaling::None).unwrap();
    let rotated = spec.clone().with_rope(Arc::new(rope));
    let before_rope = format.with_key_basis(KeyBasis::BeforeRope);
    for (spec, format) in [(&spec, format), (&rotated, before_rope)] {
        for (sinks, order) in
            [(0, Order::AttendFirst), (4, Order::AttendFirst), (4, Order::QuantizeFirst)]
        {
            let cache = QuantCache::new(spec.clone(), format).unwrap();
            check_cache(&device, cache.with_order(order).with_sinks(sinks).unwrap());
        }
    }
}

#[test]
fn keys_before_rope_are_read_rotated_and_all_kept() {
    let Some(device) = device() else { return };
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let rotary = Arc::new(Rotary::new(&[0.7, 0.01], 3).unwrap());
    let format = Format::kivi(Bits::Four, Bits::Two, 32, 64).unwrap();
    let store = || QuantStore::before_rope(shape, format, rotary.clone()).unwrap();
    let (mut host, mut other) = (store(), store());
    let batch = Batch::new(&[(0, 150), (1, 20)]).unwrap();
    let [k, v] = [0; 2].map(|_| numbers(170, 2, 64));
    host.append(&batch, &k, &v).unwrap();
    other.append(&batch, &k.to_device(&device).unwrap(), &v.to_device(&device).unwrap()).unwrap();
    for (seq, len) in [(0, 150), (1, 20)] {
        host.truncate(seq, len - 2).unwrap();
        other.truncate(seq, len - 2).unwrap();
        let ((k, v), (dk, dv)) = (host.read(seq, 1).unwrap(), other.read(seq, 1).unwrap());
        let error = relative(&dk, &k).max(relative(&dv, &v));
        assert!(error < 1e-3, "{error}");
    }
    let keep = |len| Selection::uniform(2, (0..len).collect());
    other.retain(1, &keep(18)).unwrap();
    let error = other.retain(1, &keep(17)).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    // A batch without entries sees nothing.
    let q = numbers(1, 4, 64).to_device(&device).unwrap();
    let state = other.attend(&Batch::single(7, 1).unwrap(), &q, Mask::Full).unwrap();
    assert_eq!(state.lse.to_vec2::<f32>().unwrap(), [[f32::NEG_INFINITY; 4]]);
}

fn check_cache(device: &Device, mut host: QuantCache) {
    let mut other = host.clone();
    for parts in
        [vec![(0, 400), (1, 7)], vec![(1, 1), (0, 1)], vec![(0, 60), (2, 30)], vec![(2, 1)]]
    {
        let batch = Batch::new(&parts).unwrap();
        let [k, v] = [0; 2].map(|_| numbers(batch.tokens(), 2, 64));
        let q = numbers(batch.tokens(), 8, 64);
        let [dk, dv, dq] = [&k, &v, &q].map(|x| x.to_device(device).unwrap());
        let want = host.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
        let got = other.attend(&Step { batch: &batch, q: &dq, k: &dk, v: &dv }).unwrap();
        let error = relative(&got, &want);
        assert!(error <= 2e-3, "{parts:?}: {error}");
    }
    assert_eq!((other.held(0), other.held(1), other.held(2)), (461, 8, 31));
}

#[test]
fn layers_share_the_lists_of_equal_lengths_only() {
    let Some(device) = device() else { return };
    let spec = LayerSpec::new(AttentionShape::new(8, 2, 64).unwrap());
    let cache = |bits, order| {
        let format = Format::kivi(bits, bits, 32, 64).unwrap();
        QuantCache::new(spec.clone(), format).unwrap().with_order(order)
    };
    for order in [Order::AttendFirst, Order::QuantizeFirst] {
        let bits = [Bits::Four, Bits::Four, Bits::Two, Bits::Four];
        let mut sharing = bits.map(|bits| cache(bits, order));
        let mut alone = sharing.clone();
        let decode = vec![(1, 1), (0, 1)];
        let steps = [vec![(0, 400), (1, 70)]].into_iter().chain(vec![decode; 80]);
        for (i, parts) in steps.chain([vec![(2, 5), (0, 200), (1, 1)]]).enumerate() {
            let batch = Batch::new(&parts).unwrap();
            for (layer, (shared, own)) in sharing.iter_mut().zip(&mut alone).enumerate() {
                if (i, layer) == (1, 3) {
                    shared.truncate(1, 3).unwrap();
                    own.truncate(1, 3).unwrap();
                }
                let [k, v] = [0; 2].map(|_| numbers(batch.tokens(), 2, 64));
                let q = numbers(batch.tokens(), 8, 64);
                let [k, v, q] = [k, v, q].map(|x| x.to_device(&device).unwrap());
                let step = |batch| Step { batch, q: &q, k: &k, v: &v };
                let got = shared.attend(&step(&batch)).unwrap();
                let want = own.attend(&step(&Batch::new(&parts).unwrap())).unwrap();
                assert_eq!(relative(&got, &want), 0.0, "{order:?}, step {i}, layer {layer}");
            }
        }
    }
}

#[test]
fn formats_without_kernels_are_refused() {
    let Some(device) = device() else { return };
    let batch = Batch::single(0, 3).unwrap();
    let x = |d| numbers(3, 2, d).to_device(&device).unwrap();
    let flexgen = Format::flexgen(Bits::Four, Bits::Four, 32).unwrap();
    let kivi = Format::kivi(Bits::Four, Bits::Four, 32, 128).unwrap();
    let other_bits = Format::kivi(Bits::Eight, Bits::Four, 32, 128).unwrap();
    for (format, d) in [(flexgen, 64), (kivi, 96), (other_bits, 64)] {
        let mut store = QuantStore::new(AttentionShape::new(2, 2, d).unwrap(), format).unwrap();
        let error = store.append(&batch, &x(d), &x(d)).unwrap_err();
        assert!(matches!(error, Error::Unsupported(_)), "{error}");
    }
    let mut store = QuantStore::new(AttentionShape::new(2, 2, 64).unwrap(), kivi).unwrap();
    store.append(&batch, &x(64), &x(64)).unwrap();
    let error = store.append(&batch, &numbers(3, 2, 64), &numbers(3, 2, 64)).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    // An empty store adopts the dtype and the device of the next tensors.
    assert!(store.remove(0));
    let large = Tensor::full(1e5f32, (3, 2, 64), &device).unwrap().to_dtype(DType::BF16).unwrap();
    store.append(&batch, &large, &large).unwrap();
    assert!(
        relative(&store.read(0, 1).unwrap().0, &large.narrow(1, 1, 1).unwrap().squeeze(1).unwrap())
            < 1e-3
    );
    assert!(store.remove(0));
    store.append(&batch, &numbers(3, 2, 64), &numbers(3, 2, 64)).unwrap();
    assert!(store.pool().is_some());
}

#[test]
fn a_number_that_cannot_be_packed_ends_its_sequence_alone() {
    let Some(device) = device() else { return };
    let shape = AttentionShape::new(2, 1, 64).unwrap();
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap();
    let mut store = QuantStore::new(shape, format).unwrap();
    let good = numbers(200, 1, 64).to_device(&device).unwrap();
    store.append(&Batch::single(0, 200).unwrap(), &good, &good).unwrap();
    let mut numbers = vec![1f32; 200 * 64];
    numbers[40 * 64 + 7] = f32::INFINITY;
    let bad = Tensor::from_vec(numbers, (200, 1, 64), &device).unwrap();
    // Whether the append itself reports it depends on how far the device is.
    let appended = store.append(&Batch::single(1, 200).unwrap(), &bad, &bad);
    device.synchronize().unwrap();
    let both = Batch::decode(&[0, 1]).unwrap();
    let q = Tensor::ones((2, 2, 64), DType::F16, &device).unwrap();
    let error = appended.and_then(|()| store.attend(&both, &q, Mask::Full)).unwrap_err();
    assert!(matches!(error, Error::Poisoned { seq: 1, .. }), "{error}");
    assert!(error.to_string().contains("kv head 0"), "{error}");
    store.remove(1);
    store.append(&Batch::single(0, 200).unwrap(), &good, &good).unwrap();
    store.attend(&Batch::single(0, 1).unwrap(), &q.narrow(0, 0, 1).unwrap(), Mask::Full).unwrap();
}

/// A step that is prepared for all sequences would fail after layers had counted its tokens.
#[test]
fn a_poisoned_sequence_has_no_prepared_steps() {
    let Some(device) = device() else { return };
    let spec = LayerSpec::new(AttentionShape::new(2, 1, 64).unwrap());
    let format = Format::kivi(Bits::Four, Bits::Four, 32, 32).unwrap();
    let mut cache = QuantCache::new(spec, format).unwrap();
    let x = |heads| numbers(200, heads, 64).to_device(&device).unwrap();
    let (q, good) = (x(2), x(1));
    for seq in [0, 1] {
        let batch = Batch::single(seq, 200).unwrap();
        cache.attend(&Step { batch: &batch, q: &q, k: &good, v: &good }).unwrap();
    }
    let both = Batch::decode(&[0, 1]).unwrap();
    assert!(cache.prepared_decode(&both).is_some());
    let bad = Tensor::full(f32::INFINITY, (200, 1, 64), &device).unwrap();
    let bad = bad.to_dtype(DType::F16).unwrap();
    // Whether the call itself reports it depends on how far the device is.
    _ = cache.attend(&Step { batch: &Batch::single(1, 200).unwrap(), q: &q, k: &bad, v: &bad });
    device.synchronize().unwrap();
    assert!(cache.prepared_decode(&both).is_none());
    assert!(cache.prepared_decode(&Batch::decode(&[0]).unwrap()).is_some());
}
