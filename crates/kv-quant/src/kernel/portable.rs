//! The kernel in plain Rust, the yardstick of the others.

use super::{Panel, Rows};

/// As [`accumulate`](super::accumulate).
pub fn accumulate(panel: Panel<'_>, x: Rows<'_>, out: &mut [f32], out_stride: usize) {
    let (mask, per_word) = ((1u32 << panel.bits) - 1, 32 / panel.bits);
    for (i, line) in panel.codes.iter().enumerate() {
        let (word, half) = (i / panel.width, i % panel.width);
        let first = word * per_word;
        for step in first..x.steps.min(first + per_word) {
            let shift = (step - first) * panel.bits;
            let codes = line.map(|word| (word >> shift & mask) as i32 as f32 * panel.unit);
            for r in 0..x.count {
                let weight = x.data[r * x.stride + step];
                let sums = &mut out[r * out_stride + 16 * half..][..16];
                for (sum, code) in sums.iter_mut().zip(codes) {
                    *sum += weight * code;
                }
            }
        }
    }
}
