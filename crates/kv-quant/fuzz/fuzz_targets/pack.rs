//! Packs, unpacks and attends over arbitrary numbers. Errors are allowed, panics are not.
//! Dequantized numbers must be within one quantization step.
#![no_main]

use half::f16;
use kv_quant::{
    Axis, Bits, Float8, Flush, Format, Mask, Packed, Pool, PoolShape, Queries, Scheme, StaticScale,
    TurboQuant,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [a, b, c, rest @ ..] = data else { return };
    let bits = [Bits::Two, Bits::Three, Bits::Four, Bits::Eight][*a as usize % 4];
    let along = [Axis::Tokens, Axis::Channels][*a as usize / 4 % 2];
    let lanes = [Axis::Tokens, Axis::Channels][*a as usize / 8 % 2];
    let group = [32, 64, 128][*b as usize % 3];
    let columns = *c as usize % 100 + 1;
    let x: Vec<f16> =
        rest.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
    let x = &x[..x.len() / columns * columns];
    let scheme = Scheme::new(bits, along, group).expect("a scheme");
    let Ok(packed) = Packed::quantize(x, columns, scheme, lanes) else { return };
    let mut back = vec![0.0; x.len()];
    packed.dequantize(&mut back).expect("a matrix of this size");
    for (i, (x, back)) in x.iter().zip(&back).enumerate() {
        let (scale, _) = packed.params(i / columns, i % columns).expect("a place within");
        let largest = bits.max_code() as f32;
        // Half a step, and the rounding error of the smallest scales.
        let slack = (scale.to_f32() * 1e-3).max(6e-8) * largest + x.to_f32().abs() * 1e-3;
        assert!((x.to_f32() - back).abs() <= scale.to_f32() * 0.6 + slack);
    }
    let float8 = [Float8::E4m3, Float8::E5m2][*a as usize % 2];
    let few = if bits == Bits::Eight { Bits::Four } else { bits };
    let format = match *a / 16 % 8 {
        0 => Format::float8(float8),
        1 => Format::float8_static(float8, StaticScale::ONE, StaticScale::ONE),
        2 => Format::rotated_symmetric(bits, bits),
        3 => Format::rotated_asymmetric(bits, bits),
        4 => Format::turboquant(TurboQuant::ThreeBitNc),
        5 => {
            let levels = Scheme::lloyd_max(few, false).expect("a scheme");
            Format::new(levels, Scheme::uniform(bits), Flush::Rolling(40)).expect("a format")
        }
        6 => Format::kvarn(bits, bits, group).expect("a format"),
        _ => Format::kivi_rolling(bits, bits, group, group).expect("a format"),
    };
    let shape = PoolShape { kv_heads: 1, head_dim: columns, value_dim: columns };
    let mut pool = Pool::new(shape, format).expect("a pool");
    let tokens = x.len() / columns;
    if pool.append(&[1], &[0, tokens], x, x).is_ok() {
        let q = vec![1e-3f32; columns];
        let queries =
            Queries { data: &q[..], heads: 1, scale: 1.0, soft_cap: None, window: None };
        let got = pool.attend(&queries, &[1], &[0, 1], Mask::Full).expect("attention");
        assert!(got.out.iter().all(|x| x.is_finite()));
        // Entries that a truncation unpacks can be packed again.
        pool.truncate(1, tokens / 2).expect("fewer tokens");
        pool.append(&[1], &[0, tokens], x, x).expect("numbers that were taken before");
    }
});
