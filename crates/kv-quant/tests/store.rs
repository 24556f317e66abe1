//! The packed store against plain attention over what it gives back dequantized.
#![cfg(feature = "candle")]

use candle_core::{DType, Device, Tensor};
use kv_quant::{Axis, Bits, Flush, Format, QuantCache, QuantStore, Scheme};
use longctx_core::{
    AttentionShape, DenseCache, KvCache, KvStore, Partial, Rope, RopeScaling, Selection, Step,
    Visible, attention,
};

fn formats() -> Vec<Format> {
    let mut formats = Vec::new();
    for bits in [Bits::Two, Bits::Three, Bits::Four, Bits::Eight] {
        formats.push(Format::kivi(bits, bits, 32, 128).unwrap());
        formats.push(Format::flexgen(bits, bits, 32).unwrap());
    }
    formats
}

fn random(heads: usize, tokens: usize, d: usize) -> Tensor {
    Tensor::randn(0f32, 1., (2, heads, tokens, d), &Device::Cpu).unwrap()
}

fn relative(a: &Tensor, b: &Tensor) -> f32 {
    let scalar = |x: Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    scalar((a - b).unwrap()) / scalar(b.clone())
}

/// Attention over the dequantized entries of each head; they may differ in number.
fn reference(store: &QuantStore, q: &Tensor, visible: Visible) -> Partial {
    let shape = *store.shape();
    let one = AttentionShape { heads: shape.group(), kv_heads: 1, ..shape };
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for batch in 0..2 {
        for head in 0..shape.kv_heads {
            let (k, v) = store.read(batch, head).unwrap();
            let kv = |x: Tensor| x.unsqueeze(0).unwrap().unsqueeze(0).unwrap();
            let q = q.narrow(0, batch, 1).unwrap().narrow(1, head * shape.group(), shape.group());
            let part = attention::attend(&q.unwrap(), &kv(k), &kv(v), &one, visible).unwrap();
            out.push(part.out);
            lse.push(part.lse);
        }
    }
    let join = |parts: &[Tensor]| {
        let rows: Vec<_> =
            parts.chunks(shape.kv_heads).map(|heads| Tensor::cat(heads, 1).unwrap()).collect();
        Tensor::cat(&rows, 0).unwrap()
    };
    Partial { out: join(&out), lse: join(&lse) }
}

#[test]
fn fused_attention_equals_dequantize_then_attend() {
    for d in [64, 80] {
        let shape = AttentionShape::new(6, 2, d).unwrap();
        for format in formats() {
            let mut store = QuantStore::new(shape, format).unwrap();
            for tokens in [300, 1, 37] {
                store.append(&random(2, tokens, d), &random(2, tokens, d)).unwrap();
            }
            for (tokens, visible) in
                [(1, Visible::All), (5, Visible::Causal), (40, Visible::Causal)]
            {
                let q = random(6, tokens, d);
                let (got, want) =
                    (store.attend(&q, visible).unwrap(), reference(&store, &q, visible));
                assert!(relative(&got.out, &want.out) < 1e-3, "{format:?} {tokens} {visible:?}");
                assert!(relative(&got.lse, &want.lse) < 1e-3, "{format:?} {tokens} {visible:?}");
                let mass = store.mass(&q, &got.lse, visible).unwrap();
                for of_head in mass {
                    assert!(
                        (of_head.iter().sum::<f32>() - tokens as f32).abs() < 1e-2 * tokens as f32
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_retained_is_untouched_and_the_rest_is_freed() {
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    for format in formats() {
        let mut store = QuantStore::new(shape, format).unwrap();
        store.append(&random(2, 600, 64), &random(2, 600, 64)).unwrap();
        let before: Vec<_> = (0..4).map(|h| store.read(h / 2, h % 2).unwrap()).collect();
        let bytes = store.footprint().total();
        // Ragged: another stretch for each head.
        let keep: Vec<Vec<u32>> = (0..4)
            .map(|h| {
                (0..600).filter(|e| e % 7 == h || (*e > 100 * h && *e < 100 * h + 60)).collect()
            })
            .collect();
        store.retain(&Selection::new(keep.clone())).unwrap();
        for (h, keep) in keep.iter().enumerate() {
            let (k, v) = store.read(h / 2, h % 2).unwrap();
            let rows = Tensor::new(keep.as_slice(), &Device::Cpu).unwrap();
            assert_eq!(relative(&k, &before[h].0.index_select(&rows, 0).unwrap()), 0.0);
            assert_eq!(relative(&v, &before[h].1.index_select(&rows, 0).unwrap()), 0.0);
        }
        let q = random(4, 1, 64);
        let (got, want) =
            (store.attend(&q, Visible::All).unwrap(), reference(&store, &q, Visible::All));
        assert!(relative(&got.out, &want.out) < 1e-3, "{format:?}");
        let newest: Vec<u32> = (keep[0].len() as u32 - 40..keep[0].len() as u32).collect();
        let mut all: Vec<Vec<u32>> = vec![newest];
        all.extend((1..4).map(|_| (0..10).collect()));
        store.retain(&Selection::new(all)).unwrap();
        assert!(store.footprint().total() < bytes / 3, "{format:?}: {}", store.footprint());
    }
}

#[test]
fn footprint_ratios_at_8192_tokens() {
    for d in [64, 128] {
        let shape = AttentionShape::new(1, 1, d).unwrap();
        let kv = Tensor::randn(0f32, 1., (1, 1, 8192, d), &Device::Cpu).unwrap();
        let ratio = |format: Format| {
            let mut store = QuantStore::new(shape, format).unwrap();
            store.append(&kv, &kv).unwrap();
            (8192 * d * 2 * 2) as f64 / store.footprint().total() as f64
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
    let shape = AttentionShape::new(4, 2, 64).unwrap();
    let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None).unwrap();
    let mut dense = DenseCache::new(shape, DType::F32).unwrap();
    let mut packed =
        QuantCache::new(shape, Format::kivi(Bits::Eight, Bits::Eight, 32, 128).unwrap()).unwrap();
    for (tokens, tolerance) in [(300, 1e-6), (1, 2e-2), (1, 2e-2), (50, 2e-2)] {
        let (q, k, v) = (random(4, tokens, 64), random(2, tokens, 64), random(2, tokens, 64));
        let step = Step { q: &q, k: &k, v: &v, shape: &shape, rope: &rope };
        let (got, want) = (packed.attend(&step).unwrap(), dense.attend(&step).unwrap());
        assert!(relative(&got, &want) <= tolerance, "{tokens} tokens: {}", relative(&got, &want));
    }
}

#[test]
fn numbers_that_cannot_be_packed_are_named() {
    let shape = AttentionShape::new(1, 1, 4).unwrap();
    let mut store =
        QuantStore::new(shape, Format::flexgen(Bits::Four, Bits::Four, 32).unwrap()).unwrap();
    let mut data = vec![0f32; 12];
    data[6] = f32::NAN;
    let k = Tensor::from_vec(data, (1, 1, 3, 4), &Device::Cpu).unwrap();
    let message = store.append(&k, &k).unwrap_err().to_string();
    assert!(message.contains("NaN at token 1, channel 2"), "{message}");
}

#[test]
fn holes_are_closed_where_tokens_are_packed_one_by_one() {
    let shape = AttentionShape::new(2, 1, 64).unwrap();
    let one_by_one = Scheme::new(Bits::Four, Axis::Channels, 32).unwrap();
    for flush in [Flush::Immediate, Flush::Together, Flush::Staggered(64)] {
        let format = Format::new(one_by_one, one_by_one, flush).unwrap();
        let mut store = QuantStore::new(shape, format).unwrap();
        for tokens in [500, 100] {
            store.append(&random(1, tokens, 64), &random(1, tokens, 64)).unwrap();
        }
        let before = (store.footprint().total(), store.read(0, 0).unwrap());
        // Every fifth entry: each chunk keeps some.
        let keep: Vec<u32> = (0..600).filter(|e| e % 5 == 2).collect();
        store.retain(&Selection::uniform(2, keep.clone())).unwrap();
        let rows = Tensor::new(keep.as_slice(), &Device::Cpu).unwrap();
        let (k, v) = store.read(0, 0).unwrap();
        assert_eq!(relative(&k, &before.1.0.index_select(&rows, 0).unwrap()), 0.0);
        assert_eq!(relative(&v, &before.1.1.index_select(&rows, 0).unwrap()), 0.0);
        assert!(store.footprint().total() * 3 < before.0, "{flush:?}: {}", store.footprint());
        // What comes later finds its place.
        store.append(&random(1, 77, 64), &random(1, 77, 64)).unwrap();
        let q = random(2, 1, 64);
        let (got, want) =
            (store.attend(&q, Visible::All).unwrap(), reference(&store, &q, Visible::All));
        assert!(relative(&got.out, &want.out) < 1e-3, "{flush:?}");
    }
}
