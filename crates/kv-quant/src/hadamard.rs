//! The Walsh-Hadamard transform of keys, values and queries.
//!
//! It is orthonormal, so transformed queries and keys have the scores of the original ones. It
//! spreads large values of one channel over all channels, which improves quantization along
//! channels. QuaRot (arXiv 2404.00456) and TurboQuant (arXiv 2504.19874) rotate before
//! quantization.

use crate::number::MAX_GROUPED;
use half::f16;
use longctx_simd::wide;
use rayon::prelude::*;

/// Transforms each row of `columns` numbers, in blocks of the largest power of two that divides
/// `columns`. The transform is its own inverse.
pub fn hadamard(rows: &mut [f32], columns: usize) {
    let block = 1 << columns.trailing_zeros();
    rows.chunks_exact_mut(block).for_each(transform);
}

/// Transforms each row and returns the index of the first result beyond ±[`MAX_GROUPED`], with its
/// value.
pub fn rotated_out_of_range(rows: &[f16], columns: usize) -> Option<(usize, f32)> {
    // No sum of a block is larger than this factor times its largest number.
    let growth = ((1 << columns.trailing_zeros()) as f32).sqrt();
    let safe = f16::from_f32(0.999 * MAX_GROUPED.to_f32() / growth);
    rows.par_chunks(columns).enumerate().find_map_first(|(row, numbers)| {
        crate::number::first_out_of_range_sequential(numbers, safe)?;
        let mut rotated: Vec<f32> = numbers.iter().map(|x| x.to_f32()).collect();
        hadamard(&mut rotated, columns);
        let column = rotated.iter().position(|x| x.abs() > MAX_GROUPED.to_f32())?;
        Some((row * columns + column, rotated[column]))
    })
}

wide! {
    fn transform(x: &'a mut [f32]) -> () {
        let mut half = 1;
        while half < x.len() {
            for pair in x.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let norm = (x.len() as f32).sqrt().recip();
        x.iter_mut().for_each(|x| *x *= norm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_orthonormal_and_its_own_inverse() {
        for columns in [64, 80, 96, 128] {
            let x: Vec<f32> = (0..2 * columns).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut y = x.clone();
            hadamard(&mut y, columns);
            let dot = |x: &[f32]| -> f32 {
                x[..columns].iter().zip(&x[columns..]).map(|(a, b)| a * b).sum()
            };
            assert!((dot(&x) - dot(&y)).abs() < 1e-4);
            assert!(x.iter().zip(&y).any(|(a, b)| (a - b).abs() > 0.1));
            hadamard(&mut y, columns);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }
}
