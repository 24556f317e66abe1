//! Attention probabilities accumulated per entry.

use std::ops::Range;

use super::TILE;
use super::plan::{Call, Span, blocks};
use super::score::Buffers;
use crate::number::Number;
use rayon::prelude::*;

/// Slots whose sums one thread computes at a time.
const PART: usize = 4 * TILE;

impl<T: Number> Call<'_, T> {
    /// Returns attention probabilities summed over queries: one vector of entries for each sequence
    /// and query head.
    pub fn sums(&self, lse: &[f32]) -> Vec<Vec<f32>> {
        let parts: Vec<_> = (0..self.heads.len())
            .flat_map(|head| blocks(0..self.heads[head].slots(), PART).map(move |p| (head, p)))
            .collect();
        let parts: Vec<_> = parts
            .into_par_iter()
            .map_init(Buffers::default, |buffers, (head, part)| {
                (head, self.sums_of_part(head, &part, lse, buffers))
            })
            .collect();
        let mut sums = vec![Vec::new(); self.heads.len() * self.group];
        for (head, parts) in parts {
            for (g, part) in parts.into_iter().enumerate() {
                sums[head * self.group + g].extend(part);
            }
        }
        sums
    }

    fn sums_of_part(
        &self,
        head: usize,
        part: &Range<usize>,
        lse: &[f32],
        buffers: &mut Buffers,
    ) -> Vec<Vec<f32>> {
        let kv_head = head % self.pool.shape().kv_heads;
        let mut sums = vec![vec![0.0; part.len()]; self.group];
        for queries in self.query_blocks(head) {
            let seen = self.seen_by(head, &queries);
            self.gather_queries(head, &queries, buffers);
            for slots in blocks(part.clone(), TILE).filter(|slots| self.sees_any(head, slots)) {
                self.begin_scores(buffers);
                let span = Span { offset: 0, slots: slots.clone() };
                self.score(head, &span, &seen, buffers);
                for (row, scores) in buffers.scores.chunks_exact_mut(TILE).enumerate() {
                    let (g, query) = (row / queries.len(), queries.start + row % queries.len());
                    let lse = lse[query * self.queries.heads + kv_head * self.group + g];
                    if lse > f32::NEG_INFINITY {
                        let scores = &mut scores[..slots.len()];
                        longctx_simd::exp_sum(scores, lse);
                        let at = slots.start - part.start;
                        longctx_simd::add(scores, &mut sums[g][at..at + slots.len()]);
                    }
                }
            }
        }
        for sums in &mut sums {
            let mut slots = part.clone();
            sums.retain(|_| slots.next().is_some_and(|slot| self.heads[head].is_valid(slot)));
        }
        sums
    }

    /// Returns whether the mask lists an entry among the slots.
    fn sees_any(&self, head: usize, slots: &Range<usize>) -> bool {
        self.listed.as_ref().is_none_or(|listed| {
            let first = listed[head].partition_point(|range| range.end <= slots.start);
            listed[head].get(first).is_some_and(|range| range.start < slots.end)
        })
    }
}
