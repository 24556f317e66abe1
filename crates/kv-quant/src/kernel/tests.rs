//! Compares every kernel that this CPU supports with the portable one.

use super::{Panel, Params, Rows, kernels, run_shared};
use crate::levels::Levels;
use crate::{Bits, Float8, Scheme};
use half::f16;

/// A generator of reproducible words.
fn words(seed: u64) -> impl FnMut() -> u32 {
    let mut state = seed;
    move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    }
}

/// Returns every kind of levels, with the bits of their codes.
fn levels() -> Vec<(usize, Levels)> {
    let lloyd_max = |bits| Levels::of(Scheme::lloyd_max(bits, true).unwrap());
    let mut levels: Vec<_> = [2, 3, 4, 8]
        .into_iter()
        .flat_map(|bits| [0.0, -2.0].map(|first| (bits, Levels::Integers { first })))
        .collect();
    levels.extend([Bits::Two, Bits::Three, Bits::Four].map(|b| (b.count(), lloyd_max(b))));
    levels.extend([Float8::E4m3, Float8::E5m2].map(|kind| (8, Levels::Float8(kind))));
    levels
}

#[test]
fn all_kernels_agree() {
    let mut word = words(1);
    let mut case = 0;
    for (bits, levels) in levels() {
        // The last panel may have one line. Kernels for several panels need 128 steps.
        for widths in [&[1][..], &[2], &[2, 1], &[2, 2, 2]] {
            for count in [1, 2, 3, 4, 5, 8, 11] {
                for steps in [1, 5, 33, 64, 128, 261] {
                    case += 1;
                    let mut lines = |bits, spare| -> Vec<[u32; 16]> {
                        let lines = steps_to_lines(steps, bits, 2) + spare;
                        (0..lines).map(|_| std::array::from_fn(|_| word())).collect()
                    };
                    let spare = case % 2 * 2;
                    let codes: Vec<Vec<_>> = widths
                        .iter()
                        .map(|_| lines(if bits == 3 { 2 } else { bits }, spare))
                        .map(|codes| codes.into_iter().map(|line| finite(line, levels)).collect())
                        .collect();
                    let high: Vec<_> =
                        widths.iter().map(|_| lines(usize::from(bits == 3), 0)).collect();
                    let lanes = 32 * (widths.len() - 1) + 16 * widths[widths.len() - 1];
                    let (stride, out_stride) = (steps + case % 3, lanes + case % 5);
                    let data: Vec<f32> = (0..count * stride)
                        .map(|_| word() as f32 / u32::MAX as f32 - 0.5)
                        .collect();
                    let panels: Vec<_> = codes
                        .iter()
                        .zip(&high)
                        .zip(widths)
                        .map(|((codes, high), &width)| {
                            let ahead = &codes[..case % codes.len()];
                            Panel { codes, high, width, bits, levels, ahead }
                        })
                        .collect();
                    let x = Rows { data: &data, stride, count, steps };
                    check(&panels, x, lanes, out_stride);
                }
            }
        }
    }
}

/// Replaces codes that are not finite numbers.
fn finite(line: [u32; 16], levels: Levels) -> [u32; 16] {
    let limited = |code: u8| match levels {
        Levels::Float8(kind) => {
            code & 0x80 | (code & 0x7f).min(if kind == Float8::E4m3 { 0x7e } else { 0x7b })
        }
        _ => code,
    };
    line.map(|word| u32::from_le_bytes(word.to_le_bytes().map(limited)))
}

fn steps_to_lines(steps: usize, bits: usize, width: usize) -> usize {
    32usize.checked_div(bits).map_or(0, |per_word| steps.div_ceil(per_word) * width)
}

fn check(panels: &[Panel<'_>], x: Rows<'_>, lanes: usize, out_stride: usize) {
    let panel = panels[0];
    let before = vec![0.25; x.count * out_stride];
    let scales: Vec<f32> = (0..x.steps).map(|s| 0.5 + (s % 7) as f32 / 10.0).collect();
    let zero = |s: usize| match panel.levels {
        Levels::Float8(_) => 0.0,
        _ => (s % 5) as f32 - 1.5,
    };
    let zero_points: Vec<f32> = (0..x.steps).map(zero).collect();
    let params = Params { scales: &scales, zero_points: &zero_points };
    let results: Vec<_> = kernels()
        .map(|kernels| {
            let mut out = before.clone();
            run_shared(&kernels, panels, params, x, &mut out, out_stride);
            (kernels.name, out)
        })
        .collect();
    let largest = match panel.levels {
        Levels::Float8(kind) => kind.max(),
        _ => (1 << panel.bits) as f32,
    };
    for (name, out) in &results[1..] {
        for (i, (got, want)) in out.iter().zip(&results[0].1).enumerate() {
            let error = (got - want).abs();
            let bound = 1e-6 * (largest + 3.0) * x.steps as f32;
            assert!(
                error <= bound,
                "{name} {:?} {} {}, {i}: {got}, not {want}",
                panel.levels,
                panel.bits,
                x.steps
            );
            // Elements between the rows are not written.
            assert!(i % out_stride < lanes || *got == 0.25, "{name} wrote at {i}");
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
