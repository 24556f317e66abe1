//! The kernel in plain Rust, the yardstick of the others.

use super::{Kernels, Panel, Params, Rows};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// What any machine can run.
pub const KERNELS: Kernels = Kernels { name: "portable", accumulate, widen };

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
    let (mask, per_word) = ((1u32 << panel.bits) - 1, 32 / panel.bits);
    for (i, line) in panel.codes.iter().enumerate() {
        let (word, half) = (i / panel.width, i % panel.width);
        let first = word * per_word;
        for step in first..x.steps.min(first + per_word) {
            let shift = (step - first) * panel.bits;
            let (scale, zero) = (params.scales[step] * panel.unit, params.zeros[step]);
            let values = line.map(|word| (word >> shift & mask) as i32 as f32 * scale + zero);
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
