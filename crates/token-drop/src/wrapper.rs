//! Policies around policies: another budget, another way to select, another rotation.

/// Answers that a wrapper leaves to the policy within it.
macro_rules! forward {
    ($($answer:ident),+) => { $(forward!(@$answer);)+ };
    (@needs) => {
        fn needs(&self) -> longctx_core::Needs {
            self.policy.needs()
        }
    };
    (@score) => {
        fn score(&self, held: &longctx_core::Held<'_>) -> longctx_core::Result<Vec<Vec<f32>>> {
            self.policy.score(held)
        }
    };
    (@protects) => {
        fn protects(&self, budget: usize) -> longctx_core::Protected {
            self.policy.protects(budget)
        }
    };
    (@budgets) => {
        fn budgets(&self, budget: f64, seen: usize, heads: usize) -> Vec<usize> {
            self.policy.budgets(budget, seen, heads)
        }
    };
    (@bounds_heads) => {
        fn bounds_heads(&self) -> bool {
            self.policy.bounds_heads()
        }
    };
    (@is_over) => {
        fn is_over(&self, lens: &[usize], budgets: &[usize]) -> bool {
            self.policy.is_over(lens, budgets)
        }
    };
    (@select) => {
        fn select(
            &self,
            scores: &[Vec<f32>],
            budgets: &[usize],
            shape: &longctx_core::AttentionShape,
            protected: longctx_core::Protected,
        ) -> longctx_core::Selection {
            self.policy.select(scores, budgets, shape, protected)
        }
    };
    (@rerotates) => {
        fn rerotates(&self) -> bool {
            self.policy.rerotates()
        }
    };
    (@decode_step) => {
        fn decode_step(&self) -> Option<usize> {
            self.policy.decode_step()
        }
    };
}

pub mod ada_kv;
pub mod chunk_kv;
pub mod pyramid_kv;
pub mod rerotated;
