//! Arbitrary numbers through packing, unpacking and attention: errors may come, panics may not, and what comes back is within a step.
#![no_main]

use half::f16;
use kv_quant::{Axis, Bits, Format, Head, Packed, Queries, Scheme, attend};
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
        // Half a step, and what the smallest scales lose to their own rounding.
        let slack = (scale.to_f32() * 1e-3).max(6e-8) * largest + x.to_f32().abs() * 1e-3;
        assert!((x.to_f32() - back).abs() <= scale.to_f32() * 0.6 + slack);
    }
    let format = Format::kivi(bits, bits, group, group).expect("a format");
    let mut head = Head::new(columns, format).expect("a head");
    if head.append(x, x).is_ok() && !head.is_empty() {
        let q = vec![1e-3; columns];
        let queries = Queries { data: &q, heads: 1, tokens: 1, scale: 1.0, soft_cap: None };
        let len = head.len();
        attend(&[head], 1, &queries, |_, _| 0..len).expect("attention");
    }
});
