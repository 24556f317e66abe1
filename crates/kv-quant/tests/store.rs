//! The packed store against dense attention over its dequantized entries.
#![cfg(feature = "candle")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kv_quant::{Axis, Bits, Flush, Format, QuantCache, QuantStore, Scheme};
use longctx_core::{
    AttentionShape, AttentionState, AttentionSums, Batch, DenseCache, DenseStore, EntryRanges,
    Footprint, KvCache, KvStore, LayerSpec, Mask, Rope, RopeScaling, Selection, SeqId, Step,
};

const SEQS: [SeqId; 2] = [11, 4];

fn formats() -> Vec<Format> {
    let mut formats = Vec::new();
    for bits in [Bits::Two, Bits::Three, Bits::Four, Bits::Eight] {
        formats.push(Format::kivi(bits, bits, 32, 128).unwrap());
        formats.push(Format::kivi_rolling(bits, bits, 32, 64).unwrap());
        formats.push(Format::flexgen(bits, bits, 32).unwrap());
    }
    formats
}

fn random(tokens: usize, heads: usize, d: usize) -> Tensor {
    Tensor::randn(0f32, 1., (tokens, heads, d), &Device::Cpu).unwrap()
}

fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let scalar = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    scalar((a - b).unwrap()) / scalar(b.clone())
}

/// Returns the bytes without memory allocated for future tokens.
fn used(footprint: Footprint) -> usize {
    footprint.total() - footprint.slack
}

/// Returns a batch with the given number of tokens for each sequence.
fn batch(tokens: &[usize]) -> Batch {
    Batch::new(&SEQS.into_iter().zip(tokens.iter().copied()).collect::<Vec<_>>()).unwrap()
}

fn append(store: &mut QuantStore, tokens: &[usize]) {
    let (batch, shape) = (batch(tokens), *store.shape());
    let of = |d| random(batch.tokens(), shape.kv_heads, d);
    store.append(&batch, &of(shape.head_dim), &of(shape.value_dim)).unwrap();
}

/// Returns a dense store of the dequantized entries. Heads may have different numbers of them.
fn dequantized(store: &QuantStore) -> DenseStore {
    let shape = *store.shape();
    let mut dense = DenseStore::new(shape, DType::F32).unwrap();
    for seq in store.seqs() {
        let heads: Vec<_> = (0..shape.kv_heads).map(|h| store.read(seq, h).unwrap()).collect();
        let longest = store.len(seq);
        let pad = |x: &Tensor| {
            let missing = longest - x.dim(0).unwrap();
            x.pad_with_zeros(0, 0, missing).unwrap()
        };
        let join = |of: fn(&(Tensor, Tensor)) -> &Tensor| {
            Tensor::stack(&heads.iter().map(|head| pad(of(head))).collect::<Vec<_>>(), 1).unwrap()
        };
        let own = |&len: &usize| (0..len as u32).collect();
        let selection = Selection::new(store.lens(seq).iter().map(own).collect());
        let (k, v) = (join(|head| &head.0), join(|head| &head.1));
        let batch = Batch::single(seq, longest).unwrap();
        dense.append_selected(&batch, &k, &v, &[selection]).unwrap();
    }
    dense
}

fn check(store: &QuantStore, batch: &Batch, mask: Mask<'_>, case: &str) -> AttentionState {
    let q = random(batch.tokens(), store.shape().heads, store.shape().head_dim);
    let got = store.attend(batch, &q, mask).unwrap();
    let dense = dequantized(store);
    let want = dense.attend(batch, &q, mask).unwrap();
    assert!(relative(&got.out, &want.out) < 1e-3, "{case}");
    assert!(relative(&got.lse, &want.lse) < 1e-3, "{case}");
    let sums = store.attention_sums(batch, &q, &got.lse, mask).unwrap();
    let heads = |sums: Vec<AttentionSums>| -> Vec<_> {
        sums.iter().flat_map(|sums| sums.split().unwrap()).collect()
    };
    let wanted = dense.attention_sums(batch, &q, &want.lse, mask).unwrap();
    for (got, want) in heads(sums).into_iter().zip(heads(wanted)) {
        assert_eq!(got.dims(), want.dims(), "{case}");
        let off = (got - want).unwrap().abs().unwrap().flatten_all().unwrap();
        let worst = off.to_vec1::<f32>().unwrap().into_iter().fold(0.0, f32::max);
        assert!(worst < 1e-2, "{case}: {worst}");
    }
    got
}

#[test]
fn fused_attention_equals_dequantize_then_attend() {
    for (d, value_dim) in [(64, 64), (80, 48)] {
        let shape = AttentionShape { value_dim, ..AttentionShape::new(6, 2, d).unwrap() };
        for format in formats() {
            let mut store = QuantStore::new(shape, format).unwrap();
            for tokens in [[300, 40], [1, 1], [37, 200]] {
                append(&mut store, &tokens);
            }
            let calls = [([1, 1], Mask::Full), ([5, 1], Mask::Causal), ([40, 3], Mask::Causal)];
            for (tokens, mask) in calls {
                let case = format!("{format:?} {tokens:?} {mask:?}");
                check(&store, &batch(&tokens), mask, &case);
            }
            // Ranges that begin and end within blocks, different for each head.
            let ranges = vec![vec![3..40, 64..65, 100..338], vec![0..338], vec![], vec![200..241]];
            let ranges = EntryRanges::new(ranges).unwrap();
            check(&store, &batch(&[2, 2]), Mask::Entries(&ranges), &format!("{format:?} ranges"));
        }
    }
}

#[test]
fn attention_of_an_unknown_sequence_is_empty() {
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let mut store = QuantStore::new(shape, formats()[0]).unwrap();
    append(&mut store, &[90]);
    let q = random(3, 4, 64);
    let calls = Batch::new(&[(77, 1), (SEQS[0], 2)]).unwrap();
    let both = store.attend(&calls, &q, Mask::Full).unwrap();
    let lse: Vec<f32> = both.lse.get(0).unwrap().to_vec1().unwrap();
    assert_eq!(lse, [f32::NEG_INFINITY; 4]);
    let own = q.narrow(0, 1, 2).unwrap();
    let alone = store.attend(&Batch::single(SEQS[0], 2).unwrap(), &own, Mask::Full).unwrap();
    assert_eq!(relative(&both.out.narrow(0, 1, 2).unwrap(), &alone.out), 0.0);
}

#[test]
fn a_log_sum_exp_of_another_shape_is_refused() {
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let mut store = QuantStore::new(shape, formats()[0]).unwrap();
    append(&mut store, &[5, 3]);
    let q = random(2, 4, 64);
    // The log-sum-exp of a sequence that the store does not know is not read.
    for batch in [batch(&[1, 1]), Batch::decode(&[99, SEQS[0]]).unwrap()] {
        for dims in [(1, 4), (4, 2), (3, 4)] {
            let lse = Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap();
            let error = store.attention_sums(&batch, &q, &lse, Mask::Full).unwrap_err();
            assert!(error.to_string().contains("lse: expected [2, 4]"), "{error}");
        }
    }
}

#[test]
fn retained_entries_are_unchanged_and_others_are_freed() {
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    for format in formats() {
        let mut store = QuantStore::new(shape, format).unwrap();
        append(&mut store, &[600, 600]);
        let bytes = used(store.footprint());
        for seq in SEQS {
            let before: Vec<_> = (0..2).map(|h| store.read(seq, h).unwrap()).collect();
            // A different range of entries for each head.
            let keep: Vec<Vec<u32>> = (0..2)
                .map(|h| {
                    (0..600).filter(|e| e % 7 == h || (*e > 100 * h && *e < 100 * h + 60)).collect()
                })
                .collect();
            store.retain(seq, &Selection::new(keep.clone())).unwrap();
            for (h, keep) in keep.iter().enumerate() {
                let (k, v) = store.read(seq, h).unwrap();
                let rows = Tensor::new(keep.as_slice(), &Device::Cpu).unwrap();
                assert_eq!(relative(&k, &before[h].0.index_select(&rows, 0).unwrap()), 0.0);
                assert_eq!(relative(&v, &before[h].1.index_select(&rows, 0).unwrap()), 0.0);
            }
        }
        check(&store, &batch(&[1, 2]), Mask::Full, &format!("{format:?}"));
        for seq in SEQS {
            let len = store.lens(seq)[0] as u32;
            let few = vec![(len - 40..len).collect(), (0..10).collect()];
            store.retain(seq, &Selection::new(few)).unwrap();
        }
        assert!(used(store.footprint()) < bytes / 3, "{format:?}: {}", store.footprint());
    }
}

#[test]
fn footprint_ratios_at_8192_tokens() {
    for d in [64, 128] {
        let shape = AttentionShape::new(1, 1, d).unwrap();
        let kv = random(8192, 1, d);
        let ratio = |format: Format| {
            let mut store = QuantStore::new(shape, format).unwrap();
            store.append(&Batch::single(0, 8192).unwrap(), &kv, &kv).unwrap();
            (8192 * d * 2 * 2) as f64 / store.seq_footprint(0).total() as f64
        };
        let kivi = |bits| ratio(Format::kivi(bits, bits, 32, 128).unwrap());
        let (two, four) = (kivi(Bits::Two), kivi(Bits::Four));
        let flexgen = ratio(Format::flexgen(Bits::Four, Bits::Four, 32).unwrap());
        println!("head_dim {d}: KIVI-2 {two:.2}x, KIVI-4 {four:.2}x, FlexGen-4 {flexgen:.2}x");
        assert!(two >= 5.0 && four >= 3.1 && flexgen >= 3.1);
    }
}

#[test]
fn a_prompt_is_exact_and_decoding_is_close_to_dense() {
    let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap();
    let spec = LayerSpec::new(AttentionShape::new(4, 2, 64).unwrap()).with_rope(Arc::new(rope));
    let mut dense = DenseCache::new(spec.clone(), DType::F32).unwrap();
    let format = Format::kivi(Bits::Eight, Bits::Eight, 32, 128).unwrap();
    let mut packed = QuantCache::new(spec, format).unwrap();
    for (tokens, tolerance) in [([300, 7], 1e-6), ([1, 1], 2e-2), ([1, 200], 2e-2), ([50, 1], 2e-2)]
    {
        let batch = batch(&tokens);
        let of = |heads| random(batch.tokens(), heads, 64);
        let (q, k, v) = (of(4), of(2), of(2));
        let step = Step { batch: &batch, q: &q, k: &k, v: &v };
        let (got, want) = (packed.attend(&step).unwrap(), dense.attend(&step).unwrap());
        let error = relative(&got, &want);
        assert!(error <= tolerance, "{tokens:?} tokens: {error}");
    }
}

#[test]
fn numbers_that_cannot_be_packed_are_named() {
    let shape = AttentionShape::new(1, 1, 4).unwrap();
    let format = Format::flexgen(Bits::Four, Bits::Four, 32).unwrap();
    let mut store = QuantStore::new(shape, format).unwrap();
    let mut data = vec![0f32; 12];
    data[6] = f32::NAN;
    let k = Tensor::from_vec(data, (3, 1, 4), &Device::Cpu).unwrap();
    let message = store.append(&Batch::single(5, 3).unwrap(), &k, &k).unwrap_err().to_string();
    assert!(message.contains("keys of sequence 5: token 1, head 0, channel 2"), "{message}");
}

#[test]
fn holes_are_closed_in_formats_that_pack_tokens_one_by_one() {
    let shape = AttentionShape::new(2, 1, 64).unwrap();
    let one_by_one = Scheme::new(Bits::Four, Axis::Channels, 32).unwrap();
    for flush in [Flush::Immediate, Flush::Rolling(64), Flush::Staggered(64)] {
        let format = Format::new(one_by_one, one_by_one, flush).unwrap();
        let mut store = QuantStore::new(shape, format).unwrap();
        for tokens in [500, 100] {
            append(&mut store, &[tokens]);
        }
        let seq = SEQS[0];
        let before = (used(store.seq_footprint(seq)), store.read(seq, 0).unwrap());
        // Every fifth entry: each block keeps some.
        let keep: Vec<u32> = (0..600).filter(|e| e % 5 == 2).collect();
        store.retain(seq, &Selection::uniform(1, keep.clone())).unwrap();
        let rows = Tensor::new(keep.as_slice(), &Device::Cpu).unwrap();
        let (k, v) = store.read(seq, 0).unwrap();
        assert_eq!(relative(&k, &before.1.0.index_select(&rows, 0).unwrap()), 0.0);
        assert_eq!(relative(&v, &before.1.1.index_select(&rows, 0).unwrap()), 0.0);
        let after = store.seq_footprint(seq);
        assert!(used(after) * 3 < before.0, "{flush:?}: {after}");
        // Later tokens are stored correctly.
        append(&mut store, &[77]);
        check(&store, &batch(&[1]), Mask::Full, &format!("{flush:?}"));
    }
}
