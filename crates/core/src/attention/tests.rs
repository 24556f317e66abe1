//! Tiles against candle's own operations, which build the whole matrix of scores.

use super::{attend, mass, ops};
use crate::{AttentionShape, DenseStore, KvStore, Partial, Selection, Visible};
use candle_core::{DType, Device, Tensor};

fn random(heads: usize, tokens: usize, d: usize) -> Tensor {
    Tensor::randn(0f32, 1., (2, heads, tokens, d), &Device::Cpu).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

fn shapes() -> Vec<AttentionShape> {
    let plain = AttentionShape::new(6, 2, 64).unwrap();
    vec![
        plain,
        AttentionShape::new(4, 4, 80).unwrap(),
        AttentionShape { window: Some(100), ..plain },
        AttentionShape { window: Some(200), ..plain },
        AttentionShape { soft_cap: Some(5.0), ..AttentionShape::new(8, 1, 32).unwrap() },
    ]
}

#[test]
fn tiles_equal_the_whole_matrix() {
    for shape in shapes() {
        // One token over a long past (split over entries), a few, a prompt of several tiles, and more entries than queries.
        for (tokens, entries) in [(1, 1), (1, 1500), (3, 700), (300, 300), (90, 640)] {
            let q = random(shape.heads, tokens, shape.head_dim);
            let k = random(shape.kv_heads, entries, shape.head_dim);
            let v = random(shape.kv_heads, entries, shape.head_dim);
            for visible in [Visible::All, Visible::Causal] {
                let got = attend(&q, &k, &v, &shape, visible).unwrap();
                let want = ops::attend(&q, &k, &v, &shape, visible).unwrap();
                let case = format!("{shape:?}, {tokens} over {entries}, {visible:?}");
                assert!(distance(&got.out, &want.out) < 1e-5, "{case}");
                assert!(distance(&got.lse, &want.lse) < 1e-5, "{case}");
            }
        }
    }
}

#[test]
fn parts_merge_into_the_whole() {
    let shape = AttentionShape::new(6, 2, 64).unwrap();
    let (q, k, v) = (random(6, 9, 64), random(2, 400, 64), random(2, 400, 64));
    let whole = attend(&q, &k, &v, &shape, Visible::Causal).unwrap();
    let part = |x: &Tensor, start, len| x.narrow(2, start, len).unwrap();
    let parts: Vec<_> =
        [(0, 150, Visible::All), (150, 241, Visible::All), (391, 9, Visible::Causal)]
            .map(|(start, len, visible)| {
                attend(&q, &part(&k, start, len), &part(&v, start, len), &shape, visible).unwrap()
            })
            .into();
    let merged = Partial::merge(&parts).unwrap();
    assert!(distance(&merged.out, &whole.out) < 1e-5);
    assert!(distance(&merged.lse, &whole.lse) < 1e-5);
}

#[test]
fn mass_is_the_column_sum_of_the_probabilities() {
    for shape in shapes() {
        let (tokens, entries, d) = (70, 600, shape.head_dim);
        let q = random(shape.heads, tokens, d);
        let k = random(shape.kv_heads, entries, d);
        let lse = attend(&q, &k, &k, &shape, Visible::Causal).unwrap().lse;
        let mass = mass(&q, &k, &lse, &shape, Visible::Causal).unwrap();
        // Attention over one-hot values gives the probabilities themselves, a block of channels at a time.
        let eye = Tensor::eye(d, DType::F32, &Device::Cpu).unwrap();
        let mut want = vec![0.0; entries];
        for start in (0..entries).step_by(d) {
            let len = d.min(entries - start);
            let v =
                Tensor::zeros((2, shape.kv_heads, entries, d), DType::F32, &Device::Cpu).unwrap();
            let hot =
                eye.narrow(0, 0, len).unwrap().broadcast_as((2, shape.kv_heads, len, d)).unwrap();
            let v =
                v.slice_assign(&[0..2, 0..shape.kv_heads, start..start + len, 0..d], &hot).unwrap();
            let p = attend(&q, &k, &v, &shape, Visible::Causal).unwrap().out;
            let sums = p.sum(2).unwrap().get(1).unwrap().get(0).unwrap().to_vec1::<f32>().unwrap();
            want[start..start + len].copy_from_slice(&sums[..len]);
        }
        for (got, want) in mass[shape.heads].iter().zip(&want) {
            assert!((got - want).abs() < 1e-4, "{shape:?}: {got}, not {want}");
        }
    }
}

#[test]
fn a_store_holds_what_it_is_told_to_keep() {
    let shape = AttentionShape::new(4, 2, 32).unwrap();
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let mut store = DenseStore::new(shape, dtype).unwrap();
        let (k, v) = (random(2, 700, 32), random(2, 700, 32));
        store.append(&k.narrow(2, 0, 650).unwrap(), &v.narrow(2, 0, 650).unwrap()).unwrap();
        store.append(&k.narrow(2, 650, 50).unwrap(), &v.narrow(2, 650, 50).unwrap()).unwrap();
        assert_eq!(store.footprint().payload, 2 * 4 * 700 * 32 * dtype.size_in_bytes());
        // Every head keeps another part.
        let keep: Vec<Vec<u32>> =
            (0..4).map(|h| (0..700).filter(|e| e % (h + 2) == 0).collect()).collect();
        store.retain(&Selection::new(keep.clone())).unwrap();
        let one = AttentionShape { heads: 2, kv_heads: 1, ..shape };
        let q = random(4, 1, 32);
        let got = store.attend(&q, Visible::All).unwrap().out;
        for (h, keep) in keep.iter().enumerate() {
            let rows = Tensor::new(keep.as_slice(), &Device::Cpu).unwrap();
            let of = |x: &Tensor| {
                let head = x.narrow(0, h / 2, 1).unwrap().narrow(1, h % 2, 1).unwrap();
                head.contiguous().unwrap().index_select(&rows, 2).unwrap()
            };
            let query =
                |x: &Tensor| x.narrow(0, h / 2, 1).unwrap().narrow(1, h % 2 * 2, 2).unwrap();
            let want = ops::attend(&query(&q), &of(&k), &of(&v), &one, Visible::All).unwrap();
            assert!(distance(&query(&got), &want.out) < tolerance, "{dtype:?}, head {h}");
        }
    }
}

#[test]
fn misfits_are_named() {
    let shape = AttentionShape::new(4, 2, 32).unwrap();
    let message =
        |q: &Tensor, k: &Tensor| attend(q, k, k, &shape, Visible::Causal).unwrap_err().to_string();
    let expected = "q: expected [batch, 4, tokens, 32], got [2, 3, 1, 32]";
    assert_eq!(message(&random(3, 1, 32), &random(2, 1, 32)), expected);
    assert!(message(&random(4, 1, 32), &random(2, 1, 16)).starts_with("k: expected"));
    assert!(message(&random(4, 5, 32), &random(2, 4, 32)).contains("at least the 5"));
}
