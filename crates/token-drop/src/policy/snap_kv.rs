//! SnapKV: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv
//! 2404.14469.

use super::window::{check_window, equal_scores, protect_newest};
use crate::{
    Budget, EvictionPolicy, GroupReduction, LayerView, Needs, ObservedQueries, PolicyCache,
    Protected, Settings,
};
use candle_core::Tensor;
use longctx_core::{Error, KvStore, LayerSpec, Result};

/// Keeps the entries that the newest queries (the observation window) attend to, smoothed over
/// neighbours.
#[derive(Debug, Clone, Copy)]
pub struct SnapKv {
    window: usize,
    kernel: usize,
    group: GroupReduction,
}

impl SnapKv {
    /// Creates the policy. It observes the newest `window` queries (64 in kvpress, 32 in the
    /// published code) and smooths over 5 tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] if the window is 0.
    pub fn new(window: usize) -> Result<Self> {
        check_window(window)?;
        Ok(Self { window, kernel: 5, group: GroupReduction::Mean })
    }

    /// Sets the smoothing kernel to `kernel` tokens; 1 disables smoothing.
    ///
    /// # Errors
    /// [`Error::Setting`] if the kernel is even and so has no centre.
    pub fn with_kernel(mut self, kernel: usize) -> Result<Self> {
        if kernel.is_multiple_of(2) {
            return Err(Error::setting("kernel", "an odd number", kernel));
        }
        self.kernel = kernel;
        Ok(self)
    }

    /// Sets how the scores of a group's query heads are reduced; the mean by default.
    #[must_use]
    pub fn with_group_reduction(mut self, group: GroupReduction) -> Self {
        self.group = group;
        self
    }
}

impl EvictionPolicy for SnapKv {
    fn needs(&self) -> Needs {
        let newest = ObservedQueries::Newest { queries: self.window, by_position: false };
        Needs { attention: Some(newest), ..Default::default() }
    }

    fn score(&self, view: &LayerView<'_>) -> Result<Tensor> {
        let before = view.entries.saturating_sub(self.window);
        let sums = view.attention_sums()?;
        if before == 0 {
            return equal_scores(view, sums);
        }
        let sums = sums.narrow(2, 0, before)?;
        let smooth = (smoothed(&sums, self.kernel)? / view.observed_queries as f64)?;
        protect_newest(&self.group.reduce(&smooth)?, view)
    }
}

impl<S: KvStore> PolicyCache<S, SnapKv> {
    /// SnapKV as published: the tokens of the observation window and decoded tokens are kept.
    ///
    /// # Errors
    /// As [`with_settings`](Self::with_settings).
    pub fn snap_kv(spec: LayerSpec, store: S, policy: SnapKv, budget: Budget) -> Result<Self> {
        let settings = Settings {
            protected: Protected::newest(policy.window),
            decode_step: None,
            ..Settings::new(budget)
        };
        Self::with_settings(spec, store, policy, settings)
    }
}

/// Returns the mean over `kernel` neighbours in each row, zero-padded at the ends.
fn smoothed(x: &Tensor, kernel: usize) -> Result<Tensor> {
    let len = x.dim(2)?;
    let padded = x.pad_with_zeros(2, kernel / 2, kernel / 2)?;
    let mut sum = padded.narrow(2, 0, len)?;
    for i in 1..kernel {
        sum = (sum + padded.narrow(2, i, len)?)?;
    }
    Ok((sum / kernel as f64)?)
}

#[cfg(test)]
mod tests {
    use super::smoothed;
    use candle_core::{Device, Tensor};

    #[test]
    fn neighbours_are_averaged_with_zeros_past_the_ends() {
        let smooth = |x: &[f32]| {
            let x = Tensor::from_slice(x, (1, 1, x.len()), &Device::Cpu).unwrap();
            smoothed(&x, 3).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(smooth(&[3.0, 6.0, 0.0, 9.0]), [3.0, 3.0, 5.0, 3.0]);
        assert_eq!(smooth(&[3.0, 6.0]), [3.0, 3.0]);
    }
}
