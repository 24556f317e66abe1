//! Properties of the codec and of pools, on random shapes and numbers.

mod reference_impl;

use half::{bf16, f16};
use kv_quant::{
    Axis, Bits, Codes, Error, Float8, Flush, Format, Mask, Packed, Pool, Position, Quantizer,
    Queries, Scheme, StaticScale,
};
use proptest::prelude::*;
use reference_impl::{numbers, shape};

fn bits() -> impl Strategy<Value = Bits> {
    prop_oneof![Just(Bits::Two), Just(Bits::Three), Just(Bits::Four), Just(Bits::Eight)]
}

fn group() -> impl Strategy<Value = usize> {
    prop_oneof![Just(32usize), Just(64), Just(128)]
}

fn axis() -> impl Strategy<Value = Axis> {
    prop_oneof![Just(Axis::Tokens), Just(Axis::Channels)]
}

fn scheme() -> impl Strategy<Value = Scheme> {
    (bits(), axis(), group()).prop_map(|(b, a, g)| Scheme::new(b, a, g).unwrap())
}

fn format() -> impl Strategy<Value = Format> {
    let flush = prop_oneof![
        Just(Flush::Immediate),
        Just(Flush::Rolling(0)),
        Just(Flush::Rolling(40)),
        Just(Flush::Never),
        Just(Flush::Staggered(128)),
    ];
    let kivi = (scheme(), bits(), group(), flush, any::<[bool; 2]>()).prop_filter_map(
        "keys along tokens are not flushed at once",
        |(keys, bits, group, flush, [rotated_keys, rotated_values])| {
            let values = Scheme::new(bits, Axis::Channels, group).unwrap();
            let format = Format::new(keys, values, flush).ok()?;
            let format = if rotated_keys { format.with_rotated_keys() } else { format };
            Some(if rotated_values { format.with_rotated_values() } else { format })
        },
    );
    let flush =
        prop_oneof![Just(Flush::Immediate), Just(Flush::Rolling(40)), Just(Flush::Staggered(64))];
    let per_token = (along_channels(), along_channels(), flush)
        .prop_map(|(keys, values, flush)| Format::new(keys, values, flush).unwrap());
    let kvarn = (bits(), bits(), group(), prop_oneof![Just(0usize), Just(40)]).prop_map(
        |(keys, values, tile, residual)| {
            let format = Format::kvarn(keys, values, tile).unwrap();
            Format::new(format.keys(), format.values(), Flush::Rolling(residual)).unwrap()
        },
    );
    prop_oneof![2 => kivi, 2 => per_token, 1 => kvarn]
}

/// Returns schemes with codes of every kind that have scales per token.
fn along_channels() -> impl Strategy<Value = Scheme> {
    let few_bits = prop_oneof![Just(Bits::Two), Just(Bits::Three), Just(Bits::Four)];
    let groups = prop_oneof![Just(32usize), Just(64), Just(128), Just(Scheme::PER_TOKEN)];
    let kind = prop_oneof![Just(Float8::E4m3), Just(Float8::E5m2)];
    let scale = prop_oneof![Just(None), (0.01f32..10.0).prop_map(|s| StaticScale::new(s).ok())];
    let codes = prop_oneof![
        (bits(), groups.clone()).prop_map(|(b, g)| Scheme::symmetric(b, g).unwrap()),
        (bits(), groups).prop_map(|(b, g)| Scheme::new(b, Axis::Channels, g).unwrap()),
        bits().prop_map(Scheme::uniform),
        (few_bits, any::<bool>()).prop_map(|(b, nc)| Scheme::lloyd_max(b, nc).unwrap()),
        (kind, scale).prop_map(|(kind, scale)| Scheme::float8(kind, scale)),
    ];
    (codes, any::<bool>()).prop_map(|(s, rotated)| if rotated { s.rotated() } else { s })
}

/// Returns a matrix with a wide range of numbers: its rows, columns and data.
fn matrix(rows: usize) -> impl Strategy<Value = (usize, Vec<f32>)> {
    let size = (1..=rows, 1usize..70, -6i32..5);
    size.prop_flat_map(|(rows, columns, exponent)| {
        let number = (-1000i32..=1000).prop_map(move |x| x as f32 * 10f32.powi(exponent - 3));
        (Just(columns), prop::collection::vec(number, rows * columns))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 96 }, ..Default::default() })]

    #[test]
    fn dequantized_numbers_are_within_half_a_step((columns, x) in matrix(80), scheme in scheme(), lanes in axis()) {
        let packed = Packed::quantize(&x, columns, scheme, lanes).unwrap();
        let mut back = vec![0.0; x.len()];
        packed.dequantize(&mut back).unwrap();
        for (i, (&x, back)) in x.iter().zip(back).enumerate() {
            let (row, column) = (i / columns, i % columns);
            let (scale, zero) = packed.params(row, column).unwrap();
            let x = f16::from_f32(x).to_f32();
            // In addition to half a step: the scale's rounding shifts the last code by up to
            // max_code / 2 units in its last place, and the difference and the quotient are rounded
            // to f16 before they become a code.
            let (scale, largest) = (scale.to_f32(), scheme.bits.max_code() as f32);
            let ulp = |x: f32| (x * f32::from(f16::EPSILON)).max(6e-8);
            let slack = largest * ulp(scale) / 2.0 + ulp((x - zero.to_f32()).abs()) + ulp(largest) * scale / 2.0;
            prop_assert!((x - back).abs() <= scale / 2.0 + slack, "{x} -> {back}, scale {scale}");
        }
    }

    /// The error of numbers along channels is within the resolution of their codes: half a step for
    /// integers, half the distance of adjacent numbers for floating point.
    #[test]
    fn dequantized_numbers_are_within_the_resolution_of_their_codes((columns, x) in matrix(40), scheme in along_channels(), lanes in axis()) {
        let mut plain = scheme;
        plain.rotated = false;
        let packed = Packed::quantize(&x, columns, plain, lanes).unwrap();
        let mut back = vec![0.0; x.len()];
        packed.dequantize(&mut back).unwrap();
        for (i, (&x, back)) in x.iter().zip(back).enumerate() {
            let (scale, _) = packed.params(i / columns, i % columns).unwrap();
            let (x, scale) = (f16::from_f32(x).to_f32(), scale.to_f32().abs());
            let steps = plain.bits.max_code() as f32;
            // The scale is rounded to f16, whose smallest numbers are 6e-8 apart.
            let rounding = steps * (scale * 1e-3).max(6e-8) + x.abs() * 1e-3;
            let bound = match plain.codes {
                Codes::Float8 { kind, scale: static_scale } => {
                    let scale = static_scale.map_or(scale, StaticScale::get);
                    let (relative, least) = match kind {
                        Float8::E4m3 => (1.0 / 16.0, 1.0 / 1024.0),
                        Float8::E5m2 => (1.0 / 8.0, 1.0 / 131_072.0),
                        other => panic!("the bound of {other:?}"),
                    };
                    let saturated = if static_scale.is_some() { x.abs() - kind.max() * scale } else { 0.0 };
                    let near = (x.abs() * relative).max(least * scale).max(saturated);
                    near + if static_scale.is_some() { 0.0 } else { 6e-8 * kind.max() }
                }
                // Symmetric codes reach half a step less far on the side opposite to the largest
                // magnitude.
                Codes::Symmetric => scale + rounding,
                Codes::LloydMax { .. } => 12.0 * scale + rounding,
                _ => scale / 2.0 + rounding,
            };
            prop_assert!((x - back).abs() <= bound * 1.01, "{x} -> {back}, scale {scale}, {plain:?}");
        }
    }

    /// A rotation preserves the norm: the error equals that of the rotated rows' codes.
    #[test]
    fn errors_of_rotated_rows_equal_those_of_their_codes((columns, x) in matrix(40), scheme in along_channels(), lanes in axis()) {
        let packed = Packed::quantize(&x, columns, scheme.rotated(), lanes).unwrap();
        let mut back = vec![0.0; x.len()];
        packed.dequantize(&mut back).unwrap();
        let block = 1 << columns.trailing_zeros();
        let rotate = |x: &[f32]| -> Vec<f64> {
            x.chunks(block).flat_map(|x| (0..block).map(|i| {
                let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                let sum: f64 = x.iter().enumerate().map(|(j, &x)| sign(j) * f64::from(f16::from_f32(x).to_f32())).sum();
                sum / (block as f64).sqrt()
            }).collect::<Vec<_>>()).collect()
        };
        let mut of_rotated = scheme;
        of_rotated.rotated = false;
        let narrow: Vec<f32> = rotate(&x).iter().map(|&x| x as f32).collect();
        let of_rotated = Packed::quantize(&narrow, columns, of_rotated, lanes).unwrap();
        let mut rotated_back = vec![0.0; x.len()];
        of_rotated.dequantize(&mut rotated_back).unwrap();
        let again: Vec<f64> = rotate(&back);
        let largest = narrow.iter().fold(0f32, |a, x| a.max(x.abs()));
        for (a, b) in again.iter().zip(&rotated_back) {
            // The numbers are rounded to f16 once more here, so a code may differ by one.
            let step = largest * 2.8 / scheme.bits.max_code().min(7) as f32;
            prop_assert!((*a as f32 - b).abs() <= step + 1e-3, "{a} {b}");
        }
    }

    #[test]
    fn packing_is_a_bijection(codes in prop::collection::vec(0u8..=255, 64 * 33), bits in bits(), lanes in axis()) {
        // Codes that equal the numbers: with 0 and the largest code in each group the scale is 1.
        let largest = bits.max_code() as u8;
        let (rows, columns) = (64, 33);
        let mut x: Vec<f32> = codes.iter().map(|c| f32::from(c & largest)).collect();
        for row in 0..rows {
            x[row * columns] = 0.0;
            x[row * columns + 1] = f32::from(largest);
            (x[row * columns + 32], x[row * columns + 31]) = (0.0, f32::from(largest));
        }
        let scheme = Scheme::new(bits, Axis::Channels, 64).unwrap();
        let packed = Packed::quantize(&x, columns, scheme, lanes).unwrap();
        for (i, &x) in x.iter().enumerate() {
            prop_assert_eq!(packed.code(i / columns, i % columns), Some(x as u8));
        }
    }

    #[test]
    fn a_constant_group_is_exact(x in -60000f32..60000.0, (columns, of) in matrix(40), scheme in scheme(), lanes in axis()) {
        let constant = vec![x; of.len()];
        let packed = Packed::quantize(&constant, columns, scheme, lanes).unwrap();
        let mut back = vec![0.0; of.len()];
        packed.dequantize(&mut back).unwrap();
        prop_assert!(back.iter().all(|&b| b == f16::from_f32(x).to_f32()));
    }

    #[test]
    fn bad_numbers_are_named(
        (columns, x) in matrix(40), at in any::<prop::sample::Index>(), scheme in scheme(),
        bad in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(1e6)],
    ) {
        let (at, mut x) = (at.index(x.len()), x);
        x[at] = bad;
        let (want_row, want_column) = (at / columns, at % columns);
        match Packed::quantize(&x, columns, scheme, Axis::Tokens) {
            Err(Error::NotFinite { value, at: Position::Matrix { row, column } }) => {
                prop_assert!(!bad.is_finite() && (value == bad || bad.is_nan()));
                prop_assert_eq!((row, column), (want_row, want_column));
            }
            Err(Error::OutOfRange { at: Position::Matrix { row, column }, .. }) => {
                prop_assert!(bad.is_finite());
                prop_assert_eq!((row, column), (want_row, want_column));
            }
            other => prop_assert!(false, "{other:?}"),
        }
        let halves: Vec<f16> = x.iter().map(|&x| f16::from_f32(x)).collect();
        prop_assert!(Packed::quantize(&halves, columns, scheme, Axis::Tokens).is_err());
    }

    #[test]
    fn rows_one_by_one_equal_rows_at_once((columns, x) in matrix(60), bits in bits(), group in group(), lanes in axis()) {
        let scheme = Scheme::new(bits, Axis::Channels, group).unwrap();
        let once = Packed::quantize(&x, columns, scheme, lanes).unwrap();
        let mut steps = Packed::new(x.len() / columns, columns, scheme, lanes).unwrap();
        for row in x.chunks(columns) {
            steps.push(row, &mut Quantizer::default()).unwrap();
        }
        prop_assert_eq!(once, steps);
    }

    #[test]
    fn all_number_formats_agree((columns, x) in matrix(40), scheme in scheme(), lanes in axis()) {
        let narrow: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
        let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
        let halves: Vec<f16> = wide.iter().map(|&x| f16::from_f32(x)).collect();
        let packed = Packed::quantize(&wide, columns, scheme, lanes).unwrap();
        prop_assert_eq!(&packed, &Packed::quantize(&narrow, columns, scheme, lanes).unwrap());
        prop_assert_eq!(&packed, &Packed::quantize(&halves, columns, scheme, lanes).unwrap());
    }
}

/// Returns a pool of one kv head with a sequence of `tokens` tokens.
fn pool(format: Format, d: usize, v: usize, tokens: usize) -> Pool {
    let mut pool = Pool::new(shape(1, d, v), format).unwrap();
    pool.append(&[1], &[0, tokens], &numbers(1, tokens * d), &numbers(2, tokens * v)).unwrap();
    pool
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 48 }, ..Default::default() })]

    #[test]
    fn tokens_one_by_one_equal_tokens_at_once(format in format(), tokens in 1usize..300, d in 1usize..40, v in 1usize..40) {
        let once = pool(format, d, v, tokens);
        let mut steps = Pool::new(shape(1, d, v), format).unwrap();
        let (keys, values) = (numbers(1, tokens * d), numbers(2, tokens * v));
        for (k, v) in keys.chunks(d).zip(values.chunks(v)) {
            steps.append(&[1], &[0, 1], k, v).unwrap();
        }
        prop_assert_eq!(once.read(1, 0).unwrap(), steps.read(1, 0).unwrap());
        let bytes = |pool: &Pool| (pool.footprint().codes, pool.footprint().residual);
        prop_assert_eq!(bytes(&once), bytes(&steps));
    }

    #[test]
    fn fused_attention_equals_dequantize_then_attend(
        format in format(), tokens in 1usize..400, d in 1usize..100, v in 1usize..100, group in 1usize..6,
        queries in 1usize..4, keep in 1u32..5,
    ) {
        let mut pool = pool(format, d, v, tokens);
        pool.retain(1, &[(0..tokens as u32).filter(|e| e % 5 < keep).collect()]).unwrap();
        let (len, scale) = (pool.lens(1).unwrap()[0], (d as f32).powf(-0.5));
        let q = numbers(5, group * queries * d);
        let all = Queries { data: &q[..], heads: group, scale, soft_cap: Some(30.0), window: None };
        let got = pool.attend(&all, &[1], &[0, queries], Mask::Full).unwrap();
        let held = pool.read(1, 0).unwrap();
        for (row, q) in q.chunks(d).enumerate() {
            let (want, lse) = reference_impl::attend(q, &held, v, 0..len, scale, Some(30.0));
            prop_assert!(reference_impl::close(&got.out[row * v..][..v], &want));
            prop_assert!((f64::from(got.lse[row]) - lse).abs() < 1e-3);
        }
        // Sums are of probabilities: those of each query sum to 1.
        let sums = pool.attention_sums(&all, &got.lse, &[1], &[0, queries], Mask::Full).unwrap();
        for of_head in sums {
            prop_assert_eq!(of_head.len(), len);
            prop_assert!((of_head.iter().sum::<f32>() - queries as f32).abs() < 1e-2);
        }
    }

    #[test]
    fn retained_entries_are_unchanged(format in format(), tokens in 1usize..300, keep in prop::collection::vec(any::<bool>(), 300)) {
        let d = 24;
        let mut pool = pool(format, d, d, tokens);
        let (keys, values) = pool.read(1, 0).unwrap();
        let keep: Vec<u32> = (0..tokens as u32).filter(|&e| keep[e as usize]).collect();
        pool.retain(1, std::slice::from_ref(&keep)).unwrap();
        let rows = |x: &[f32]| -> Vec<f32> {
            keep.iter().flat_map(|&e| x[e as usize * d..][..d].to_vec()).collect()
        };
        prop_assert_eq!(pool.read(1, 0).unwrap(), (rows(&keys), rows(&values)));
        // Later tokens are stored correctly.
        pool.append(&[1], &[0, 150], &numbers(8, 150 * d), &numbers(9, 150 * d)).unwrap();
        prop_assert_eq!(pool.lens(1).unwrap()[0], keep.len() + 150);
        if matches!(format.flush(), Flush::Immediate | Flush::Never) {
            prop_assert_eq!(&pool.read(1, 0).unwrap().0[..keep.len() * d], rows(&keys));
        }
    }
}
