//! How a model's layers and a layer's heads share a budget.

use longctx_core::{Error, LayerSpec, Result};

/// How the layers of a model share their budget.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub enum LayerBudgets {
    /// Every layer has the same budget.
    #[default]
    Uniform,
    /// PyramidKV (Cai et al., arXiv 2406.02069): lower layers have larger budgets than higher ones.
    /// The mean over the layers is the budget.
    ///
    /// As in kvpress, a layer's share is rounded half to even. If the pyramid would leave a layer
    /// less than the protected newest tokens, all layers have the same budget. The layer's index is
    /// that of its [`LayerSpec`].
    Pyramid {
        /// The top layer gets the budget divided by `beta`; at least 1, 20 in the published code.
        beta: f64,
    },
}

impl LayerBudgets {
    pub(crate) fn check(self, spec: &LayerSpec) -> Result<()> {
        let LayerBudgets::Pyramid { beta } = self else { return Ok(()) };
        if !(beta >= 1.0 && beta.is_finite()) {
            return Err(Error::setting("beta", "a number from 1", beta));
        }
        if spec.index >= spec.num_layers {
            let expected = format!("one of {}, from 0", spec.num_layers);
            return Err(Error::setting("layer", expected, spec.index));
        }
        Ok(())
    }

    /// Returns the layer's budget, for a mean of `budget`, `seen` tokens and `window` protected
    /// newest tokens.
    pub(crate) fn of_layer(self, spec: &LayerSpec, budget: f64, seen: usize, window: usize) -> f64 {
        let LayerBudgets::Pyramid { beta } = self else { return budget };
        let (window, all) = (window as f64, seen as f64);
        let mut min = budget / beta;
        let mut max = 2.0 * budget - min;
        if max >= all - window {
            max = all - window;
            min = 2.0 * budget - max;
        }
        let fits = all >= max && max >= min && min >= window;
        let own = match spec.num_layers {
            _ if !fits => budget,
            1 => max,
            layers => max - spec.index as f64 * (max - min) / (layers - 1) as f64,
        };
        own.round_ties_even()
    }
}

/// How the kv heads of a layer share their budget.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub enum HeadBudgets {
    /// Every head keeps the same number of entries.
    #[default]
    Uniform,
    /// AdaKV (Feng et al., arXiv 2407.11550): heads compete for the sum of their budgets, so that
    /// heads whose scores are spread widely keep more. Heads then hold different numbers of
    /// entries.
    Adaptive {
        /// The share of its own budget that each head always keeps, from 0 to 1.
        safeguard: f64,
    },
}

impl HeadBudgets {
    /// AdaKV with the published safeguard of 0.2.
    pub const ADA_KV: Self = Self::Adaptive { safeguard: 0.2 };

    pub(crate) fn check(self) -> Result<()> {
        match self {
            HeadBudgets::Adaptive { safeguard } if !(0.0..=1.0).contains(&safeguard) => {
                Err(Error::setting("safeguard", "a number from 0 to 1", safeguard))
            }
            _ => Ok(()),
        }
    }

    /// Returns whether heads that hold `lens` entries exceed their budgets.
    pub(crate) fn is_over(self, lens: &[usize], budgets: &[usize]) -> bool {
        match self {
            HeadBudgets::Uniform => lens.iter().zip(budgets).any(|(len, budget)| len > budget),
            HeadBudgets::Adaptive { .. } => lens.iter().sum::<usize>() > budgets.iter().sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use longctx_core::AttentionShape;

    fn budgets(budget: f64, seen: usize) -> Vec<f64> {
        let spec = |layer| LayerSpec::new(AttentionShape::new(2, 1, 8).unwrap()).at(layer, 5);
        let pyramid = LayerBudgets::Pyramid { beta: 20.0 };
        (0..5).map(|layer| pyramid.of_layer(&spec(layer), budget, seen, 8)).collect()
    }

    #[test]
    fn layers_share_the_budget() {
        assert_eq!(budgets(200.0, 1000), [390.0, 295.0, 200.0, 105.0, 10.0]);
        // No layer can keep more tokens than there are: the excess of the lowest layers goes to the
        // top ones.
        assert_eq!(budgets(600.0, 1000), [992.0, 796.0, 600.0, 404.0, 208.0]);
        // A twentieth of 100 is less than the window.
        assert_eq!(budgets(100.0, 1000), [100.0; 5]);
    }
}
