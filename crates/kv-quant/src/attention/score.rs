//! Scores of queries against tiles of entries.

use std::ops::Range;

use super::plan::{Call, Item, Span, Unit, blocks};
use super::tile::Tile;
use super::{PIECE, TILE};
use crate::hadamard::hadamard;
use crate::kernel::{Rows, widen_into};
use crate::layout::PANEL;
use crate::number::Number;
use crate::product::Scratch;
use crate::rotary::{BackRotatedQueries, ChunkPosition};

#[derive(Default)]
pub struct Buffers {
    q: Vec<f32>,
    /// Scores; rows are [`TILE`] apart.
    pub scores: Vec<f32>,
    pub row: Vec<f32>,
    back_rotated: BackRotatedQueries,
    pub scratch: Scratch,
}

impl<T: Number> Call<'_, T> {
    /// Computes the sums of an item's pieces. They are merged if the item is the whole unit.
    pub fn attend(&self, units: &[Unit], item: &Item, buffers: &mut Buffers) -> Vec<Tile> {
        let unit = &units[item.unit];
        self.gather_queries(unit.head, &unit.queries, buffers);
        let seen = self.seen_by(unit.head, &unit.queries);
        let mut tiles: Vec<Tile> = Vec::new();
        for piece in item.pieces.clone() {
            let tile = self.attend_piece(unit, piece, &seen, buffers);
            match tiles.last_mut().filter(|_| item.whole) {
                Some(sum) => sum.merge(&tile),
                None => tiles.push(tile),
            }
        }
        tiles
    }

    fn attend_piece(
        &self,
        unit: &Unit,
        piece: usize,
        seen: &[Range<usize>],
        buffers: &mut Buffers,
    ) -> Tile {
        let (head, memory) = (self.heads[unit.head], &self.pool.memory);
        let mut tile = Tile::new(self.group * unit.queries.len(), memory.layout.values.columns);
        let end = unit.len().min((piece + 1) * PIECE);
        for offsets in blocks(piece * PIECE..end, TILE) {
            self.begin_scores(buffers);
            for (part, _) in unit.parts(offsets.clone()) {
                self.score(unit.head, &part, seen, buffers);
            }
            tile.update_softmax(&mut buffers.scores, offsets.len());
            for part in unit.parts(offsets) {
                tile.accumulate_values(head, memory, &part, buffers);
            }
        }
        tile
    }

    /// Returns the slots that each query of a block sees, ignoring holes and lists.
    pub fn seen_by(&self, head: usize, queries: &Range<usize>) -> Vec<Range<usize>> {
        queries.clone().map(|query| self.seen(head, query)).collect()
    }

    /// Copies the queries of a kv head's group, scaled and in the keys' basis: row `g *
    /// queries.len() + i` is query i of the g-th head.
    pub fn gather_queries(&self, head: usize, queries: &Range<usize>, buffers: &mut Buffers) {
        let d = self.pool.shape().head_dim;
        let kv_head = head % self.pool.shape().kv_heads;
        let out = &mut buffers.q;
        out.resize(self.group * queries.len() * d, 0.0);
        buffers.back_rotated.clear();
        let mut rows = out.chunks_exact_mut(d);
        for g in 0..self.group {
            for (query, row) in queries.clone().zip(&mut rows) {
                let at = (query * self.queries.heads + kv_head * self.group + g) * d;
                T::widen_all(&self.queries.data[at..at + d], row);
            }
        }
        longctx_simd::scale(out, self.queries.scale);
        if self.pool.format().keys().rotated {
            hadamard(out, d);
        }
    }

    /// Makes room for the scores of a tile.
    pub fn begin_scores(&self, buffers: &mut Buffers) {
        let rows = buffers.q.len() / self.pool.shape().head_dim;
        buffers.scores.clear();
        buffers.scores.resize(rows * TILE, 0.0);
    }

    /// Computes the scores of all rows against a part of a tile; -inf where a row sees no entry.
    pub fn score(&self, number: usize, part: &Span, seen: &[Range<usize>], buffers: &mut Buffers) {
        let (head, memory) = (self.heads[number], &self.pool.memory);
        let Buffers { q, scores, row, back_rotated, scratch } = buffers;
        let (d, size) = (memory.layout.keys.columns, memory.layout.keys.capacity);
        let (slots, scores) = (&part.slots, &mut scores[part.offset..]);
        let x = Rows { data: q, stride: d, count: q.len() / d, steps: d };
        for first in (slots.start..slots.end.min(head.packed_keys)).step_by(size) {
            let block = head.block(memory, first / size);
            let keys = block.keys();
            let out = &mut scores[first - slots.start..];
            match &self.pool.rotary {
                Some(rotary) => {
                    let position = ChunkPosition { rotary, token: first, back_rotated };
                    keys.accumulate_rotated(q, position, out, TILE, scratch);
                }
                None => {
                    // The block's values are read next.
                    keys.accumulate(x, Some(block.values()), out, TILE, scratch);
                }
            }
        }
        row.resize(d, 0.0);
        for slot in slots.start.max(head.packed_keys)..slots.end {
            widen_into(head.keys.row(&memory.key_pages, slot, d), row);
            if self.pool.format().keys().rotated {
                hadamard(row, d);
            }
            let mut q = q.as_slice();
            if let Some(rotary) = &self.pool.rotary {
                rotary.rotate_row(row, slot % PANEL);
                q = back_rotated.rotate_back(q, d, rotary, slot - slot % PANEL);
            }
            let scores = scores[slot - slots.start..].iter_mut().step_by(TILE);
            for (q, score) in q.chunks_exact(d).zip(scores) {
                *score = longctx_simd::dot(q, row);
            }
        }
        let width = slots.len();
        if let Some(cap) = self.queries.soft_cap {
            for scores in scores.chunks_mut(TILE) {
                scores[..width].iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
            }
        }
        self.hide(number, slots, seen, scores);
    }

    /// Sets scores to -inf where a row does not see a slot.
    fn hide(&self, number: usize, slots: &Range<usize>, seen: &[Range<usize>], scores: &mut [f32]) {
        let hidden = self.hidden(number, slots);
        let within = |slot: usize| slot.saturating_sub(slots.start).min(slots.len());
        for (row, scores) in scores.chunks_mut(TILE).enumerate() {
            let scores = &mut scores[..slots.len()];
            let seen = &seen[row % seen.len()];
            let (before, until) = (within(seen.start), within(seen.end));
            scores[..before].fill(f32::NEG_INFINITY);
            scores[until.max(before)..].fill(f32::NEG_INFINITY);
            hidden.iter().for_each(|&hidden| scores[hidden] = f32::NEG_INFINITY);
        }
    }

    /// Returns the slots that no query sees, relative to the first slot: holes, and slots outside
    /// the mask's lists.
    fn hidden(&self, number: usize, slots: &Range<usize>) -> Vec<usize> {
        let head = self.heads[number];
        let mut hidden = Vec::new();
        if head.has_holes() {
            hidden.extend(slots.clone().filter(|&slot| !head.is_valid(slot)));
        }
        if let Some(listed) = &self.listed {
            let listed = &listed[number];
            let first = listed.partition_point(|range| range.end <= slots.start);
            let mut from = slots.start;
            for range in listed[first..].iter().take_while(|range| range.start < slots.end) {
                hidden.extend(from..range.start.max(from));
                from = range.end.min(slots.end);
            }
            hidden.extend(from..slots.end);
        }
        hidden.iter_mut().for_each(|slot| *slot -= slots.start);
        hidden
    }
}
