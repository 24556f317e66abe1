//! Tiled attention against candle's operations, which build the whole score matrix.

use super::{Page, attend, attend_pages, attention_sums, ops};
use crate::{AttentionShape, AttentionState, AttentionSums, Batch, Mask};
use candle_core::{DType, Device, Tensor};

fn random(tokens: usize, heads: usize, d: usize) -> Tensor {
    Tensor::randn(0f32, 1., (tokens, heads, d), &Device::Cpu).unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

fn shapes() -> Vec<AttentionShape> {
    let plain = AttentionShape::new(6, 2, 64).unwrap();
    vec![
        plain,
        AttentionShape::new(4, 4, 80).unwrap(),
        AttentionShape { window: Some(100), ..plain },
        AttentionShape { window: Some(200), ..plain },
        AttentionShape { value_dim: 48, ..plain },
        AttentionShape { soft_cap: Some(5.0), ..AttentionShape::new(8, 1, 32).unwrap() },
    ]
}

/// Attention of one sequence by plain operations, over `[entries, kv_heads, channels]`.
fn plain(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> AttentionState {
    let by_head = |x: &Tensor| x.transpose(0, 1).unwrap().unsqueeze(0).unwrap();
    let (out, lse) = ops::attend(&by_head(q), &by_head(k), &by_head(v), shape, mask).unwrap();
    let back = |x: Tensor| x.squeeze(0).unwrap().transpose(0, 1).unwrap();
    AttentionState { out: back(out), lse: back(lse) }
}

/// Returns the rows of a tensor by head, `[heads][entries * channels]`.
fn rows(x: &Tensor) -> Vec<Vec<f32>> {
    let x = x.transpose(0, 1).unwrap().contiguous().unwrap();
    x.flatten_from(1).unwrap().to_vec2().unwrap()
}

/// Tiled attention over pages of the given length.
fn paged(
    batch: &Batch,
    q: &Tensor,
    kv: &[(Tensor, Tensor)],
    shape: &AttentionShape,
    mask: Mask<'_>,
    page: usize,
) -> AttentionState {
    let held: Vec<_> = kv.iter().map(|(k, v)| (rows(k), rows(v))).collect();
    let heads: Vec<Vec<Page<'_, f32>>> = held
        .iter()
        .flat_map(|(keys, values)| keys.iter().zip(values))
        .map(|(keys, values)| {
            let keys = keys.chunks(page * shape.head_dim);
            let pages = keys.zip(values.chunks(page * shape.value_dim));
            pages.map(|(keys, values)| Page { keys, values }).collect()
        })
        .collect();
    attend_pages(batch, q, &heads, shape, mask).unwrap()
}

#[test]
fn tiles_equal_the_whole_matrix() {
    for shape in shapes() {
        // One token over a long past (split over entries), a few tokens, a prompt of several tiles,
        // and more entries than queries: all in one batch, with pages of several lengths.
        let sizes = [(1, 1), (1, 1500), (3, 700), (300, 300), (90, 640)];
        let seqs: Vec<_> = (0..).zip(sizes).map(|(seq, (tokens, _))| (seq, tokens)).collect();
        let batch = Batch::new(&seqs).unwrap();
        let q = random(batch.tokens(), shape.heads, shape.head_dim);
        let kv = sizes.map(|(_, entries)| {
            let k = random(entries, shape.kv_heads, shape.head_dim);
            (k, random(entries, shape.kv_heads, shape.value_dim))
        });
        for (mask, page) in [(Mask::Full, 32), (Mask::Causal, 32), (Mask::Causal, 1000)] {
            let got = paged(&batch, &q, &kv, &shape, mask, page);
            for ((_, tokens), (k, v)) in batch.iter().zip(&kv) {
                let part = |x: &Tensor| x.narrow(0, tokens.start, tokens.len()).unwrap();
                let want = plain(&part(&q), k, v, &shape, mask);
                let case = format!("{shape:?}, {tokens:?}, {mask:?}, pages of {page}");
                assert!(distance(&part(&got.out), &want.out) < 1e-5, "{case}");
                assert!(distance(&part(&got.lse), &want.lse) < 1e-5, "{case}");
            }
        }
    }
}

#[test]
fn each_prompt_of_a_batch_attends_to_its_own_tokens() {
    for shape in shapes() {
        let batch = Batch::new(&[(5, 130), (2, 1), (9, 77)]).unwrap();
        let of = |heads, d| random(batch.tokens(), heads, d);
        let (q, k) = (of(shape.heads, shape.head_dim), of(shape.kv_heads, shape.head_dim));
        let v = of(shape.kv_heads, shape.value_dim);
        let got = attend(&batch, &q, &k, &v, &shape).unwrap();
        for (_, tokens) in batch.iter() {
            let part = |x: &Tensor| x.narrow(0, tokens.start, tokens.len()).unwrap();
            let want = plain(&part(&q), &part(&k), &part(&v), &shape, Mask::Causal);
            assert!(distance(&part(&got.out), &want.out) < 1e-5, "{shape:?}, {tokens:?}");
        }
    }
}

#[test]
fn parts_merge_into_the_whole() {
    let shape = AttentionShape::new(6, 2, 64).unwrap();
    let (q, k, v) = (random(9, 6, 64), random(400, 2, 64), random(400, 2, 64));
    let batch = Batch::single(0, 9).unwrap();
    let over = |start, len, mask| {
        let part = |x: &Tensor| x.narrow(0, start, len).unwrap();
        paged(&batch, &q, &[(part(&k), part(&v))], &shape, mask, 32)
    };
    let whole = over(0, 400, Mask::Causal);
    let parts = [(0, 150, Mask::Full), (150, 241, Mask::Full), (391, 9, Mask::Causal)];
    let parts = parts.map(|(start, len, mask)| over(start, len, mask));
    let merged = AttentionState::merge(&parts).unwrap();
    assert!(distance(&merged.out, &whole.out) < 1e-5);
    assert!(distance(&merged.lse, &whole.lse) < 1e-5);
}

#[test]
fn attention_sums_are_the_column_sums_of_the_probabilities() {
    for shape in shapes() {
        let (tokens, d) = (300, shape.value_dim);
        let batch = Batch::new(&[(1, 20), (0, tokens)]).unwrap();
        let q = random(batch.tokens(), shape.heads, shape.head_dim);
        let k = random(batch.tokens(), shape.kv_heads, shape.head_dim);
        let v = random(batch.tokens(), shape.kv_heads, d);
        let lse = attend(&batch, &q, &k, &v, &shape).unwrap().lse;
        let sums = attention_sums(&batch, &k, &batch, &q, &lse, &shape).unwrap();
        // Attention over one-hot values returns the probabilities themselves, one group of entries
        // at a time.
        let mut want = vec![0.0; tokens];
        for start in (0..tokens).step_by(d) {
            let hot = |t: usize, c: usize| if t == start + c { 1f32 } else { 0.0 };
            let entries = (0..tokens).flat_map(|t| (0..shape.kv_heads).map(move |_| t));
            let v: Vec<f32> = entries.flat_map(|t| (0..d).map(move |c| hot(t, c))).collect();
            let v = Tensor::from_vec(v, (tokens, shape.kv_heads, d), &Device::Cpu).unwrap();
            let own = |x: &Tensor| x.narrow(0, 20, tokens).unwrap();
            let out = plain(&own(&q), &own(&k), &v, &shape, Mask::Causal).out;
            let of_head = out.sum(0).unwrap().get(1).unwrap().to_vec1::<f32>().unwrap();
            let len = d.min(tokens - start);
            want[start..start + len].copy_from_slice(&of_head[..len]);
        }
        let of_head = |sums: &[AttentionSums], head: usize| {
            let (seq, head) = (head / shape.heads, head % shape.heads);
            sums[seq]
                .head(head / shape.heads_per_kv())
                .unwrap()
                .get(head % shape.heads_per_kv())
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        for (got, want) in of_head(&sums, shape.heads + 1).iter().zip(&want) {
            assert!((got - want).abs() < 1e-4, "{shape:?}: {got}, not {want}");
        }
        // Only the newest queries.
        let newest = Batch::new(&[(1, 1), (0, 3)]).unwrap();
        let rows = Tensor::new(&[19u32, 317, 318, 319], &Device::Cpu).unwrap();
        let part = |x: &Tensor| x.index_select(&rows, 0).unwrap();
        let few = attention_sums(&batch, &k, &newest, &part(&q), &part(&lse), &shape).unwrap();
        let total = of_head(&few, shape.heads).iter().sum::<f32>();
        assert!((total - 3.0).abs() < 1e-4, "{total}");
    }
}

#[test]
fn misfits_are_named() {
    let shape = AttentionShape::new(4, 2, 32).unwrap();
    let batch = Batch::single(3, 5).unwrap();
    let message = |q: &Tensor, k: &Tensor| attend(&batch, q, k, k, &shape).unwrap_err().to_string();
    let expected = "q: expected [tokens, 4, 32], got [5, 3, 32]";
    assert_eq!(message(&random(5, 3, 32), &random(5, 2, 32)), expected);
    assert!(message(&random(5, 4, 32), &random(5, 2, 16)).starts_with("k: expected"));
    assert!(message(&random(5, 4, 32), &random(4, 2, 32)).contains("the batch's 5"));
    let (q, k) = (random(5, 4, 32), random(4, 2, 32));
    let (keys, short) = (rows(&k), |rows: &Vec<Vec<f32>>, h: usize| rows[h].clone());
    let pages: Vec<_> = (0..2).map(|h| short(&keys, h)).collect();
    let pages: Vec<_> = pages.iter().map(|x| vec![Page { keys: x, values: x }]).collect();
    let error = attend_pages(&batch, &q, &pages, &shape, Mask::Causal).unwrap_err().to_string();
    assert!(error.contains("sequence 3") && error.contains("at least the 5"), "{error}");
    let f16 = k.to_dtype(DType::F16).unwrap();
    assert!(super::with_slice::<f32, _>(&f16, |_| Ok(())).is_err());
}
