//! Bad input to the slice API gives an error with the expected and actual value and the location.
//! It never panics, and nothing changes.

use kv_quant::{
    Axis, Bits, Error, Float8, Flush, Format, KeyBasis, Mask, Packed, Pool, PoolShape, Position,
    Quantizer, Queries, Result, Rotary, Scheme, StaticScale,
};

fn with(mut scheme: Scheme, change: impl FnOnce(&mut Scheme)) -> Scheme {
    change(&mut scheme);
    scheme
}

fn scheme(along: Axis) -> Scheme {
    Scheme::new(Bits::Four, along, 32).unwrap()
}

fn kivi() -> Format {
    Format::kivi(Bits::Four, Bits::Four, 32, 64).unwrap()
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn shape(head_dim: usize) -> PoolShape {
    PoolShape { kv_heads: 2, head_dim, value_dim: head_dim / 2 }
}

/// Returns a pool with two sequences of 100 tokens, 7 and 8.
fn pool() -> Pool {
    let mut pool = Pool::new(shape(8), kivi()).unwrap();
    let (k, v) = (numbers(200 * 2 * 8), numbers(200 * 2 * 4));
    pool.append(&[7, 8], &[0, 100, 200], &k, &v).unwrap();
    pool
}

/// Returns the message of a setting's or an argument's error.
fn message<T>(result: Result<T>) -> String {
    match result {
        Err(error @ (Error::Setting { .. } | Error::Mismatch { .. })) => error.to_string(),
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn settings_are_checked() {
    let normalized = Scheme::variance_normalized(Bits::Two, Axis::Channels, 64).unwrap();
    let float8 = Scheme::float8(Float8::E4m3, None);
    let bad_scheme = with(scheme(Axis::Channels), |s| s.group = 48);
    let (tokens, channels) = (scheme(Axis::Tokens), scheme(Axis::Channels));
    let rotary = |frequencies: &[f64]| Ok(Rotary::new(frequencies, 0)?.into());
    for (got, want) in [
        (message(Bits::try_from(5)), "setting `bits`: expected 2, 3, 4 or 8, got 5"),
        (
            message(Scheme::new(Bits::Two, Axis::Tokens, 0)),
            "`group`: expected 32, 64, 128, or 256 along channels, got 0",
        ),
        (message(Packed::new(32, 8, bad_scheme, Axis::Tokens)), "`group`"),
        (message(Packed::new(32, 0, channels, Axis::Tokens)), "`columns`: expected at least 1"),
        (message(Format::new(bad_scheme, channels, Flush::Never)), "got 48"),
        (message(Format::new(channels, tokens, Flush::Never)), "`values.axis`: expected channels"),
        (message(Format::new(tokens, channels, Flush::Immediate)), "`flush`"),
        (message(Format::new(tokens, channels, Flush::Staggered(0))), "`residual`"),
        (
            message(Format::kivi(Bits::Two, Bits::Two, 64, 96)),
            "expected a positive multiple of 64, got 96",
        ),
        (message(Pool::new(shape(0), kivi())), "`head_dim`: expected at least 1, got 0"),
        (message(Pool::new(shape(1), kivi())), "`value_dim`: expected at least 1, got 0"),
        (
            message(Pool::new(PoolShape { kv_heads: 0, ..shape(8) }, kivi())),
            "`kv_heads`: expected at least 1, got 0",
        ),
        (
            message(Pool::new(shape(64), kivi().with_key_basis(KeyBasis::BeforeRope))),
            "expected a rotary embedding",
        ),
        (
            message(rotary(&[1.0; 5]).and_then(|r| Pool::before_rope(shape(8), kivi(), r))),
            "expected at most head_dim = 8, got 10",
        ),
        (
            message(
                rotary(&[1.0])
                    .and_then(|r| Pool::before_rope(shape(8), kivi().with_rotated_keys(), r)),
            ),
            "`keys`: expected asymmetric integers",
        ),
        (message(Scheme::lloyd_max(Bits::Eight, true)), "`bits`: expected 2, 3 or 4"),
        (message(Scheme::symmetric(Bits::Four, 48)), "`group`"),
        (
            message(Packed::new(32, 8, with(float8, |s| s.bits = Bits::Four), Axis::Tokens)),
            "`bits`: expected 8",
        ),
        (
            message(Packed::new(
                32,
                8,
                with(float8, |s| (s.axis, s.group) = (Axis::Tokens, 32)),
                Axis::Tokens,
            )),
            "`axis`: expected channels",
        ),
        (message(Scheme::new(Bits::Four, Axis::Tokens, 256)), "`group`"),
        (message(Format::kvarn(Bits::Four, Bits::Two, 256)), "`group`"),
        (message(StaticScale::new(f32::NAN)), "`scale`: expected one between"),
        (message(StaticScale::new(-1.0)), "`scale`: expected one between"),
        (message(Format::new(tokens, normalized, Flush::Rolling(0))), "`flush`"),
        (message(Format::new(channels, normalized, Flush::Immediate)), "`flush`"),
        (message(rotary(&[f64::NAN])), "`frequency`: expected a finite number, got NaN"),
    ] {
        assert!(got.contains(want), "{got:?} does not say {want:?}");
    }
}

#[test]
fn rotated_numbers_are_within_range() {
    // The rotation of equal numbers gathers them in the first channel of their block: 8 times as
    // large, for 64 channels.
    let of = |x: f32| -> Vec<f32> { (0..100 * 64).map(|i| if i < 64 { 1.0 } else { x }).collect() };
    let rotated = scheme(Axis::Channels).rotated();
    let quantize = |x: &[f32]| Packed::quantize(x, 64, rotated, Axis::Tokens);
    quantize(&of(4000.0)).unwrap();
    let at = Position::Matrix { row: 1, column: 0 };
    assert_eq!(quantize(&of(5000.0)), Err(Error::OutOfRange { value: 40000.0, at }));
    let format = Format::rotated_symmetric(Bits::Four, Bits::Four);
    let shape = PoolShape { kv_heads: 2, head_dim: 64, value_dim: 64 };
    let mut pool = Pool::new(shape, format).unwrap();
    let error = pool.append(&[3], &[0, 50], &of(1.0), &of(5000.0)).unwrap_err();
    let Error::OutOfRange { at: Position::Sequence { of, token, head, channel, .. }, .. } = error
    else {
        panic!("{error}")
    };
    assert_eq!((of, token, head, channel), ("values", 0, 1, 0));
    assert_eq!(pool.seqs().len(), 0);
}

#[test]
fn matrices_check_their_sizes() {
    let mut packed = Packed::new(40, 8, scheme(Axis::Tokens), Axis::Tokens).unwrap();
    let q = &mut Quantizer::default();
    assert!(message(packed.push(&numbers(12), q)).contains("whole rows of 8 numbers, got 12"));
    assert!(message(packed.push(&numbers(41 * 8), q)).contains("expected at most 40, got 41"));
    packed.push(&numbers(5 * 8), q).unwrap();
    assert!(
        message(packed.push(&numbers(8), q))
            .contains("a multiple of 32, which are quantized together, got 5")
    );
    assert!(message(packed.dequantize(&mut [0.0; 8])).contains("5 x 8 numbers, got 8"));
    assert_eq!((packed.rows(), packed.code(5, 0), packed.params(0, 8)), (5, None, None));
    // The range of a group is too large; the row is relative to the first given. Earlier rows stay.
    let mut packed = Packed::new(64, 2, scheme(Axis::Channels), Axis::Channels).unwrap();
    packed.push(&numbers(2), q).unwrap();
    let mut far = numbers(40 * 2);
    (far[70], far[71]) = (6e4, -6e4);
    let error = packed.push(&far, q).unwrap_err();
    let at = Position::Matrix { row: 35, column: 0 };
    assert_eq!(error, Error::OutOfRange { value: 120_000.0, at });
    let mut back = [0.0; 2];
    packed.dequantize(&mut back).unwrap();
    assert_eq!(
        (back, packed.code(0, 1)),
        ([0.0, packed.params(0, 0).unwrap().0.to_f32() * 15.0], Some(15))
    );
}

#[test]
fn sequences_are_unchanged_after_an_error() {
    let formats = [kivi(), Format::flexgen(Bits::Four, Bits::Four, 32).unwrap(), Format::f16()];
    for format in formats {
        let mut pool = Pool::new(shape(16), format).unwrap();
        pool.append(&[3], &[0, 50], &numbers(50 * 32), &numbers(50 * 16)).unwrap();
        let before = (pool.read(3, 1).unwrap(), pool.footprint());
        let (cu, keys, values) = ([0, 40, 100], numbers(100 * 32), numbers(100 * 16));
        let with = |x: &[f32], columns: usize, bad: f32| {
            let mut x = x.to_vec();
            // Token 30 of the second sequence, kv head 1, channel 3.
            x[(70 * 2 + 1) * columns + 3] = bad;
            x
        };
        let short = pool.append(&[3, 4], &cu, &keys[1..], &values);
        assert!(message(short).contains("100 tokens x 2 kv heads x 16, got 3199"));
        let short = pool.append(&[3, 4], &cu, &keys, &values[16..]);
        assert!(message(short).contains("100 tokens x 2 kv heads x 8, got 1584"));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e5] {
            for (of, keys, values) in [
                ("keys", &with(&keys, 16, bad), &values),
                ("values", &keys, &with(&values, 8, bad)),
            ] {
                let error = pool.append(&[3, 4], &cu, keys, values).unwrap_err();
                let text = format!("{of} of sequence 4: token 30, head 1, channel 3");
                assert!(error.to_string().contains(&text), "{error}");
                let (Error::NotFinite { at, .. } | Error::OutOfRange { at, .. }) = error else {
                    panic!("{error}")
                };
                let want = Position::Sequence { of, seq: 4, token: 30, head: 1, channel: 3 };
                assert_eq!(at, want);
            }
        }
        // Representable in f16, but the range of a group could become too large: refused on append,
        // not when the group is full.
        let wide = pool.append(&[3, 4], &cu, &with(&keys, 16, 4e4), &values);
        assert_eq!(wide.is_err(), format != Format::f16());
        if wide.is_err() {
            assert_eq!(before, (pool.read(3, 1).unwrap(), pool.footprint()), "{format:?}");
            assert_eq!(pool.lens(4), None);
        }
        for x in [-32752.0, 32752.0] {
            pool.append(&[3, 4], &cu, &with(&keys, 16, x), &with(&values, 8, -x)).unwrap();
        }
    }
}

#[test]
fn batches_are_checked() {
    let mut pool = pool();
    let (k, v) = (numbers(10 * 16), numbers(10 * 8));
    for (seqs, cu, want) in [
        (&[7, 8][..], &[0, 10][..], "cu_seqlens: expected 3, got 2"),
        (&[7], &[], "cu_seqlens: expected 2, got 0"),
        (&[7], &[1, 10], "expected 0 at its beginning, got 1"),
        (&[7, 8], &[0, 11, 10], "never decrease, got 11 before 10"),
        (&[7, 7], &[0, 5, 10], "expected each once, got 7 twice"),
        (&[7], &[0, usize::MAX], "expected at most 4294967295 tokens, got"),
    ] {
        let got = message(pool.append(seqs, cu, &k, &v));
        assert!(got.contains(want), "{got:?} does not say {want:?}");
        assert!(!pool.can_append(seqs, cu));
        let q = numbers(10 * 32);
        let q = Queries { data: &q[..], heads: 4, scale: 1.0, soft_cap: None, window: None };
        let got = message(pool.attend(&q, seqs, cu, Mask::Full));
        assert!(got.contains(want), "{got:?} does not say {want:?}");
    }
    for (lists, want) in [
        (vec![vec![]], "selections of tokens: expected 2, got 1"),
        (vec![vec![1, 1], vec![]], "strictly increasing numbers, got 1 before 1"),
        (vec![vec![], vec![10]], "numbers below 10, got 10"),
    ] {
        let got = message(pool.append_selected(&[7], &[0, 10], &k, &v, &lists));
        assert!(got.contains(want), "{got:?} does not say {want:?}");
    }
    assert_eq!(pool.lens(7), Some(vec![100, 100]));
}

#[test]
fn entries_to_keep_are_checked() {
    let mut pool = pool();
    let run =
        |pool: &mut Pool, keep: [&[u32]; 2]| message(pool.retain(7, &keep.map(<[u32]>::to_vec)));
    assert!(run(&mut pool, [&[3, 3], &[]]).contains("strictly increasing numbers, got 3 before 3"));
    assert!(run(&mut pool, [&[], &[3, 100]]).contains("numbers below 100, got 100"));
    assert!(message(pool.retain(7, &[vec![]])).contains("expected 2, got 1"));
    assert_eq!(pool.retain(9, &[vec![], vec![]]), Err(Error::UnknownSequence(9)));
    assert_eq!(pool.lens(7), Some(vec![100, 100]));
    pool.retain(7, &[vec![], vec![4]]).unwrap();
    assert_eq!(pool.lens(7), Some(vec![0, 1]));
    assert!(run(&mut pool, [&[0], &[]]).contains("numbers below 0"));
    assert!(message(pool.truncate(7, 1)).contains("at most the 0 of kv head 0, got 1"));
    assert!(message(pool.read(7, 2)).contains("kv head: expected below 2, got 2"));
    assert_eq!(pool.read(9, 0), Err(Error::UnknownSequence(9)));
    // The position of a key before RoPE is its index.
    let rotary = Rotary::new(&[1.0], 0).unwrap().into();
    let mut rotated = Pool::before_rope(shape(8), kivi(), rotary).unwrap();
    rotated.append(&[1], &[0, 5], &numbers(5 * 16), &numbers(5 * 8)).unwrap();
    let dropped = rotated.retain(1, &[vec![0, 1, 2, 3, 4], vec![1]]);
    assert!(message(dropped).contains("all 5, for keys packed before RoPE"));
}

#[test]
fn queries_are_checked() {
    let pool = pool();
    let q = numbers(5 * 4 * 8);
    let queries = Queries { data: &q[..], heads: 4, scale: 1.0, soft_cap: None, window: None };
    fn run_on(pool: &Pool, queries: &Queries<'_>, mask: Mask<'_>) -> String {
        message(pool.attend(queries, &[7, 8], &[0, 2, 5], mask))
    }
    let run = |queries: &Queries<'_>, mask: Mask<'_>| run_on(&pool, queries, mask);
    for heads in [0, 1, 3, usize::MAX] {
        let queries = Queries { heads, ..queries };
        assert!(
            run(&queries, Mask::Full).starts_with("query heads: expected a multiple"),
            "{heads}"
        );
    }
    let short = Queries { data: &q[1..], ..queries };
    assert!(run(&short, Mask::Full).contains("5 tokens x 4 heads x 8, got 159"));
    let mut bad = q.clone();
    bad[(3 * 4 + 2) * 8 + 1] = f32::NAN;
    let bad = Queries { data: &bad[..], ..queries };
    let Err(Error::NotFinite { at, .. }) = pool.attend(&bad, &[7, 8], &[0, 2, 5], Mask::Full)
    else {
        panic!("NaN was taken")
    };
    let want = Position::Sequence { of: "queries", seq: 8, token: 1, head: 2, channel: 1 };
    assert_eq!(at, want);
    let lists = |list: &[std::ops::Range<usize>]| vec![vec![], vec![], list.to_vec(), vec![]];
    for (lists, want) in [
        (vec![vec![]; 3], "lists of entries: expected 4, got 3"),
        (lists(&[3..9, 8..10]), "within 9..100, got 8..10"),
        (lists(&[3..9, 99..101]), "within 9..100, got 99..101"),
        (lists(std::slice::from_ref(&(5..5))), "got 5..5"),
    ] {
        let got = run(&queries, Mask::Entries(&lists));
        assert!(got.contains(want), "{got:?} does not say {want:?}");
    }
    let many = numbers(101 * 4 * 8);
    let many = Queries { data: &many[..], ..queries };
    let got = message(pool.attend(&many, &[7], &[0, 101], Mask::Causal));
    assert!(got.contains("at least the 101 tokens of its queries, got 100"), "{got}");
    let sums = pool.attention_sums(&queries, &[0.0; 19], &[7, 8], &[0, 2, 5], Mask::Full);
    assert!(message(sums).contains("lse: expected 20, got 19"));
    let (mut out, mut lse) = (vec![0f32; 80], vec![0.0; 20]);
    let batch = (&[7, 8], &[0, 2, 5]);
    let short = pool.attend_into(&queries, batch.0, batch.1, Mask::Full, &mut out[1..], &mut lse);
    assert!(message(short).contains("output: expected 80, got 79"));
    let short = pool.attend_into(&queries, batch.0, batch.1, Mask::Full, &mut out, &mut lse[1..]);
    assert!(message(short).contains("lse: expected 20, got 19"));
    // A query that sees nothing is not an error.
    let nothing = pool.attend(&queries, &[7, 8], &[0, 2, 5], Mask::Entries(&vec![vec![]; 4]));
    let nothing = nothing.unwrap();
    assert!(nothing.out.iter().all(|&x| x == 0.0));
    assert!(nothing.lse.iter().all(|&x| x == f32::NEG_INFINITY));
    let none = Queries { data: &[], ..queries };
    assert!(pool.attend(&none, &[7, 8], &[0, 0, 0], Mask::Causal).unwrap().out.is_empty());
}
