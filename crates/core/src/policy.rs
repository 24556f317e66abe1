//! Which entries of a cache stay: what an eviction policy asks for, what it sees, and what it answers.

use crate::{AttentionShape, Result, Rope, Selection};
use candle_core::Tensor;

/// Scores what one layer holds, and selects what stays within a budget.
///
/// Only [`needs`](Self::needs) and [`score`](Self::score) have no default. A wrapper around another policy changes one of the other answers: the
/// budget of each head, or the way in which scores become a selection.
pub trait EvictionPolicy: Send {
    /// What [`score`](Self::score) reads; the rest of [`Held`] is left empty.
    fn needs(&self) -> Needs;

    /// One score per entry of each kv head (`[batch * kv_heads]` lists as long as the heads); the highest stay.
    ///
    /// # Errors
    /// If a tensor operation fails.
    fn score(&self, held: &Held<'_>) -> Result<Vec<Vec<f32>>>;

    /// Entries that stay whatever their scores, when each head may keep `budget` of them.
    fn protects(&self, budget: usize) -> Protected {
        let _ = budget;
        Protected::default()
    }

    /// Entries that each of `heads` kv heads may keep, when the cache may keep `budget` of `seen` tokens; the budget is a ratio of the prompt
    /// that is not rounded yet.
    fn budgets(&self, budget: f64, seen: usize, heads: usize) -> Vec<usize> {
        let _ = seen;
        vec![(budget as usize).max(1); heads]
    }

    /// Whether the policy bounds its heads itself and heeds no budget of the cache's. By default it does not.
    fn bounds_heads(&self) -> bool {
        false
    }

    /// Whether heads that hold `lens` entries are over their budgets.
    fn is_over(&self, lens: &[usize], budgets: &[usize]) -> bool {
        lens.iter().zip(budgets).any(|(len, budget)| len > budget)
    }

    /// What stays. Protected entries are among it, and no more than the budgets allow.
    fn select(
        &self,
        scores: &[Vec<f32>],
        budgets: &[usize],
        shape: &AttentionShape,
        protected: Protected,
    ) -> Selection {
        let _ = shape;
        Selection::top(scores, budgets, protected)
    }

    /// Whether kept keys are rotated anew, so that their positions are contiguous again. By default they keep the rotation of the positions at which they came.
    fn rerotates(&self) -> bool {
        false
    }

    /// How many entries a decoding head gives up at a time once it is over its budget, so that the cost of scoring is shared by as many
    /// tokens; `None`: decoded tokens all stay, and only calls of several tokens are compressed.
    fn decode_step(&self) -> Option<usize> {
        Some(64)
    }
}

/// What a policy reads in order to score.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// The keys held.
    pub keys: bool,
    /// The values held.
    pub values: bool,
    /// The queries of the call, or as many of the newest ones while decoding, before the rotary embedding.
    pub queries: Option<usize>,
    /// The attention that entries receive.
    pub mass: Option<Mass>,
    /// The scores that the policy gave last time: it is then asked to score after every call.
    pub previous: bool,
}

/// Whose attention is summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mass {
    /// Every query of the call.
    Call,
    /// The newest queries.
    Newest {
        /// How many of them.
        queries: usize,
        /// Whether each query counts as often as there are tokens before it, which evens out that early queries share their attention among fewer.
        by_position: bool,
    },
}

/// Entries at both ends that stay whatever their scores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Protected {
    /// The first entries: attention sinks.
    pub sinks: usize,
    /// The newest entries.
    pub recent: usize,
}

impl Protected {
    /// Entries in all.
    pub fn total(self) -> usize {
        self.sinks.saturating_add(self.recent)
    }

    /// What either protects.
    pub fn union(self, other: Self) -> Self {
        Self { sinks: self.sinks.max(other.sinks), recent: self.recent.max(other.recent) }
    }
}

/// What one layer holds, this call's tokens included, as far as the policy [needs](EvictionPolicy::needs) it.
#[derive(Debug)]
pub struct Held<'a> {
    /// The layer's numbers.
    pub shape: &'a AttentionShape,
    /// The layer's rotary embedding.
    pub rope: &'a Rope,
    /// The position of the token to come.
    pub next_position: usize,
    /// Queries before the rotary embedding, `[batch, heads, queries, head_dim]`; the last is that of the newest token.
    pub queries: Option<&'a Tensor>,
    /// Each batch entry's kv heads, `[batch * kv_heads]`.
    pub heads: Vec<HeldHead<'a>>,
}

/// One kv head's entries, oldest first.
#[derive(Debug)]
pub struct HeldHead<'a> {
    /// The positions in the text at which the entries came.
    pub positions: &'a [u32],
    /// Rotated keys, `[entries, head_dim]`, row-major.
    pub keys: Vec<f32>,
    /// Values, `[entries, head_dim]`, row-major.
    pub values: Vec<f32>,
    /// The attention mass that each query head of the group gave to each entry, and the number of queries that gave it.
    pub mass: &'a [Vec<f32>],
    /// How many queries `mass` is the sum of.
    pub mass_queries: usize,
    /// The scores that the policy gave last time; 0 for entries that came since.
    pub previous: &'a [f32],
}

impl Selection {
    /// The entries with the highest scores, as many as each head's budget, protected ones first. Of equal scores the older entry stays.
    ///
    /// ```
    /// use longctx_core::{Protected, Selection};
    ///
    /// let scores = vec![vec![0.1, 0.9, 0.2, 0.8, 0.3]];
    /// let keep = Selection::top(&scores, &[3], Protected { sinks: 1, recent: 1 });
    /// assert_eq!(keep.heads(), [[0, 1, 4]]);
    /// ```
    pub fn top(scores: &[Vec<f32>], budgets: &[usize], protected: Protected) -> Self {
        let head = |(scores, budget): (&Vec<f32>, &usize)| top(scores, *budget, protected);
        Self::new(scores.iter().zip(budgets).map(head).collect())
    }
}

fn top(scores: &[f32], budget: usize, protected: Protected) -> Vec<u32> {
    let len = scores.len();
    if len <= budget {
        return (0..len as u32).collect();
    }
    let sinks = protected.sinks.min(budget);
    let recent = protected.recent.min(budget - sinks);
    let mut middle: Vec<u32> = (sinks as u32..(len - recent) as u32).collect();
    let wanted = budget - sinks - recent;
    // NaN, which compares with nothing, loses against every number.
    let score = |i: u32| match scores[i as usize] {
        x if x.is_nan() => f32::NEG_INFINITY,
        x => x,
    };
    let best_first = |a: &u32, b: &u32| score(*b).total_cmp(&score(*a)).then(a.cmp(b));
    if wanted > 0 && wanted < middle.len() {
        middle.select_nth_unstable_by(wanted - 1, best_first);
    }
    middle.truncate(wanted);
    middle.sort_unstable();
    (0..sinks as u32).chain(middle).chain((len - recent) as u32..len as u32).collect()
}

impl<P: EvictionPolicy + ?Sized> EvictionPolicy for Box<P> {
    fn needs(&self) -> Needs {
        (**self).needs()
    }
    fn score(&self, held: &Held<'_>) -> Result<Vec<Vec<f32>>> {
        (**self).score(held)
    }
    fn protects(&self, budget: usize) -> Protected {
        (**self).protects(budget)
    }
    fn budgets(&self, budget: f64, seen: usize, heads: usize) -> Vec<usize> {
        (**self).budgets(budget, seen, heads)
    }
    fn bounds_heads(&self) -> bool {
        (**self).bounds_heads()
    }
    fn is_over(&self, lens: &[usize], budgets: &[usize]) -> bool {
        (**self).is_over(lens, budgets)
    }
    fn select(
        &self,
        scores: &[Vec<f32>],
        budgets: &[usize],
        shape: &AttentionShape,
        protected: Protected,
    ) -> Selection {
        (**self).select(scores, budgets, shape, protected)
    }
    fn rerotates(&self) -> bool {
        (**self).rerotates()
    }
    fn decode_step(&self) -> Option<usize> {
        (**self).decode_step()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_entries_win_ties_and_nan_loses() {
        let scores = vec![vec![1.0, f32::NAN, 1.0, 2.0, 1.0], vec![f32::NEG_INFINITY, 0.0, 0.0]];
        let keep = Selection::top(&scores, &[3, 1], Protected::default());
        assert_eq!(keep.heads(), [vec![0, 2, 3], vec![1]]);
    }

    #[test]
    fn the_budget_binds_even_the_protected() {
        let scores = vec![vec![0.0; 10]];
        let keep = Selection::top(&scores, &[4], Protected { sinks: 3, recent: 3 });
        assert_eq!(keep.heads(), [[0, 1, 2, 9]]);
    }
}
