//! The kernel in portable Rust, the reference of the others.

use super::{Kernels, Panel, Params, Rows};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Runs on any CPU.
pub const KERNELS: Kernels = Kernels { name: "portable", accumulate, shared: None, widen };

pub fn widen(src: &[f16], out: &mut [f32]) {
    src.convert_to_f32_slice(out);
}

fn accumulate(
    panel: Panel<'_>,
    params: Params<'_>,
    x: Rows<'_>,
    out: &mut [f32],
    out_stride: usize,
) {
    let (per_word, low) = (panel.per_word(), panel.low_bits());
    for (i, line) in panel.codes.iter().enumerate() {
        let (word, half) = (i / panel.width, i % panel.width);
        let first = word * per_word;
        for step in first..x.steps.min(first + per_word) {
            let shift = (step - first) * low;
            let mut codes = line.map(|word| word >> shift & ((1 << low) - 1));
            if panel.bits == 3 {
                let high = &panel.high[step / 32 * panel.width + half];
                let upper = high.map(|word| (word >> (step % 32) & 1) << 2);
                codes.iter_mut().zip(upper).for_each(|(code, upper)| *code |= upper);
            }
            let (scale, zero) = (params.scales[step], params.zero_points[step]);
            let values = codes.map(|code| panel.levels.value(code as u8) * scale + zero);
            for r in 0..x.count {
                let weight = x.data[r * x.stride + step];
                let sums = &mut out[r * out_stride + 16 * half..][..16];
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += weight * value;
                }
            }
        }
    }
}
