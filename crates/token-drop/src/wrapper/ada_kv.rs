//! AdaKV: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", arXiv 2407.11550.

use longctx_core::{AttentionShape, Error, EvictionPolicy, Protected, Selection};

/// Lets a layer's kv heads compete for their common budget, around any policy: heads whose scores are spread widely keep more.
///
/// Each head keeps at least a safeguard share of its own budget. Heads then hold different numbers of entries, and free the others.
#[derive(Debug, Clone, Copy)]
pub struct AdaKv<P> {
    policy: P,
    safeguard: f64,
}

impl<P: EvictionPolicy> AdaKv<P> {
    /// With a safeguard of 0.2, as the published code has it.
    pub fn new(policy: P) -> Self {
        Self { policy, safeguard: 0.2 }
    }

    /// The share of its budget that each head keeps in any case.
    ///
    /// # Errors
    /// [`Error::Setting`] unless it lies in 0..=1.
    pub fn with_safeguard(mut self, share: f64) -> longctx_core::Result<Self> {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::setting("safeguard", "a number from 0 to 1", share));
        }
        self.safeguard = share;
        Ok(self)
    }

    /// One batch entry's heads.
    fn compete(
        &self,
        scores: &[Vec<f32>],
        budgets: &[usize],
        protected: Protected,
    ) -> Vec<Vec<u32>> {
        let safe = |budget: &usize| {
            let share = (*budget as f64 * self.safeguard) as usize;
            share.max(protected.total()).max(usize::from(self.safeguard > 0.0))
        };
        let safe: Vec<_> = budgets.iter().map(safe).collect();
        let mut keep = Selection::top(scores, &safe, protected).heads().to_vec();
        let mut rest: Vec<(usize, u32)> = Vec::new();
        for (head, (scores, kept)) in scores.iter().zip(&keep).enumerate() {
            let mut kept = kept.iter().peekable();
            let others = (0..scores.len() as u32).filter(|i| kept.next_if_eq(&i).is_none());
            rest.extend(others.map(|i| (head, i)));
        }
        let total: usize = budgets.iter().fold(0, |sum, &budget| sum.saturating_add(budget));
        let left = total.saturating_sub(keep.iter().map(Vec::len).sum());
        let score = |&(head, i): &(usize, u32)| match scores[head][i as usize] {
            x if x.is_nan() => f32::NEG_INFINITY,
            x => x,
        };
        if left > 0 && left < rest.len() {
            let best_first = |a: &_, b: &_| score(b).total_cmp(&score(a)).then_with(|| a.cmp(b));
            rest.select_nth_unstable_by(left - 1, best_first);
        }
        rest.into_iter().take(left).for_each(|(head, i)| keep[head].push(i));
        keep.iter_mut().for_each(|head| head.sort_unstable());
        keep
    }
}

impl<P: EvictionPolicy> EvictionPolicy for AdaKv<P> {
    forward!(needs, score, protects, budgets, bounds_heads, rerotates, decode_step);

    fn is_over(&self, lens: &[usize], budgets: &[usize]) -> bool {
        let sum = |x: &[usize]| x.iter().fold(0usize, |sum, &x| sum.saturating_add(x));
        sum(lens) > sum(budgets)
    }

    fn select(
        &self,
        scores: &[Vec<f32>],
        budgets: &[usize],
        shape: &AttentionShape,
        protected: Protected,
    ) -> Selection {
        let entries = scores.chunks(shape.kv_heads).zip(budgets.chunks(shape.kv_heads));
        let heads = entries.flat_map(|(scores, budgets)| self.compete(scores, budgets, protected));
        Selection::new(heads.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KNorm;

    #[test]
    fn heads_compete_above_the_safeguard() {
        let scores = vec![vec![0.9, 0.8, 0.7, 0.6], vec![0.1, 0.2, 0.3, 0.65]];
        let shape = AttentionShape::new(2, 2, 1).unwrap();
        let keep = |safeguard, protected| {
            let policy = AdaKv::new(KNorm).with_safeguard(safeguard).unwrap();
            policy.select(&scores, &[2, 2], &shape, protected).heads().to_vec()
        };
        let none = Protected::default();
        assert_eq!(keep(0.0, none), [vec![0, 1, 2], vec![3]]);
        assert_eq!(keep(1.0, none), [vec![0, 1], vec![2, 3]]);
        assert_eq!(keep(0.5, Protected { sinks: 1, recent: 0 }), [vec![0, 1, 2], vec![0]]);
        assert!(AdaKv::new(KNorm).with_safeguard(1.1).is_err());
    }
}
