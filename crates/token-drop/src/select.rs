//! Selection of entries by score.

use crate::metadata::{EntryMetadata, Kept};
use crate::{HeadBudgets, scores::Scores};
use longctx_core::{Candidates, Ranking, Result, RowReduction, Selection, top_entries};
use rayon::prelude::*;

/// Smallest total number of entries for which the selection uses several threads.
const MIN_PARALLEL: usize = 1 << 13;

/// Entries that are kept regardless of their scores.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Protected {
    /// Number of first entries (attention sinks).
    pub sinks: usize,
    /// Number of newest entries.
    pub recent: usize,
    /// Newest entries as a share of the budget, from 0 to 1. The share and the rest are each
    /// rounded down, as in H2O's published code. The larger of `recent` and this share applies.
    pub recent_share: f64,
}

impl Protected {
    /// Protects the newest `recent` entries.
    pub fn newest(recent: usize) -> Self {
        Self { recent, ..Self::default() }
    }

    /// Protects the first `sinks` entries.
    pub fn sinks(sinks: usize) -> Self {
        Self { sinks, ..Self::default() }
    }

    /// Returns the numbers of protected entries within a budget, and the budget in whole tokens.
    pub(crate) fn counts(self, budget: f64) -> (ProtectedCounts, usize) {
        let share = (self.recent_share * budget) as usize;
        let rest = ((1.0 - self.recent_share) * budget) as usize;
        let protected = ProtectedCounts { sinks: self.sinks, recent: self.recent.max(share) };
        (protected, share.saturating_add(rest).max(1))
    }
}

/// The numbers of protected entries at both ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ProtectedCounts {
    pub sinks: usize,
    pub recent: usize,
}

impl ProtectedCounts {
    pub fn total(self) -> usize {
        self.sinks.saturating_add(self.recent)
    }
}

/// The unit of selection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Granularity {
    /// Single tokens.
    #[default]
    Token,
    /// ChunkKV (Liu et al., arXiv 2502.00299): whole chunks of this many adjacent tokens (20 in
    /// kvpress, 10 in the paper), the same in every head of a layer.
    ///
    /// The score of a chunk is the mean of its tokens' scores, summed over the heads. Protected
    /// entries are kept first, then the best chunks that fit the budget. The next best chunk keeps
    /// its first tokens, up to the budget. kvpress counts chunks instead of tokens, so it can
    /// exceed the budget.
    Chunk(usize),
}

/// The numbers of entries that a sequence may hold after a call.
#[derive(Debug)]
pub(crate) struct Limits {
    /// `[kv_heads]`
    pub budgets: Vec<usize>,
    pub protected: ProtectedCounts,
    /// Whether entries are evicted.
    pub evicts: bool,
}

impl Limits {
    /// Returns the budget of each head if heads do not compete and have the same budget.
    pub fn common_budget(&self, granularity: Granularity, heads: HeadBudgets) -> Option<usize> {
        let independent = granularity == Granularity::Token && heads == HeadBudgets::Uniform;
        let budget = self.budgets[0];
        (independent && self.budgets.iter().all(|own| *own == budget)).then_some(budget)
    }
}

/// Selects the entries to keep: at most the budgets, protected entries first. Of equal scores the
/// older entry is kept. If every head has the same budget and heads do not compete, scores on a
/// device are selected there. Otherwise, and for whole chunks, the host selects.
pub(crate) fn select(
    scores: &Scores,
    limits: &Limits,
    metadata: &EntryMetadata,
    granularity: Granularity,
    heads: HeadBudgets,
) -> Result<(Selection, Option<Kept>)> {
    if let Scores::OnDevice(scores) = scores
        && let Some(budget) = limits.common_budget(granularity, heads)
    {
        let (kv_heads, entries) = scores.dims2()?;
        let (positions, next_position) = metadata.kept_positions(scores.device())?;
        let candidates = Candidates {
            kv_heads,
            scores: scores.unsqueeze(1)?,
            count: budget.min(entries),
            ranking: Ranking {
                reduction: RowReduction::Mean,
                previous: None,
                positions,
                next_position,
                sinks: limits.protected.sinks,
                recent: limits.protected.recent,
            },
        };
        if let Some(top) = top_entries(&[candidates])?.and_then(|mut top| top.pop()) {
            let kept = Kept { positions: top.positions, scores: top.scores };
            return Ok((top.entries, Some(kept)));
        }
    }
    let lists = scores.lists()?;
    let Limits { budgets, protected, .. } = limits;
    Ok((select_on_host(&lists, budgets, *protected, granularity, heads), None))
}

fn select_on_host(
    scores: &[Vec<f32>],
    budgets: &[usize],
    protected: ProtectedCounts,
    granularity: Granularity,
    heads: HeadBudgets,
) -> Selection {
    let of_heads = |scores: &[Vec<f32>]| {
        let head = |(scores, &budget): (&Vec<f32>, &usize)| top_k(scores, budget, protected);
        match scores.iter().map(Vec::len).sum::<usize>() < MIN_PARALLEL {
            true => scores.iter().zip(budgets).map(head).collect(),
            false => scores.par_iter().zip(budgets).map(head).collect(),
        }
    };
    Selection::new(match (granularity, heads) {
        (Granularity::Chunk(chunk), _) => of_heads(&vec![chunk_ranks(scores, chunk); scores.len()]),
        (_, HeadBudgets::Uniform) => of_heads(scores),
        (_, HeadBudgets::Adaptive { safeguard }) => {
            select_adaptive(scores, budgets, protected, safeguard)
        }
    })
}

/// Returns the `budget` entries with the highest scores, in order.
fn top_k(scores: &[f32], budget: usize, protected: ProtectedCounts) -> Vec<u32> {
    let len = scores.len();
    if len <= budget {
        return (0..len as u32).collect();
    }
    let sinks = protected.sinks.min(budget);
    let recent = protected.recent.min(budget - sinks);
    let middle = sinks as u32..(len - recent) as u32;
    let last = match budget - sinks - recent {
        0 => None,
        wanted => {
            let mut ranks: Vec<u64> = middle.clone().map(|i| rank(scores, i)).collect();
            Some(*ranks.select_nth_unstable(wanted - 1).1)
        }
    };
    let kept = middle.filter(|&i| Some(rank(scores, i)) <= last);
    (0..sinks as u32).chain(kept).chain((len - recent) as u32..len as u32).collect()
}

/// Returns a sort key, smaller is better: by score, then by age.
fn rank(scores: &[f32], entry: u32) -> u64 {
    let bits = nan_as_lowest(scores[entry as usize]).to_bits();
    // The order of f32::total_cmp: the bits of negative numbers are inverted.
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | u64::from(entry)
}

/// Replaces NaN, which has no order, with the lowest score.
fn nan_as_lowest(score: f32) -> f32 {
    if score.is_nan() { f32::NEG_INFINITY } else { score }
}

/// Heads compete for the sum of their budgets, except for the safeguard share of each.
fn select_adaptive(
    scores: &[Vec<f32>],
    budgets: &[usize],
    protected: ProtectedCounts,
    safeguard: f64,
) -> Vec<Vec<u32>> {
    let safe = |budget: usize| {
        let share = (budget as f64 * safeguard) as usize;
        share.max(protected.total()).max(usize::from(safeguard > 0.0))
    };
    let safe_of = |(scores, &budget): (&Vec<f32>, &usize)| top_k(scores, safe(budget), protected);
    let mut keep: Vec<Vec<u32>> = scores.iter().zip(budgets).map(safe_of).collect();
    let mut rest: Vec<(usize, u32)> = Vec::new();
    for (head, (scores, kept)) in scores.iter().zip(&keep).enumerate() {
        let mut kept = kept.iter().peekable();
        let others = (0..scores.len() as u32).filter(|i| kept.next_if_eq(&i).is_none());
        rest.extend(others.map(|i| (head, i)));
    }
    let total: usize = budgets.iter().sum();
    let left = total.saturating_sub(keep.iter().map(Vec::len).sum());
    let score = |&(head, i): &(usize, u32)| nan_as_lowest(scores[head][i as usize]);
    if left > 0 && left < rest.len() {
        let best_first = |a: &_, b: &_| score(b).total_cmp(&score(a)).then_with(|| a.cmp(b));
        rest.select_nth_unstable_by(left - 1, best_first);
    }
    rest.into_iter().take(left).for_each(|(head, i)| keep[head].push(i));
    keep.iter_mut().for_each(|head| head.sort_unstable());
    keep
}

/// Returns scores that order tokens by the rank of their chunk first; the best chunk has the
/// highest number.
fn chunk_ranks(heads: &[Vec<f32>], chunk: usize) -> Vec<f32> {
    let len = heads.iter().map(Vec::len).min().unwrap_or(0);
    let mean = |start: usize| {
        let end = (start + chunk).min(len);
        let sum: f32 = heads.iter().flat_map(|head| &head[start..end]).sum();
        sum / (end - start) as f32
    };
    let means: Vec<_> = (0..len).step_by(chunk).map(mean).collect();
    let mut order: Vec<_> = (0..means.len()).collect();
    let score = |i: usize| nan_as_lowest(means[i]);
    order.sort_by(|&a, &b| score(a).total_cmp(&score(b)).then(b.cmp(&a)));
    let mut ranks = vec![0.0; len];
    for (rank, i) in order.into_iter().enumerate() {
        ranks[i * chunk..((i + 1) * chunk).min(len)].fill(rank as f32);
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_select_older_entries_and_nan_is_last() {
        let none = ProtectedCounts::default();
        assert_eq!(top_k(&[1.0, f32::NAN, 1.0, 2.0, 1.0], 3, none), [0, 2, 3]);
        assert_eq!(top_k(&[f32::NEG_INFINITY, 0.0, 0.0], 1, none), [1]);
    }

    #[test]
    fn the_best_are_those_of_a_sorted_list() {
        let mut state = 1u64;
        let mut number = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as usize
        };
        let some = [0.0, -0.0, 1.5, -1.5, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, -3e8];
        for len in [1, 2, 30, 500] {
            let scores: Vec<f32> = (0..len).map(|_| some[number() % some.len()]).collect();
            for budget in 1..=len {
                let protected = ProtectedCounts { sinks: number() % 3, recent: number() % 4 };
                let got = top_k(&scores, budget, protected);
                let sinks = protected.sinks.min(budget);
                let recent = protected.recent.min(budget - sinks);
                let mut all: Vec<u32> = (0..len as u32).collect();
                let is_protected = |i: &u32| (*i as usize) < sinks || *i as usize >= len - recent;
                all.sort_by(|a, b| {
                    let score = |i: &u32| nan_as_lowest(scores[*i as usize]);
                    let by_score = score(b).total_cmp(&score(a)).then(a.cmp(b));
                    is_protected(b).cmp(&is_protected(a)).then(by_score)
                });
                let mut want = all[..budget].to_vec();
                want.sort_unstable();
                assert_eq!(got, want, "{scores:?}, {budget}, {protected:?}");
            }
        }
    }

    #[test]
    fn the_budget_limits_protected_entries_too() {
        assert_eq!(top_k(&[0.0; 10], 4, ProtectedCounts { sinks: 3, recent: 3 }), [0, 1, 2, 9]);
    }

    #[test]
    fn a_share_and_the_rest_are_each_rounded_down() {
        let half = Protected { recent_share: 0.5, ..Default::default() };
        assert_eq!(half.counts(25.9), (ProtectedCounts { sinks: 0, recent: 12 }, 24));
        let both = Protected { sinks: 2, recent: 7, recent_share: 0.1 };
        assert_eq!(both.counts(50.0), (ProtectedCounts { sinks: 2, recent: 7 }, 50));
        assert_eq!(Protected::default().counts(0.3), (ProtectedCounts::default(), 1));
    }

    #[test]
    fn heads_compete_above_the_safeguard() {
        let scores = vec![vec![0.9, 0.8, 0.7, 0.6], vec![0.1, 0.2, 0.3, 0.65]];
        let keep = |safeguard, protected| select_adaptive(&scores, &[2, 2], protected, safeguard);
        let none = ProtectedCounts::default();
        assert_eq!(keep(0.0, none), [vec![0, 1, 2], vec![3]]);
        assert_eq!(keep(1.0, none), [vec![0, 1], vec![2, 3]]);
        assert_eq!(keep(0.5, ProtectedCounts { sinks: 1, recent: 0 }), [vec![0, 1, 2], vec![0]]);
    }

    #[test]
    fn whole_chunks_stay() {
        // Means over both heads of chunks of two: 3, 5, 1 and, for the single last token, 4.
        let scores =
            vec![vec![1.0, 2.0, 2.0, 3.0, 0.0, 1.0, 2.0], vec![1.0, 2.0, 2.0, 3.0, 0.0, 1.0, 2.0]];
        let keep = |budget, granularity| {
            let uniform = HeadBudgets::Uniform;
            let keep = select_on_host(
                &scores,
                &[budget; 2],
                ProtectedCounts::default(),
                granularity,
                uniform,
            );
            keep.heads().unwrap()[1].clone()
        };
        assert_eq!(keep(3, Granularity::Chunk(2)), [2, 3, 6]);
        assert_eq!(keep(4, Granularity::Chunk(2)), [0, 2, 3, 6]);
    }
}
