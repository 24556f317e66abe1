//! PyramidKV: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069.

use longctx_core::{Error, EvictionPolicy};

/// Gives lower layers more of the model's budget and higher ones less, around any policy; the paper's is SnapKV.
///
/// The layers' mean is the budget. As in kvpress, a layer's share is rounded, not truncated, with halves to the even number, and where
/// the pyramid would leave a layer less than what the policy protects, all layers get the same.
#[derive(Debug, Clone, Copy)]
pub struct PyramidKv<P> {
    policy: P,
    layer: usize,
    layers: usize,
    beta: f64,
}

impl<P: EvictionPolicy> PyramidKv<P> {
    /// For the given one of a model's `layers`. The top layer gets a `beta`-th of the budget (20 in the published code).
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no such layer, or `beta` is below 1.
    pub fn new(policy: P, layer: usize, layers: usize, beta: f64) -> longctx_core::Result<Self> {
        if layer >= layers {
            return Err(Error::setting("layer", format!("one of {layers}, from 0"), layer));
        }
        if !(beta >= 1.0 && beta.is_finite()) {
            return Err(Error::setting("beta", "a number from 1", beta));
        }
        Ok(Self { policy, layer, layers, beta })
    }
}

impl<P: EvictionPolicy> EvictionPolicy for PyramidKv<P> {
    forward!(needs, score, protects, is_over, select, rerotates, decode_step);

    fn budgets(&self, budget: f64, seen: usize, heads: usize) -> Vec<usize> {
        let window = self.policy.protects(budget as usize).recent as f64;
        let mut least = budget / self.beta;
        let mut most = 2.0 * budget - least;
        let all = seen as f64;
        if most >= all - window {
            most = all - window;
            least = 2.0 * budget - most;
        }
        let fits = all >= most && most >= least && least >= window;
        let own = match self.layers {
            _ if !fits => budget,
            1 => most,
            layers => most - self.layer as f64 * (most - least) / (layers - 1) as f64,
        };
        vec![(own.round_ties_even() as usize).max(1); heads]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SnapKv;

    fn budgets(budget: f64, seen: usize) -> Vec<usize> {
        let of_layer = |layer| {
            let policy = PyramidKv::new(SnapKv::new(8).unwrap(), layer, 5, 20.0).unwrap();
            policy.budgets(budget, seen, 2)[1]
        };
        (0..5).map(of_layer).collect()
    }

    #[test]
    fn layers_share_the_budget() {
        assert_eq!(budgets(200.0, 1000), [390, 295, 200, 105, 10]);
        // No layer can keep more than there is: the top ones get what the lowest can't take.
        assert_eq!(budgets(600.0, 1000), [992, 796, 600, 404, 208]);
        // A twentieth of 100 is less than the window.
        assert_eq!(budgets(100.0, 1000), [100; 5]);
    }

    #[test]
    fn bad_settings_are_named() {
        let message = |layer, beta| {
            PyramidKv::new(crate::KNorm, layer, 4, beta).expect_err("an error").to_string()
        };
        assert!(message(4, 20.0).contains("layer"));
        assert!(message(0, 0.5).contains("beta"));
    }
}
