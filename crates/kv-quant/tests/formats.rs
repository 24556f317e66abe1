//! Codes and scales of fp8, symmetric integers, TurboQuant and KVarN against public
//! implementations. The fixture is made by `fixtures/formats.py`.

#![cfg(not(miri))] // too long for an interpreter, and full of files

use half::f16;
use kv_quant::{Axis, Bits, Float8, Format, Packed, Scheme, StaticScale};
use safetensors::SafeTensors;

const CASES: [(&str, usize); 4] =
    [("normal.64", 64), ("outliers.64", 64), ("normal.128", 128), ("outliers.128", 128)];

struct Fixture(Vec<u8>);

impl Fixture {
    fn open() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/formats.safetensors");
        Self(std::fs::read(path).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.tensor(name).unwrap_or_else(|_| panic!("{name}")).data().to_vec()
    }

    fn halves(&self, name: &str) -> Vec<f16> {
        let bytes = self.bytes(name);
        bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name);
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }
}

fn packed(x: &[f16], columns: usize, scheme: Scheme) -> Packed {
    Packed::quantize(x, columns, scheme, scheme.axis).unwrap()
}

fn codes(packed: &Packed) -> Vec<u8> {
    let places = (0..packed.rows()).flat_map(|r| (0..packed.columns()).map(move |c| (r, c)));
    places.map(|(r, c)| packed.code(r, c).unwrap()).collect()
}

/// Returns a scale and a zero point for each row.
fn params(packed: &Packed) -> (Vec<f16>, Vec<f16>) {
    (0..packed.rows()).map(|row| packed.params(row, 0).unwrap()).unzip()
}

fn back(packed: &Packed) -> Vec<f32> {
    let mut back = vec![0.0; packed.rows() * packed.columns()];
    packed.dequantize(&mut back).unwrap();
    back
}

#[test]
fn float8_is_pytorchs_cast() {
    let fixture = Fixture::open();
    for (case, columns) in CASES {
        let x = fixture.halves(&format!("{case}.x"));
        for (name, kind) in [("e4m3", Float8::E4m3), ("e5m2", Float8::E5m2)] {
            let at = format!("{case}.{name}");
            let dynamic = packed(&x, columns, Scheme::float8(kind, None));
            assert_eq!(codes(&dynamic), fixture.bytes(&format!("{at}.codes")), "{at}");
            assert_eq!(params(&dynamic).0, fixture.halves(&format!("{at}.scales")), "{at}");
            assert_eq!(back(&dynamic), fixture.floats(&format!("{at}.back")), "{at}");
            let scale = StaticScale::new(0.25).unwrap();
            let with_static = packed(&x, columns, Scheme::float8(kind, Some(scale)));
            assert_eq!(codes(&with_static), fixture.bytes(&format!("{at}.static")), "{at}");
            assert_eq!(with_static.bytes().1, 0);
        }
    }
}

#[test]
fn symmetric_integers_are_ggmls() {
    let fixture = Fixture::open();
    for (case, columns) in CASES {
        let x = fixture.halves(&format!("{case}.x"));
        let packed = packed(&x, columns, Scheme::symmetric(Bits::Four, 32).unwrap());
        assert_eq!(codes(&packed), fixture.bytes(&format!("{case}.q4_0.codes")), "{case}");
        let scales = fixture.halves(&format!("{case}.q4_0.scales"));
        for (i, &scale) in scales.iter().enumerate() {
            let (row, column) = (i * 32 / columns, i * 32 % columns);
            assert_eq!(packed.params(row, column).unwrap(), (scale, f16::ZERO), "{case} {i}");
        }
    }
}

#[test]
fn turboquant_is_vllms() {
    let fixture = Fixture::open();
    for (case, columns) in CASES {
        let x = fixture.halves(&format!("{case}.x"));
        for bits in [Bits::Three, Bits::Four] {
            let at = |name: &str| format!("{case}.{name}.{}", bits.count());
            let keys = packed(&x, columns, Scheme::lloyd_max(bits, true).unwrap());
            let name = at("turboquant");
            assert_eq!(codes(&keys), fixture.bytes(&format!("{name}.codes")), "{name}");
            // The norm and its correction are rounded to f16 together here, and separately in the
            // reference.
            let want = fixture.floats(&format!("{name}.back"));
            for (row, want) in back(&keys).chunks(columns).zip(want.chunks(columns)) {
                let norm = want.iter().map(|x| x * x).sum::<f32>().sqrt();
                let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1.1e-3 * norm;
                assert!(row.iter().zip(want).all(close), "{name}");
            }
            let values = packed(&x, columns, Scheme::uniform(bits));
            let name = at("uniform");
            assert_eq!(codes(&values), fixture.bytes(&format!("{name}.codes")), "{name}");
            let (scales, zeros) = params(&values);
            assert_eq!(scales, fixture.halves(&format!("{name}.scales")), "{name}");
            assert_eq!(zeros, fixture.halves(&format!("{name}.zeros")), "{name}");
        }
    }
}

/// The reference uses logarithms and exponentials of another library, so a factor may differ in its
/// last place.
fn close(a: &[f16], b: &[f16]) -> bool {
    let last_place = |a: f16, b: f16| (a.to_bits() as i32 - b.to_bits() as i32).abs() <= 1;
    a.len() == b.len() && a.iter().zip(b).all(|(&a, &b)| last_place(a, b))
}

#[test]
fn kvarn_is_the_published_code() {
    let fixture = Fixture::open();
    let mut counts = [0; 2];
    for (case, columns) in CASES {
        let x = fixture.halves(&format!("{case}.x"));
        for (tile, bits) in [(64, Bits::Two), (64, Bits::Four), (128, Bits::Two), (128, Bits::Four)]
        {
            for (part, along) in [("keys", Axis::Tokens), ("values", Axis::Channels)] {
                let name = format!("{case}.kvarn.{tile}.{}.{part}", bits.count());
                let scheme = Scheme::variance_normalized(bits, along, tile).unwrap();
                let packed = packed(&x, columns, scheme);
                let tiles = (0..packed.rows()).step_by(tile);
                let of_channels = || tiles.clone().flat_map(|t| (0..columns).map(move |c| (t, c)));
                let of_tokens = || (0..packed.rows()).map(|row| (row, 0));
                let (scaled, other): (Vec<_>, Vec<_>) = match along {
                    Axis::Tokens => (of_channels().collect(), of_tokens().collect()),
                    Axis::Channels => (of_tokens().collect(), of_channels().collect()),
                };
                let params = scaled.iter().map(|&(r, c)| packed.params(r, c).unwrap());
                let (scales, zeros): (Vec<_>, Vec<_>) = params.unzip();
                let factors: Vec<_> =
                    other.iter().map(|&(r, c)| packed.factor(r, c).unwrap()).collect();
                assert!(close(&scales, &fixture.halves(&format!("{name}.scales"))), "{name}");
                assert!(close(&zeros, &fixture.halves(&format!("{name}.zeros"))), "{name}");
                assert!(close(&factors, &fixture.halves(&format!("{name}.factors"))), "{name}");
                let want = fixture.bytes(&format!("{name}.codes"));
                for (got, want) in codes(&packed).into_iter().zip(want) {
                    assert!(got.abs_diff(want) <= 1, "{name}");
                    counts[usize::from(got != want)] += 1;
                }
            }
        }
    }
    println!("{} codes are equal, {} differ", counts[0], counts[1]);
    assert!(counts[1] * 10_000 <= counts[0], "{counts:?}");
}

/// More bits never give a format with a higher loss, and no format has more bits than allowed.
#[test]
fn formats_for_bits_are_of_at_most_these_bits_and_in_order_of_their_loss() {
    for head_dim in [64, 80, 128, 256] {
        let mut last = 0.0;
        for tenths in 32..110 {
            let bits = f64::from(tenths) / 10.0;
            let own = Format::for_bits_per_number(bits, head_dim).unwrap();
            let own = own.bits_per_number(head_dim, head_dim).unwrap();
            assert!(own <= bits && own >= last, "{head_dim} channels, {bits} bits: {own}");
            last = own;
        }
        assert!(last >= 9.0);
    }
    let error = Format::for_bits_per_number(2.9, 64).unwrap_err().to_string();
    assert!(error.contains("at least 3") && error.contains("2.9"), "{error}");
    assert!(Format::for_bits_per_number(f64::NAN, 64).is_err());
    assert!(Format::for_bits_per_number(4.0, 0).is_err());
}
