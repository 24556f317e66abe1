//! Bad input to the slice API: an error that says what was expected, what came and where; never a panic; nothing changed.

use std::ops::Range;

use kv_quant::{
    Axis, Bits, Error, Flush, Format, Head, KeyBasis, Packed, Quantizer, Queries, Result, Rotary,
    Scheme, attend, mass,
};

fn scheme(along: Axis) -> Scheme {
    Scheme::new(Bits::Four, along, 32).unwrap()
}

fn kivi() -> Format {
    Format::kivi(Bits::Four, Bits::Four, 32, 64).unwrap()
}

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i as f32 * 0.37).sin()).collect()
}

fn head(d: usize, tokens: usize) -> Head {
    let mut head = Head::new(d, kivi()).unwrap();
    head.append(&numbers(tokens * d), &numbers(tokens * d)).unwrap();
    head
}

/// The message of a setting's or an argument's error.
fn message<T>(result: Result<T>) -> String {
    match result {
        Err(error @ (Error::Setting { .. } | Error::Mismatch { .. })) => error.to_string(),
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn settings_are_checked() {
    let bad_scheme = Scheme { group: 48, ..scheme(Axis::Channels) };
    let (tokens, channels) = (scheme(Axis::Tokens), scheme(Axis::Channels));
    let rotary = |frequencies: &[f64]| Ok(Rotary::new(frequencies, 0)?.into());
    for (got, want) in [
        (message(Bits::try_from(5)), "setting `bits`: expected 2, 3, 4 or 8, got 5"),
        (
            message(Scheme::new(Bits::Two, Axis::Tokens, 0)),
            "`group`: expected 32, 64 or 128, got 0",
        ),
        (message(Packed::new(32, 8, bad_scheme, Axis::Tokens)), "`group`"),
        (message(Packed::new(32, 0, channels, Axis::Tokens)), "`columns`: expected at least 1"),
        (message(Format::new(bad_scheme, channels, Flush::Never)), "got 48"),
        (message(Format::new(channels, tokens, Flush::Never)), "`values.along`: expected channels"),
        (message(Format::new(tokens, channels, Flush::Immediate)), "`flush`"),
        (message(Format::new(tokens, channels, Flush::Staggered(0))), "`residual`"),
        (
            message(Format::kivi(Bits::Two, Bits::Two, 64, 96)),
            "expected a positive multiple of 64, got 96",
        ),
        (message(Head::new(0, kivi())), "`head_dim`: expected at least 1, got 0"),
        (
            message(Head::new(64, kivi().with_basis(KeyBasis::BeforeRope))),
            "expected a rotary embedding",
        ),
        (
            message(rotary(&[1.0; 5]).and_then(|r| Head::before_rope(8, kivi(), r))),
            "expected at most head_dim = 8, got 10",
        ),
        (message(rotary(&[f64::NAN])), "`frequency`: expected a finite number, got NaN"),
    ] {
        assert!(got.contains(want), "{got:?} does not say {want:?}");
    }
}

#[test]
fn matrices_check_their_sizes() {
    let mut packed = Packed::new(40, 8, scheme(Axis::Tokens), Axis::Tokens).unwrap();
    let q = &mut Quantizer::default();
    assert!(message(packed.push(&numbers(12), q)).contains("whole rows of 8 numbers, got 12"));
    assert!(message(packed.push(&numbers(41 * 8), q)).contains("expected at most 40, got 41"));
    packed.push(&numbers(5 * 8), q).unwrap();
    assert!(message(packed.push(&numbers(8), q)).contains("a multiple of the group, 32, got 5"));
    assert!(message(packed.dequantize(&mut [0.0; 8])).contains("5 x 8 numbers, got 8"));
    assert_eq!((packed.rows(), packed.code(5, 0), packed.params(0, 8)), (5, None, None));
    // The range of a group is too large, rows counted from the first given; what was there stays.
    let mut packed = Packed::new(64, 2, scheme(Axis::Channels), Axis::Channels).unwrap();
    packed.push(&numbers(2), q).unwrap();
    let mut far = numbers(40 * 2);
    (far[70], far[71]) = (6e4, -6e4);
    let error = packed.push(&far, q).unwrap_err();
    assert_eq!(error, Error::OutOfRange { value: 120_000.0, row: 35, column: 0 });
    let mut back = [0.0; 2];
    packed.dequantize(&mut back).unwrap();
    assert_eq!(
        (back, packed.code(0, 1)),
        ([0.0, packed.params(0, 0).unwrap().0.to_f32() * 15.0], Some(15))
    );
}

#[test]
fn heads_stay_as_they_were() {
    let formats = [kivi(), Format::flexgen(Bits::Four, Bits::Four, 32).unwrap(), Format::f16()];
    for format in formats {
        let d = 16;
        let mut head = Head::new(d, format).unwrap();
        head.append(&numbers(50 * d), &numbers(50 * d)).unwrap();
        let before = (head.read(), head.bytes());
        let good = numbers(100 * d);
        let with = |x: f32| {
            let mut bad = good.clone();
            bad[70 * d + 3] = x;
            bad
        };
        assert!(message(head.append(&good[1..], &good[1..])).contains("whole rows of 16"));
        assert!(message(head.append(&good, &good[d..])).contains("1600 numbers, got 1584"));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1e5] {
            for (keys, values) in [(&with(bad), &good), (&good, &with(bad))] {
                let error = head.append(keys, values).unwrap_err();
                let (Error::NotFinite { row, column, .. } | Error::OutOfRange { row, column, .. }) =
                    error
                else {
                    panic!("{error}")
                };
                assert_eq!((row, column), (70, 3));
            }
        }
        // Within f16, but a group could be too wide: refused where it comes in, not when its group is full.
        let wide = head.append(&with(4e4), &good);
        assert_eq!(wide.is_err(), format != Format::f16());
        if wide.is_err() {
            assert_eq!(before, (head.read(), head.bytes()), "{format:?}");
        }
        head.append(&with(-32752.0), &with(32752.0)).unwrap();
        head.append(&with(32752.0), &with(-32752.0)).unwrap();
    }
}

#[test]
fn entries_to_keep_are_checked() {
    let mut head = head(8, 100);
    assert!(message(head.retain(&[3, 3])).contains("strictly increasing ones, got 3 before 3"));
    assert!(message(head.retain(&[3, 100])).contains("entries below 100, got 100"));
    assert_eq!(head.len(), 100);
    head.retain(&[]).unwrap();
    assert!(head.is_empty());
    assert!(message(head.retain(&[0])).contains("entries below 0"));
}

#[test]
fn queries_are_checked() {
    let heads = [head(8, 100), head(8, 100)];
    let q = numbers(4 * 3 * 8);
    let queries = Queries { data: &q, heads: 4, tokens: 3, scale: 1.0, soft_cap: None };
    let run = |heads: &[Head], batch, queries: &Queries<'_>, ranges: [Range<usize>; 3]| {
        message(attend(heads, batch, queries, |_, i| ranges[i].clone()))
    };
    let all = || [0..100, 0..100, 0..100];
    assert!(run(&[], 1, &queries, all()).contains("at least one, got 0"));
    let mixed = [head(8, 10), head(16, 10)];
    assert!(run(&mixed, 1, &queries, all()).contains("8 channels, as the first has, got 16"));
    for (batch, heads_of_entry) in [(0, 4), (1, 0), (1, 3), (3, 4), (usize::MAX, 4)] {
        let queries = Queries { heads: heads_of_entry, ..queries };
        assert!(run(&heads, batch, &queries, all()).starts_with("kv heads"), "{batch}");
    }
    let short = Queries { data: &q[1..], ..queries };
    assert!(run(&heads, 1, &short, all()).contains("4 heads x 3 tokens x 8, got 95"));
    let beyond = run(&heads, 1, &queries, [0..100, 0..100, 0..101]);
    assert!(beyond.contains("from 100 to 100, got 101 for query 2 and kv head 0"), "{beyond}");
    assert!(run(&heads, 1, &queries, [0..9, 0..8, 0..9]).contains("from 9 to 100, got 8"));
    let mut bad = q.clone();
    bad[5 * 8 + 1] = f32::NAN;
    let error = attend(&heads, 1, &Queries { data: &bad, ..queries }, |_, _| 0..1).unwrap_err();
    assert!(matches!(error, Error::NotFinite { row: 5, column: 1, .. }), "{error}");
    let lse = mass(&heads, 1, &queries, &[0.0; 11], |_, _| 0..100);
    assert!(message(lse).contains("1 x 4 x 3 numbers, got 11"));
    // Nothing to see is no error.
    let nothing = attend(&heads, 1, &queries, |_, _| 0..0).unwrap();
    assert!(nothing.out.iter().all(|&x| x == 0.0));
    assert!(nothing.lse.iter().all(|&x| x == f32::NEG_INFINITY));
    let none = Queries { data: &[], tokens: 0, ..queries };
    assert!(attend(&heads, 1, &none, |_, _| 0..100).unwrap().out.is_empty());
}
