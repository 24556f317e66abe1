//! Dense stores on a CUDA device against the CPU: blocks, evictions and selections. Needs a CUDA
//! device.
#![cfg(feature = "cuda")]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{random, relative};
use longctx_core::{
    AttentionShape, AttentionSums, Batch, Candidates, DenseStore, EntryRanges, Error, EvictOne,
    KeptEntries, KvStore, Mask, Ranking, RowReduction, Selection, SeqId, StepLists, top_entries,
};

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
fn layers_share_the_lists_of_equal_lengths_only() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let shape = AttentionShape::new(8, 2, 64).unwrap();
    let layers = || [0; 3].map(|_| DenseStore::new(shape, DType::F16).unwrap());
    let (mut sharing, mut alone) = (layers(), layers());
    let decode = vec![(1, 1), (0, 1)];
    let steps = [vec![(0, 400), (1, 70)]].into_iter().chain(vec![decode; 70]);
    for (i, parts) in steps.chain([vec![(2, 5), (0, 200), (1, 1)]]).enumerate() {
        let batch = Batch::new(&parts).unwrap();
        for (layer, (shared, own)) in sharing.iter_mut().zip(&mut alone).enumerate() {
            if (i, layer) == (1, 2) {
                shared.truncate(1, 3).unwrap();
                own.truncate(1, 3).unwrap();
            }
            let random = |heads| random(batch.tokens(), heads, 64, DType::F16);
            let [q, k, v] = [8, 2, 2].map(|heads| random(heads).to_device(&device).unwrap());
            let attend = |store: &mut DenseStore, batch: &Batch| {
                store.append(batch, &k, &v).unwrap();
                store.attend(batch, &q, Mask::Causal).unwrap().out
            };
            let got = attend(shared, &batch);
            let want = attend(own, &Batch::new(&parts).unwrap());
            assert_eq!(relative(&got, &want), 0.0, "step {i}, layer {layer}");
        }
    }
}

/// The heads per kv head are equal, so the plans differ in the number of kv heads only.
#[test]
fn layers_with_other_kv_heads_share_no_lists() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let shapes = [8, 2, 8, 2].map(|heads| AttentionShape::new(heads, heads, 64).unwrap());
    let stores = || shapes.map(|shape| DenseStore::new(shape, DType::F16).unwrap());
    let (mut sharing, mut alone) = (stores(), stores());
    for tokens in [70, 1, 1] {
        let batch = Batch::single(0, tokens).unwrap();
        for (shape, (shared, own)) in shapes.iter().zip(sharing.iter_mut().zip(&mut alone)) {
            let rows = || random(tokens, shape.heads, 64, DType::F16).to_device(&device).unwrap();
            let (q, k, v) = (rows(), rows(), rows());
            let attend = |store: &mut DenseStore, batch: &Batch| {
                store.append(batch, &k, &v).unwrap();
                store.attend(batch, &q, Mask::Causal).unwrap().out
            };
            let got = attend(shared, &batch);
            let want = attend(own, &Batch::single(0, tokens).unwrap());
            assert_eq!(relative(&got, &want), 0.0, "{tokens} tokens, {} heads", shape.heads);
            assert_eq!(shared.lens(0), own.lens(0));
        }
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

/// The positions of entries that always stay: those before `sinks_end`, and from `recent_start`.
struct Protected {
    sinks_end: u32,
    recent_start: u32,
}

impl Protected {
    fn contains(&self, position: u32) -> bool {
        position < self.sinks_end || position >= self.recent_start
    }
}

/// Returns the entries to keep, by sorting: protected ones first, then by score, then by age.
fn best(scores: &[f32], positions: &[u32], count: usize, protected: &Protected) -> Vec<u32> {
    let position = |i: u32| positions[i as usize];
    let protected = |i: u32| protected.contains(position(i));
    let score = |i: u32| match scores[i as usize] {
        x if x.is_nan() => f32::NEG_INFINITY,
        x => x,
    };
    let mut all: Vec<u32> = (0..scores.len() as u32).collect();
    all.sort_by(|&a, &b| {
        let by_score = score(b).total_cmp(&score(a)).then(position(a).cmp(&position(b)));
        protected(b).cmp(&protected(a)).then(by_score)
    });
    all.truncate(count);
    all.sort_unstable();
    all
}

/// Returns the reduction of each column of `rows`, plus the previous scores of the first entries.
fn reduced(rows: &[Vec<f32>], reduction: RowReduction, previous: &[f32]) -> Vec<f32> {
    let column = |i: usize| {
        let column = rows.iter().map(|row| row[i]);
        let score = match (reduction, rows.len()) {
            (_, 1) => rows[0][i],
            (RowReduction::Max, _) => column.reduce(f32::max).unwrap(),
            _ => column.sum::<f32>() / rows.len() as f32,
        };
        previous.get(i).map_or(score, |previous| previous + score)
    };
    (0..rows[0].len()).map(column).collect()
}

/// Three sequences in one launch: own rows for each kv head, the same rows for all, and one row.
#[test]
fn the_entries_of_the_highest_scores_are_those_of_a_sorted_list() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let mut draw = draws();
    let some = [0.0, -0.0, 1.5, -1.5, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, -3e8];
    let kinds = [
        (3, 4, RowReduction::Mean, true),
        (1, 12, RowReduction::Max, false),
        (3, 1, RowReduction::Mean, false),
    ];
    for len in [1usize, 2, 31, 500, 1024, 1025, 8192, 70_001] {
        for round in 0..7 {
            let (mut inputs, mut wanted) = (Vec::new(), Vec::new());
            for (heads, rows, reduction, adds) in kinds {
                let mut score = |_| match (round % 3, rows) {
                    (0, 1) => some[draw(some.len())],
                    (1, _) => draw(1 << 20) as f32 / 1e6,
                    _ => (draw(7) as f32).exp(),
                };
                let mut list = |len: usize| (0..len).map(&mut score).collect::<Vec<f32>>();
                let scores: Vec<Vec<Vec<f32>>> =
                    (0..heads).map(|_| (0..rows).map(|_| list(len)).collect()).collect();
                // Entries from the middle on are new: they have no previous score, and their
                // positions follow those of all others.
                let held = len / 2;
                let previous: Vec<Vec<f32>> =
                    (0..3).map(|_| if adds { list(held) } else { Vec::new() }).collect();
                let count = match round {
                    5 => len,
                    6 => len - 1,
                    _ => 1 + draw(len),
                };
                let sinks = draw(4).min(count);
                let recent = draw(40).min(count - sinks);
                let next = 2 * held as u32;
                // In any order, with gaps.
                let positions: Vec<Vec<u32>> = (0..3)
                    .map(|_| {
                        let mut all: Vec<u32> = (0..next).collect();
                        (0..held).for_each(|i| all.swap(i, i + draw(2 * held - i)));
                        all.truncate(held);
                        all
                    })
                    .collect();
                let all_positions = |head: usize| -> Vec<u32> {
                    positions[head]
                        .iter()
                        .copied()
                        .chain(next..next + (len - held) as u32)
                        .collect()
                };
                inputs.push(Candidates {
                    kv_heads: 3,
                    scores: Tensor::new(scores.clone(), &device).unwrap(),
                    count,
                    ranking: Ranking {
                        reduction,
                        previous: (adds && held > 0)
                            .then(|| Tensor::new(previous.clone(), &device).unwrap()),
                        positions: (held > 0)
                            .then(|| Tensor::new(positions.clone(), &device).unwrap()),
                        next_position: next,
                        sinks,
                        recent,
                    },
                });
                let end = next + (len - held) as u32;
                let protected =
                    Protected { sinks_end: sinks as u32, recent_start: end - recent as u32 };
                let head = |head: usize| {
                    let rows = &scores[head.min(heads - 1)];
                    let scores = reduced(rows, reduction, &previous[head]);
                    let positions = all_positions(head);
                    let keep = best(&scores, &positions, count, &protected);
                    let kept_positions: Vec<u32> =
                        keep.iter().map(|&entry| positions[entry as usize]).collect();
                    (scores, keep, kept_positions)
                };
                wanted.push((0..3).map(head).collect::<Vec<_>>());
            }
            let got = top_entries(&inputs).unwrap().unwrap();
            for ((input, got), wanted) in inputs.iter().zip(got).zip(wanted) {
                let what = format!("{len} entries, round {round}, {} selected", input.count);
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let all = got.all_scores.to_vec2::<f32>().unwrap();
                for (head, (scores, keep, positions)) in wanted.into_iter().enumerate() {
                    assert_eq!(got.entries.heads().unwrap()[head], keep, "{what}");
                    assert_eq!(bits(&all[head]), bits(&scores), "{what}");
                    if input.count > 0 {
                        let kept: Vec<f32> = keep.iter().map(|&i| scores[i as usize]).collect();
                        let row = |x: &Tensor| x.get(head).unwrap();
                        let got_scores = row(&got.scores).to_vec1::<f32>().unwrap();
                        assert_eq!(bits(&got_scores), bits(&kept), "{what}");
                        let got_positions = row(&got.positions).to_vec1::<u32>().unwrap();
                        assert_eq!(got_positions, positions, "{what}");
                    }
                }
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
        let (mut on_host, mut on_device) = (Vec::new(), Vec::new());
        for seq in 0..2 {
            let len = pair.host.len(seq);
            let count = if round % 2 == 0 { len - 1 } else { len / 2 + 1 };
            let (host, other) = select(len, count);
            // Both kinds of selections in one call.
            let other = if round % 4 == 3 && seq == 0 { host.clone() } else { other };
            on_host.push((seq, host));
            on_device.push((seq, other));
        }
        assert_eq!(pair.host.retain_each(&on_host).unwrap(), [true; 2]);
        assert_eq!(pair.other.retain_each(&on_device).unwrap(), [true; 2]);
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
    // Indices on another device are refused before anything changes.
    let lens = pair.other.lens(0);
    let elsewhere = Tensor::new(vec![vec![0u32, 1]; 2], &Device::Cpu).unwrap();
    let elsewhere = Selection::on_device(&elsewhere).unwrap();
    let error = pair.other.retain(0, &elsewhere).unwrap_err();
    assert!(error.to_string().contains("one on the store's device"), "{error}");
    let x = random(2, 2, 64, DType::F16).to_device(&device).unwrap();
    let batch = Batch::single(0, 2).unwrap();
    let error = pair.other.append_selected(&batch, &x, &x, &[elsewhere]).unwrap_err();
    assert!(error.to_string().contains("one on the store's device"), "{error}");
    assert_eq!(pair.other.lens(0), lens);
    // Indices past a head's end are not read.
    let wild = Tensor::new(vec![vec![0u32, u32::MAX]; 2], &device).unwrap();
    pair.other.retain(0, &Selection::on_device(&wild).unwrap()).unwrap();
    assert_eq!(pair.other.lens(0), [2, 2]);
    assert!(pair.other.read(0, 0).is_ok());
}

#[test]
fn a_sequence_that_is_listed_twice_retains_in_turn() {
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let devices = [Device::Cpu].into_iter().chain(Device::new_cuda(0));
    for device in devices {
        let mut store = DenseStore::new(shape, DType::F16).unwrap();
        let rows: Vec<f32> = (0..200 * 2 * 64).map(|i| (i / (2 * 64)) as f32).collect();
        let x = Tensor::from_vec(rows, (200, 2, 64), &device).unwrap();
        store.append(&Batch::single(0, 200).unwrap(), &x, &x).unwrap();
        let keep = |entries| (0, Selection::uniform(2, entries));
        let every_second = keep((0..200).step_by(2).collect());
        let wild = keep(vec![0, 100]);
        assert!(store.retain_each(&[every_second.clone(), wild]).is_err());
        assert_eq!(store.lens(0), [100; 2]);
        let done = store.retain_each(&[keep((50..100).collect()), keep(vec![0, 49])]).unwrap();
        assert_eq!((done, store.lens(0)), (vec![true; 2], vec![2; 2]));
        let keys = store.read(0, 1).unwrap().0.to_vec2::<f32>().unwrap();
        assert_eq!([keys[0][0], keys[1][0]], [100.0, 198.0]);
        // No block is released twice.
        assert!(store.remove(0));
        store.append(&Batch::new(&[(1, 100), (2, 100)]).unwrap(), &x, &x).unwrap();
        assert_eq!(store.read(2, 0).unwrap().0.to_vec2::<f32>().unwrap()[99][0], 199.0);
    }
}

/// A sequence of which each step evicts one entry of each head.
struct Evicting {
    seq: SeqId,
    /// Positions and scores on the device, for the next step.
    positions: Option<Tensor>,
    scores: Option<Tensor>,
    next: u32,
    /// Positions of the entries of each head.
    known: Vec<Vec<u32>>,
    /// The same in the order of the positions, with the scores.
    in_order: Vec<Vec<(u32, f32)>>,
}

impl Evicting {
    fn new(seq: SeqId, kv_heads: usize, len: usize, device: &Device) -> Self {
        let known = vec![(0..len as u32).collect::<Vec<_>>(); kv_heads];
        let in_order = vec![(0..len as u32).map(|position| (position, 0.0)).collect(); kv_heads];
        let positions = Some(Tensor::new(known.clone(), device).unwrap());
        Self { seq, positions, scores: None, next: len as u32, known, in_order }
    }

    /// Returns how the entries are ranked in the order of their positions.
    fn ranking_in_order(&self, of: &Ranking, device: &Device) -> Ranking {
        let lists =
            |head: &Vec<(u32, f32)>| -> (Vec<u32>, Vec<f32>) { head.iter().copied().unzip() };
        let (positions, scores): (Vec<_>, Vec<_>) = self.in_order.iter().map(lists).unzip();
        let tensor = |_: &Tensor| Tensor::new(scores.clone(), device).unwrap();
        Ranking {
            positions: Some(Tensor::new(positions, device).unwrap()),
            previous: of.previous.as_ref().map(tensor),
            ..of.clone()
        }
    }
}

/// One step of several sequences: `one` evicts with attention, `plain` attends, sums, scores and
/// retains in separate calls.
fn evict_step(
    (one, plain): (&mut DenseStore, &mut DenseStore),
    seqs: &mut [Evicting],
    (of_layer, reduction, carries_scores): (bool, RowReduction, bool),
    (sinks, recent): (usize, usize),
    device: &Device,
    what: &str,
) {
    let (shape, dtype) = (*one.shape(), one.dtype());
    let batch = Batch::new(&seqs.iter().map(|of| (of.seq, 1)).collect::<Vec<_>>()).unwrap();
    let rows = |heads| random(batch.tokens(), heads, shape.head_dim, dtype).to_device(device);
    let [q, k, v] = [shape.heads, shape.kv_heads, shape.kv_heads].map(|n| rows(n).unwrap());
    one.append(&batch, &k, &v).unwrap();
    plain.append(&batch, &k, &v).unwrap();
    let eviction = |of: &Evicting| EvictOne {
        of_layer,
        ranking: Ranking {
            reduction,
            previous: of.scores.clone(),
            positions: of.positions.clone(),
            next_position: of.next,
            sinks,
            recent,
        },
        carries_scores,
        outputs: None,
    };
    let evictions: Vec<_> = seqs.iter().map(eviction).collect();
    let want = plain.attend(&batch, &q, Mask::Causal).unwrap();
    let sums = plain.attention_sums(&batch, &q, &want.lse, Mask::Causal).unwrap();
    let (out, kept) = one.attend_and_evict(&batch, &q, dtype, &evictions).unwrap();
    assert!(relative(&out.to_dtype(DType::F32).unwrap(), &want.out) < 6e-3, "{what}");
    for (i, of) in seqs.iter_mut().enumerate() {
        let sums = sums[i].heads(0..shape.kv_heads).unwrap();
        let (len, eviction) = (sums.dim(2).unwrap(), &evictions[i]);
        let scores = if of_layer { sums.reshape((1, (), len)).unwrap() } else { sums };
        let candidates = Candidates {
            kv_heads: shape.kv_heads,
            scores,
            count: len - 1,
            ranking: of.ranking_in_order(&eviction.ranking, device),
        };
        let top = top_entries(&[candidates]).unwrap().unwrap().pop().unwrap();
        let all = top.all_scores.to_vec2::<f32>().unwrap();
        let positions = kept[i].positions.to_vec2::<u32>().unwrap();
        let protected =
            Protected { sinks_end: sinks as u32, recent_start: of.next + 1 - recent as u32 };
        let mut keep = Vec::new();
        for (head, positions) in positions.iter().enumerate() {
            // The newest entry takes the place of the evicted one.
            let known = &mut of.known[head];
            let place = known.iter().zip(positions).take_while(|(a, b)| a == b).count();
            known.push(of.next);
            let dropped = known.swap_remove(place);
            assert_eq!(known, positions, "{what}");
            // Scores that differ by rounding only may be in another order.
            let entries = &mut of.in_order[head];
            entries.push((of.next, 0.0));
            entries.iter_mut().zip(&all[head]).for_each(|(entry, &score)| entry.1 = score);
            let open = entries.iter().filter(|entry| !protected.contains(entry.0));
            let least = open.map(|entry| entry.1).fold(f32::MAX, f32::min);
            let same = entries.iter().position(|entry| entry.0 == dropped).unwrap();
            let (_, score) = entries.remove(same);
            assert!(!protected.contains(dropped), "{what}");
            assert!(score <= least * 1.001 + 1e-9, "{what}: {score}, {least}");
            keep.push((0..len as u32).filter(|&entry| entry as usize != same).collect());
            if let Some(scores) = &kept[i].scores {
                let scores = scores.get(head).unwrap().to_vec1::<f32>().unwrap();
                for (&position, got) in known.iter().zip(scores) {
                    let at = entries.binary_search_by_key(&position, |entry| entry.0).unwrap();
                    let want = entries[at].1;
                    assert!((got - want).abs() <= want * 1e-3 + 1e-9, "{what}: {got}, {want}");
                }
            }
        }
        plain.retain(of.seq, &Selection::new(keep)).unwrap();
        assert_eq!(one.lens(of.seq), plain.lens(of.seq), "{what}");
        of.next += 1;
        (of.positions, of.scores) = (Some(kept[i].positions.clone()), kept[i].scores.clone());
    }
}

/// Returns an eviction of an entry without earlier scores.
fn plain_eviction() -> EvictOne {
    let ranking = Ranking {
        reduction: RowReduction::Mean,
        previous: None,
        positions: None,
        next_position: 0,
        sinks: 0,
        recent: 0,
    };
    EvictOne { of_layer: false, ranking, carries_scores: false, outputs: None }
}

#[test]
fn an_eviction_is_that_of_the_prepared_sequences() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let mut store = DenseStore::new(shape, DType::F16).unwrap();
    let batch = Batch::new(&[(0, 70), (1, 70)]).unwrap();
    let x = random(140, 2, 64, DType::F16).to_device(&device).unwrap();
    store.append(&batch, &x, &x).unwrap();
    let [both, first, second] = [&[0, 1][..], &[0], &[1]].map(|seqs| Batch::decode(seqs).unwrap());
    let mut lists = StepLists::default();
    store.prepare_decode(&first, &mut lists).unwrap();
    for (other, evictions) in [(&both, 2), (&second, 1)] {
        let evictions = vec![plain_eviction(); evictions];
        let error = store.prepare_evict(other, &evictions, &mut lists).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    }
    // A sequence without entries has none to evict.
    store.truncate(0, 0).unwrap();
    let error = store.prepare_evict(&first, &[plain_eviction()], &mut lists).unwrap_err();
    assert!(error.to_string().contains("at least 1, got 0"), "{error}");
    assert_eq!((store.len(0), store.len(1)), (0, 70));
}

#[test]
fn kept_entries_are_written_to_memory_that_fits_only() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let mut store = DenseStore::new(shape, DType::F16).unwrap();
    let x = random(70, 2, 64, DType::F16).to_device(&device).unwrap();
    store.append(&Batch::single(0, 70).unwrap(), &x, &x).unwrap();
    let q = random(1, 4, 64, DType::F16).to_device(&device).unwrap();
    let zeros =
        |dims: (usize, usize), dtype, device: &Device| Tensor::zeros(dims, dtype, device).unwrap();
    // Of another dtype, with strides, on another device.
    for (i, wrong) in [
        zeros((2, 69), DType::F32, &device),
        zeros((68, 2), DType::U32, &device).t().unwrap(),
        zeros((2, 67), DType::U32, &Device::Cpu),
    ]
    .into_iter()
    .enumerate()
    {
        let outputs = Some(KeptEntries { positions: wrong, scores: None });
        let eviction = EvictOne { outputs, ..plain_eviction() };
        let batch = Batch::decode(&[0]).unwrap();
        let (_, kept) = store.attend_and_evict(&batch, &q, DType::F16, &[eviction]).unwrap();
        let kept = &kept[0].positions;
        assert_eq!((kept.dtype(), kept.dims()), (DType::U32, &[2, 69 - i][..]));
        assert!(kept.is_contiguous() && kept.device().same_device(&device));
        assert!(kept.to_vec2::<u32>().unwrap().iter().flatten().all(|&position| position < 70));
    }
}

#[test]
fn layers_with_a_sliding_window_do_not_evict_by_attention() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let shape = AttentionShape { window: Some(64), ..shape };
    let mut store = DenseStore::new(shape, DType::F16).unwrap();
    let x = random(200, 2, 64, DType::F16).to_device(&device).unwrap();
    store.append(&Batch::single(0, 200).unwrap(), &x, &x).unwrap();
    assert!(!store.evicts_one(&[0]));
    let q = random(1, 4, 64, DType::F16).to_device(&device).unwrap();
    let batch = Batch::decode(&[0]).unwrap();
    let refused = store.attend_and_evict(&batch, &q, DType::F16, &[plain_eviction()]);
    assert!(matches!(refused, Err(Error::Unsupported(_))));
}

/// Attention and eviction in two launches, compared with separate calls.
#[test]
fn one_entry_is_evicted_as_in_separate_calls() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let shapes = [(8, 2, 128, DType::F16), (4, 4, 64, DType::BF16), (6, 1, 96, DType::F16)];
    let kinds = [
        (false, RowReduction::Mean, true),
        (true, RowReduction::Mean, false),
        (false, RowReduction::Max, false),
        (true, RowReduction::Max, true),
    ];
    let cases = shapes.iter().flat_map(|shape| kinds.iter().map(move |kind| (*shape, *kind)));
    for ((heads, kv_heads, d, dtype), kind) in cases {
        let shape = AttentionShape::new(heads, kv_heads, d).unwrap();
        let store = || DenseStore::new(shape, dtype).unwrap();
        let (mut one, mut plain) = (store(), store());
        let mut seqs = Vec::new();
        for (seq, len) in [(0, 63), (1, 700), (2, 5000)] {
            let batch = Batch::single(seq, len).unwrap();
            let rows = || random(len, kv_heads, d, dtype).to_device(&device).unwrap();
            let (k, v) = (rows(), rows());
            one.append(&batch, &k, &v).unwrap();
            plain.append(&batch, &k, &v).unwrap();
            seqs.push(Evicting::new(seq, kv_heads, len, &device));
        }
        for step in 0..70 {
            let what = format!("{shape:?}, {kind:?}, step {step}");
            assert!(one.evicts_one(&[0, 1, 2]), "{what}");
            let protected = [(0, 0), (4, 30), (0, 62)][step % 3];
            let both = (&mut one, &mut plain);
            evict_step(both, &mut seqs, kind, protected, &device, &what);
        }
        for of in &seqs {
            for (head, known) in of.known.iter().enumerate() {
                let mut order: Vec<u32> = (0..known.len() as u32).collect();
                order.sort_unstable_by_key(|&entry| known[entry as usize]);
                let order = Tensor::new(order, &device).unwrap();
                let read = |store: &DenseStore| store.read(of.seq, head).unwrap();
                let ((k, v), (dk, dv)) = (read(&one), read(&plain));
                let in_order = |x: &Tensor| x.index_select(&order, 0).unwrap();
                assert_eq!(
                    (relative(&in_order(&k), &dk), relative(&in_order(&v), &dv)),
                    (0.0, 0.0)
                );
            }
        }
        one.fork(0, 7).unwrap();
        assert!(!one.evicts_one(&[0]) && one.evicts_one(&[1]));
        let batch = Batch::single(0, 1).unwrap();
        let q = random(1, heads, d, dtype).to_device(&device).unwrap();
        let refused = one.attend_and_evict(&batch, &q, dtype, &[plain_eviction()]);
        assert!(matches!(refused, Err(Error::Unsupported(_))));
    }
}
