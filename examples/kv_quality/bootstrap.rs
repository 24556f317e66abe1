//! Bootstrap intervals of means.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The number of resamples.
const SAMPLES: usize = 2000;

/// Returns the 2.5th and 97.5th percentiles of the mean over resampled items.
pub fn interval(items: &[f64]) -> (f64, f64) {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut sample = || {
        let drawn = (0..items.len()).map(|_| items[rng.random_range(0..items.len())]);
        drawn.sum::<f64>() / items.len() as f64
    };
    let mut means: Vec<f64> = (0..SAMPLES).map(|_| sample()).collect();
    means.sort_by(f64::total_cmp);
    (means[SAMPLES / 40], means[SAMPLES - 1 - SAMPLES / 40])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_about_the_mean() {
        assert_eq!(interval(&[3.0; 8]), (3.0, 3.0));
        // 100 coins: the mean's standard deviation is 0.05.
        let coins: Vec<f64> = (0..100).map(|i| f64::from(i % 2)).collect();
        let (low, high) = interval(&coins);
        assert!((0.37..0.43).contains(&low) && (0.57..0.63).contains(&high), "{low} {high}");
    }
}
