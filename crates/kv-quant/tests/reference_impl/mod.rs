//! Slow and plain implementations of the pool's functions, for comparison.
#![allow(dead_code)] // each test file uses its own part

use std::ops::Range;

use kv_quant::{
    Axis, Bits, Float8, Flush, Format, Pool, PoolShape, Scheme, StaticScale, TurboQuant,
};

/// Returns reproducible numbers.
pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i as f32 + 31.0 * seed as f32) * 1.618).sin() * 1.5 + 0.3).collect()
}

/// A generator of reproducible integers.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(1))
    }

    /// Returns a number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % end.max(1)
    }

    /// Returns a number from -2 to 2.
    pub fn number(&mut self) -> f32 {
        self.below(4001) as f32 / 1000.0 - 2.0
    }

    pub fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }

    /// Returns some of the numbers below `end`, in order.
    pub fn some(&mut self, end: usize) -> Vec<u32> {
        let keep = 1 + self.below(4);
        (0..end as u32).filter(|_| self.below(4) < keep).collect()
    }
}

/// Returns formats of every kind of flush, axis and codes.
pub fn formats() -> Vec<Format> {
    let per_token = Scheme::new(Bits::Four, Axis::Channels, 32).unwrap();
    let of = |flush| Format::new(per_token, per_token, flush).unwrap();
    vec![
        Format::kivi(Bits::Two, Bits::Four, 32, 64).unwrap(),
        Format::kivi_rolling(Bits::Four, Bits::Two, 32, 64).unwrap(),
        Format::kivi_rolling(Bits::Three, Bits::Three, 64, 0).unwrap(),
        Format::flexgen(Bits::Eight, Bits::Two, 32).unwrap(),
        of(Flush::Rolling(32)),
        of(Flush::Staggered(64)),
        Format::f16(),
        Format::float8(Float8::E4m3),
        Format::float8_static(
            Float8::E5m2,
            StaticScale::new(0.5).unwrap(),
            StaticScale::new(0.01).unwrap(),
        ),
        Format::rotated_symmetric(Bits::Four, Bits::Three),
        Format::rotated_asymmetric(Bits::Three, Bits::Four),
        Format::turboquant(TurboQuant::K8V4),
        Format::turboquant(TurboQuant::FourBitNc),
        Format::turboquant(TurboQuant::ThreeBitNc),
        Format::new(
            Scheme::lloyd_max(Bits::Two, false).unwrap(),
            Scheme::lloyd_max(Bits::Four, true).unwrap(),
            Flush::Rolling(32),
        )
        .unwrap(),
        Format::kvarn(Bits::Four, Bits::Two, 64).unwrap(),
        Format::kvarn(Bits::Two, Bits::Three, 128).unwrap(),
    ]
}

pub fn shape(kv_heads: usize, head_dim: usize, value_dim: usize) -> PoolShape {
    PoolShape { kv_heads, head_dim, value_dim }
}

/// Returns all entries of a sequence.
pub fn all(pool: &Pool, seq: u64) -> Vec<(Vec<f32>, Vec<f32>)> {
    (0..pool.shape().kv_heads).map(|head| pool.read(seq, head).unwrap()).collect()
}

/// Returns one query's attention over rows of keys and values: output and log-sum-exp.
pub fn attend(
    q: &[f32],
    (keys, values): &(Vec<f32>, Vec<f32>),
    value_dim: usize,
    entries: impl Iterator<Item = usize> + Clone,
    scale: f32,
    soft_cap: Option<f32>,
) -> (Vec<f64>, f64) {
    let d = q.len();
    let score = |entry: usize| {
        let dot = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
        let s: f64 = q.iter().zip(&keys[entry * d..][..d]).map(dot).sum();
        let s = s * f64::from(scale);
        soft_cap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
    };
    let max = entries.clone().map(score).fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; value_dim];
    if max == f64::NEG_INFINITY {
        return (out, max);
    }
    let sum: f64 = entries.clone().map(|e| (score(e) - max).exp()).sum();
    for entry in entries {
        let p = (score(entry) - max).exp() / sum;
        let row = &values[entry * value_dim..][..value_dim];
        out.iter_mut().zip(row).for_each(|(out, &v)| *out += p * f64::from(v));
    }
    (out, max + sum.ln())
}

/// Returns the entries of ranges.
pub fn entries(ranges: &[Range<usize>]) -> impl Iterator<Item = usize> + Clone + '_ {
    ranges.iter().cloned().flatten()
}

/// Returns whether an output row is close to the expected one.
pub fn close(got: &[f32], want: &[f64]) -> bool {
    let largest = want.iter().fold(1e-2f64, |a, w| a.max(w.abs()));
    got.iter().zip(want).all(|(got, want)| (f64::from(*got) - want).abs() <= 2e-3 * largest)
}
