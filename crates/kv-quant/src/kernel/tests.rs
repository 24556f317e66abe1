//! Every kernel that this machine can run against the portable one.

use super::{Panel, Params, Rows, kernels, run};
use half::f16;

/// A small generator of repeatable words.
fn words(seed: u64) -> impl FnMut() -> u32 {
    let mut state = seed;
    move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    }
}

#[test]
fn all_kernels_agree() {
    let mut word = words(1);
    let mut case = 0;
    for bits in [1, 2, 4, 8] {
        for width in [1, 2] {
            for count in [1, 2, 3, 4, 5, 8, 11] {
                for steps in [1, 5, 32, 33, 64] {
                    case += 1;
                    let lines = steps_to_lines(steps, bits, width) + case % 2 * width;
                    let codes: Vec<[u32; 16]> =
                        (0..lines).map(|_| std::array::from_fn(|_| word())).collect();
                    let (stride, out_stride) = (steps + case % 3, 16 * width + case % 5);
                    let data: Vec<f32> = (0..count * stride)
                        .map(|_| word() as f32 / u32::MAX as f32 - 0.5)
                        .collect();
                    let (unit, ahead) = ([1.0, 4.0][case % 2], &codes[..case % codes.len()]);
                    let panel = Panel { codes: &codes, width, bits, unit, ahead };
                    let x = Rows { data: &data, stride, count, steps };
                    check(panel, x, out_stride);
                }
            }
        }
    }
}

fn steps_to_lines(steps: usize, bits: usize, width: usize) -> usize {
    steps.div_ceil(32 / bits) * width
}

fn check(panel: Panel<'_>, x: Rows<'_>, out_stride: usize) {
    let before = vec![0.25; x.count * out_stride];
    let scales: Vec<f32> = (0..x.steps).map(|s| 0.5 + (s % 7) as f32 / 10.0).collect();
    let zeros: Vec<f32> = (0..x.steps).map(|s| (s % 5) as f32 - 1.5).collect();
    let params = Params { scales: &scales, zeros: &zeros };
    let results: Vec<_> = kernels()
        .map(|kernels| {
            let mut out = before.clone();
            run(kernels.accumulate, panel, params, x, &mut out, out_stride);
            (kernels.name, out)
        })
        .collect();
    let largest = (panel.unit * (1 << panel.bits) as f32 + 3.0) * x.steps as f32;
    for (name, out) in &results[1..] {
        for (i, (got, want)) in out.iter().zip(&results[0].1).enumerate() {
            let error = (got - want).abs();
            assert!(error <= 1e-6 * largest, "{name} {} bits, {i}: {got}, not {want}", panel.bits);
            // What lies between the rows is left alone.
            assert!(i % out_stride < 16 * panel.width || *got == 0.25, "{name} wrote at {i}");
        }
    }
}

#[test]
fn halves_become_floats() {
    let step = if cfg!(miri) { 97 } else { 1 };
    let all = (0..=u16::MAX).step_by(step).map(f16::from_bits);
    let halves: Vec<f16> = all.filter(|x| !x.is_nan()).collect();
    for kernels in kernels() {
        for len in [0, 1, 7, 8, 15, 16, 17, 33, halves.len()] {
            let mut out = vec![0.0; len];
            (kernels.widen)(&halves[..len], &mut out);
            let same = halves.iter().zip(&out).all(|(half, &x)| half.to_f32() == x);
            assert!(same, "{}, {len}", kernels.name);
        }
    }
}
