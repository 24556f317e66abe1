//! Codes, scales and zero points against KIVI's published functions, and dequantized numbers
//! against the paper's FlexGen quantizer. The fixture is made by `fixtures/make.py`.

#![cfg(not(miri))] // too long for an interpreter, and full of files

use half::f16;
use kv_quant::{Axis, Bits, Packed, Scheme};
use safetensors::SafeTensors;

const CASES: [&str; 5] = ["normal", "outliers", "ties", "tiny", "large"];

struct Fixture(Vec<u8>);

impl Fixture {
    fn open() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/quant.safetensors");
        Self(std::fs::read(path).unwrap())
    }

    fn bytes(&self, name: &str) -> (Vec<usize>, Vec<u8>) {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = tensors.tensor(name).unwrap();
        (tensor.shape().to_vec(), tensor.data().to_vec())
    }

    fn halves(&self, name: &str) -> (usize, Vec<f16>) {
        let (shape, bytes) = self.bytes(name);
        let halves = bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
        (shape.last().copied().unwrap(), halves)
    }
}

fn bits() -> [Bits; 3] {
    [Bits::Two, Bits::Four, Bits::Eight]
}

#[test]
fn codes_scales_and_zeros_equal_kivis() {
    let fixture = Fixture::open();
    for case in CASES {
        let (columns, x) = fixture.halves(case);
        for bits in bits() {
            for group in [32, 64] {
                for (kind, along) in [("keys", Axis::Tokens), ("values", Axis::Channels)] {
                    let at = format!("{case}.{kind}.{}.{group}", bits.count());
                    let codes = fixture.bytes(&format!("{at}.codes")).1;
                    let scales = fixture.halves(&format!("{at}.scales")).1;
                    let zeros = fixture.halves(&format!("{at}.zeros")).1;
                    let scheme = Scheme::new(bits, along, group).unwrap();
                    for lanes in [Axis::Tokens, Axis::Channels] {
                        let packed = Packed::quantize(&x, columns, scheme, lanes).unwrap();
                        for (i, &code) in codes.iter().enumerate() {
                            let (row, column) = (i / columns, i % columns);
                            let g = match along {
                                Axis::Tokens => row / group * columns + column,
                                Axis::Channels => row * (columns / group) + column / group,
                            };
                            let what = format!("{at}: row {row}, column {column}");
                            assert_eq!(packed.code(row, column), Some(code), "{what}");
                            let params = packed.params(row, column);
                            assert_eq!(params, Some((scales[g], zeros[g])), "{what}");
                        }
                    }
                }
            }
        }
    }
}

/// That quantizer computes code * scale + zero in f16 with two roundings; ours once, in f32. The
/// same codes and scales in its order of arithmetic give its numbers bit for bit, and ours differ
/// by at most those two roundings. Its codes have no upper bound: if the smallest scales, after
/// rounding, are too small for their group, its codes exceed the largest, at which ours stop, like
/// KIVI's.
#[test]
fn numbers_equal_flexgens() {
    let fixture = Fixture::open();
    for case in CASES {
        let (columns, x) = fixture.halves(case);
        for bits in bits() {
            let (_, want) = fixture.halves(&format!("{case}.flexgen.{}", bits.count()));
            let scheme = Scheme::new(bits, Axis::Channels, 64).unwrap();
            let packed = Packed::quantize(&x, columns, scheme, Axis::Channels).unwrap();
            let mut ours = vec![0.0; x.len()];
            packed.dequantize(&mut ours).unwrap();
            for (i, want) in want.into_iter().enumerate() {
                let (row, column) = (i / columns, i % columns);
                let (scale, zero) = packed.params(row, column).unwrap();
                let code = f32::from(packed.code(row, column).unwrap());
                let half = |x: f32| f16::from_f32(x).to_f32();
                let unbound = half(half(x[i].to_f32() - zero.to_f32()) / scale.to_f32());
                if case == "tiny" && unbound.round_ties_even() > bits.max_code() as f32 {
                    assert_eq!(code, bits.max_code() as f32);
                    continue;
                }
                let product = f16::from_f32(code * scale.to_f32());
                let what = format!("{case}, {} bits: row {row}, column {column}", bits.count());
                assert_eq!(f16::from_f32(product.to_f32() + zero.to_f32()), want, "{what}");
                let rounding = f32::from(f16::EPSILON) / 2.0;
                let bound = rounding * (product.to_f32().abs() + want.to_f32().abs()) * 1.01 + 6e-8;
                assert!((ours[i] - want.to_f32()).abs() <= bound, "{what}");
            }
        }
    }
}
