//! SnapKV: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469.

use super::window::{check_window, end_with};
use crate::Group;
use longctx_core::{Error, EvictionPolicy, Held, Mass, Needs, Protected, Result};

/// Keeps what the newest queries, the observation window, attend to, smoothed over neighbours; the window itself stays.
#[derive(Debug, Clone, Copy)]
pub struct SnapKv {
    window: usize,
    kernel: usize,
    group: Group,
}

impl SnapKv {
    /// Observes the newest `window` queries (64 in kvpress, 32 in the published code); smooths over 5 tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] if the window is 0.
    pub fn new(window: usize) -> Result<Self> {
        check_window(window)?;
        Ok(Self { window, kernel: 5, group: Group::Mean })
    }

    /// Smooths over `kernel` tokens; 1 does nothing.
    ///
    /// # Errors
    /// [`Error::Setting`] if the kernel is even: it has no middle.
    pub fn with_kernel(mut self, kernel: usize) -> Result<Self> {
        if kernel.is_multiple_of(2) {
            return Err(Error::setting("kernel", "an odd number", kernel));
        }
        self.kernel = kernel;
        Ok(self)
    }

    /// How the scores of a group's query heads are joined; by default by their mean.
    #[must_use]
    pub fn with_group(mut self, group: Group) -> Self {
        self.group = group;
        self
    }
}

impl EvictionPolicy for SnapKv {
    fn needs(&self) -> Needs {
        let mass = Mass::Newest { queries: self.window, by_position: false };
        Needs { mass: Some(mass), ..Default::default() }
    }

    fn score(&self, held: &Held<'_>) -> Result<Vec<Vec<f32>>> {
        let scores = held.heads.iter().map(|head| {
            let before = head.positions.len().saturating_sub(self.window);
            let smooth = |mass: &Vec<f32>| {
                let mean = smoothed(&mass[..before], self.kernel);
                mean.into_iter().map(|x| x / head.mass_queries as f32).collect()
            };
            self.group.join(&head.mass.iter().map(smooth).collect::<Vec<_>>())
        });
        let lens: Vec<_> = held.heads.iter().map(|head| head.positions.len()).collect();
        Ok(end_with(scores.collect(), &lens))
    }

    fn protects(&self, _: usize) -> Protected {
        Protected { sinks: 0, recent: self.window }
    }

    /// The paper compresses the prompt alone; in later steps earlier queries would have to be kept.
    fn decode_step(&self) -> Option<usize> {
        None
    }
}

/// The mean over `kernel` neighbours; past the ends lie zeros.
fn smoothed(x: &[f32], kernel: usize) -> Vec<f32> {
    let half = kernel / 2;
    let mean = |i: usize| {
        let near = i.saturating_sub(half)..(i + half + 1).min(x.len());
        x[near].iter().sum::<f32>() / kernel as f32
    };
    (0..x.len()).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::smoothed;

    #[test]
    fn neighbours_are_averaged_with_zeros_past_the_ends() {
        assert_eq!(smoothed(&[3.0, 6.0, 0.0, 9.0], 3), [3.0, 3.0, 5.0, 3.0]);
        assert_eq!(smoothed(&[3.0, 6.0], 1), [3.0, 6.0]);
    }
}
