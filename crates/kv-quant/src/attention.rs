//! Attention over packed heads, on slices.
//!
//! Online softmax over blocks of entries (FlashAttention, arXiv 2205.14135); a kv head's codes are unpacked in registers, once for
//! all queries of its group. Work is cut into kv heads, blocks of queries and, if these are few, ranges of entries, and shared over threads.

use std::ops::Range;

use crate::hadamard::hadamard;
use crate::head::Head;
use crate::kernel::Rows;
use crate::packed::PANEL;
use crate::product::Scratch;
use crate::rotary::{Place, Turned};
use crate::{Error, KeyBasis, Packed, Result, vector};
use rayon::prelude::*;

/// Slots of a block; a multiple of every chunk's size.
const BLOCK: usize = 128;
/// Query rows of a tile.
const ROWS: usize = 64;
/// A part of the slots smaller than this is not worth a thread's wake-up.
const MIN_SPLIT: usize = 512;

/// Queries and how they attend.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// `[batch, heads, tokens, head_dim]`
    pub data: &'a [f32],
    /// Query heads of a batch entry.
    pub heads: usize,
    /// Query tokens.
    pub tokens: usize,
    /// Scores are q·k times this.
    pub scale: f32,
    /// Scores s become `cap * tanh(s / cap)`.
    pub soft_cap: Option<f32>,
}

/// The softmax-weighted sums of values, and the logarithms of the sums of exponentiated scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Attended {
    /// `[batch, heads, tokens, head_dim]`; zero where a query sees nothing.
    pub out: Vec<f32>,
    /// `[batch, heads, tokens]`; -inf where a query sees nothing.
    pub lse: Vec<f32>,
}

/// Attention of `queries` over `kv_heads` (`[batch * kv_heads]`, in the order of the queries' batch entries).
///
/// `visible` gives, for a kv head's number and a query token, the entries that it sees; its ranges' ends must not decrease from query to query.
///
/// # Errors
/// [`Error::Mismatch`] if the queries don't fit the heads, or a query sees entries that are not held or fewer than the one before it;
/// [`Error::NotFinite`] for NaN or infinity among the queries: the row is counted through `[batch, heads, tokens]`.
pub fn attend(
    kv_heads: &[Head],
    batch: usize,
    queries: &Queries<'_>,
    visible: impl Fn(usize, usize) -> Range<usize> + Sync,
) -> Result<Attended> {
    let call = Call::new(kv_heads, batch, queries, &visible)?;
    let tiles: Vec<_> = call
        .plan()
        .into_par_iter()
        .map_init(Buffers::default, |buffers, item| {
            let tile = call.attend(&item, buffers);
            (item, tile)
        })
        .collect();
    Ok(call.gather(tiles))
}

/// Attention probability that each entry receives, summed over the queries: for query head h of batch entry b, the vector
/// `[b * heads + h]`, one number per entry of its kv head.
///
/// `lse` (`[batch, heads, tokens]`) is the log-sum-exp of all that the queries see, here and elsewhere.
///
/// # Errors
/// As [`attend`], and if `lse` has another length.
pub fn mass(
    kv_heads: &[Head],
    batch: usize,
    queries: &Queries<'_>,
    lse: &[f32],
    visible: impl Fn(usize, usize) -> Range<usize> + Sync,
) -> Result<Vec<Vec<f32>>> {
    let call = Call::new(kv_heads, batch, queries, &visible)?;
    if lse.len() != batch * queries.heads * queries.tokens {
        let expected = format!("{batch} x {} x {} numbers", queries.heads, queries.tokens);
        return Err(Error::mismatch("lse", expected, lse.len()));
    }
    let parts: Vec<_> = (0..kv_heads.len())
        .flat_map(|h| blocks(0..kv_heads[h].slot_count(), MIN_SPLIT).map(move |part| (h, part)))
        .collect();
    let sums: Vec<_> = parts
        .into_par_iter()
        .map_init(Buffers::default, |buffers, (h, part)| (h, call.mass(h, &part, lse, buffers)))
        .collect();
    let mut mass = vec![Vec::new(); batch * queries.heads];
    for (head, parts) in sums {
        for (g, part) in parts.into_iter().enumerate() {
            mass[head * call.group + g].extend(part);
        }
    }
    Ok(mass)
}

struct Call<'a, V> {
    kv_heads: &'a [Head],
    q: &'a Queries<'a>,
    visible: &'a V,
    head_dim: usize,
    /// Query heads of a kv head.
    group: usize,
}

/// A tile's share of the work.
struct Item {
    head: usize,
    queries: Range<usize>,
    slots: Range<usize>,
}

/// For each row the sum of weighted values, the largest score and the sum of weights.
struct Tile {
    out: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
    /// From row to row of `out`: head_dim in whole lines.
    stride: usize,
}

#[derive(Default)]
struct Buffers {
    q: Vec<f32>,
    scores: Vec<f32>,
    row: Vec<f32>,
    turned: Turned,
    scratch: Scratch,
}

impl<'a, V: Fn(usize, usize) -> Range<usize> + Sync> Call<'a, V> {
    fn new(kv_heads: &'a [Head], batch: usize, q: &'a Queries<'a>, visible: &'a V) -> Result<Self> {
        let Some(first) = kv_heads.first() else {
            return Err(Error::mismatch("kv heads", "at least one", 0));
        };
        let head_dim = first.head_dim();
        if let Some(other) = kv_heads.iter().find(|head| head.head_dim() != head_dim) {
            let expected = format!("{head_dim} channels, as the first has");
            return Err(Error::mismatch("kv heads", expected, other.head_dim()));
        }
        let heads = batch.saturating_mul(q.heads);
        let fit = heads > 0
            && kv_heads.len().is_multiple_of(batch)
            && heads.is_multiple_of(kv_heads.len());
        if !fit {
            let expected = format!("a multiple of the batch, {batch}, that divides {heads} heads");
            return Err(Error::mismatch("kv heads", expected, kv_heads.len()));
        }
        if q.data.len() != heads.saturating_mul(q.tokens).saturating_mul(head_dim) {
            let expected = format!("{heads} heads x {} tokens x {head_dim}", q.tokens);
            return Err(Error::mismatch("queries", expected, q.data.len()));
        }
        if let Some(at) = q.data.iter().position(|x| !x.is_finite()) {
            let (value, row, column) = (q.data[at], at / head_dim, at % head_dim);
            return Err(Error::NotFinite { value, row, column });
        }
        let call = Self { kv_heads, q, visible, head_dim, group: heads / kv_heads.len() };
        call.check_visible()?;
        Ok(call)
    }

    fn check_visible(&self) -> Result<()> {
        for (number, head) in self.kv_heads.iter().enumerate() {
            let mut before = 0;
            for query in 0..self.q.tokens {
                let end = (self.visible)(number, query).end;
                if end < before || end > head.len() {
                    let expected = format!("an end from {before} to {}", head.len());
                    let got = format!("{end} for query {query} and kv head {number}");
                    return Err(Error::mismatch("visible entries", expected, got));
                }
                before = end;
            }
        }
        Ok(())
    }

    fn plan(&self) -> Vec<Item> {
        let queries: Vec<_> = self.query_blocks().collect();
        let wanted = 4 * rayon::current_num_threads();
        let splits = wanted.div_ceil((self.kv_heads.len() * queries.len()).max(1));
        let mut items = Vec::new();
        for head in 0..self.kv_heads.len() {
            for queries in &queries {
                let slots = self.visible_slots(head, queries);
                // Ranges begin at whole blocks, and so at whole chunks.
                let slots = slots.start / BLOCK * BLOCK..slots.end;
                let size = slots.len().div_ceil(splits).max(MIN_SPLIT).next_multiple_of(BLOCK);
                items.extend(blocks(slots, size).map(|slots| Item {
                    head,
                    queries: queries.clone(),
                    slots,
                }));
            }
        }
        items
    }

    fn query_blocks(&self) -> impl Iterator<Item = Range<usize>> {
        blocks(0..self.q.tokens, (ROWS / self.group).max(1))
    }

    /// Slots that at least one of the queries sees.
    fn visible_slots(&self, head: usize, queries: &Range<usize>) -> Range<usize> {
        let of = |query| (self.visible)(head, query);
        let start = queries.clone().map(|query| of(query).start).min().unwrap_or(0);
        self.kv_heads[head].slot_range(&(start..of(queries.end - 1).end))
    }

    fn attend(&self, item: &Item, buffers: &mut Buffers) -> Tile {
        let head = &self.kv_heads[item.head];
        let rows = self.group * item.queries.len();
        let mut tile = Tile::new(rows, self.head_dim);
        let seen = self.seen(item.head, &item.queries);
        self.gather_queries(item.head, &item.queries, buffers);
        for slots in blocks(item.slots.clone(), BLOCK) {
            self.score(head, &seen, &slots, buffers);
            tile.soften(&mut buffers.scores, slots.len());
            tile.weigh(head, &slots, buffers);
        }
        tile
    }

    fn mass(
        &self,
        head: usize,
        part: &Range<usize>,
        lse: &[f32],
        buffers: &mut Buffers,
    ) -> Vec<Vec<f32>> {
        let kv_head = &self.kv_heads[head];
        let mut sums = vec![vec![0.0; part.len()]; self.group];
        for queries in self.query_blocks() {
            let seen = self.seen(head, &queries);
            self.gather_queries(head, &queries, buffers);
            for slots in blocks(part.clone(), BLOCK) {
                self.score(kv_head, &seen, &slots, buffers);
                for (row, scores) in buffers.scores.chunks_exact_mut(BLOCK).enumerate() {
                    let (g, i) = (row / queries.len(), row % queries.len());
                    let lse = lse[(head * self.group + g) * self.q.tokens + queries.start + i];
                    if lse > f32::NEG_INFINITY {
                        let scores = &mut scores[..slots.len()];
                        vector::exp_sum(scores, lse);
                        let at = slots.start - part.start;
                        vector::add(scores, &mut sums[g][at..at + slots.len()]);
                    }
                }
            }
        }
        for sums in &mut sums {
            let mut slots = part.clone();
            sums.retain(|_| slots.next().is_some_and(|slot| kv_head.is_live(slot)));
        }
        sums
    }

    /// The slots that each query of a block sees.
    fn seen(&self, head: usize, queries: &Range<usize>) -> Vec<Range<usize>> {
        let kv_head = &self.kv_heads[head];
        queries.clone().map(|query| kv_head.slot_range(&(self.visible)(head, query))).collect()
    }

    /// The queries of a kv head's group, scaled and in the keys' basis: row `g * queries.len() + i` is query i of the g-th head.
    fn gather_queries(&self, head: usize, queries: &Range<usize>, buffers: &mut Buffers) {
        let d = self.head_dim;
        let out = &mut buffers.q;
        out.clear();
        buffers.turned.clear();
        for g in 0..self.group {
            let start = ((head * self.group + g) * self.q.tokens + queries.start) * d;
            out.extend_from_slice(&self.q.data[start..start + queries.len() * d]);
        }
        vector::scale(out, self.q.scale);
        if self.kv_heads[head].format().basis() == KeyBasis::Hadamard {
            hadamard(out, d);
        }
    }

    /// Scores of all rows against a block of slots, rows `BLOCK` apart; -inf where a row sees no entry.
    fn score(
        &self,
        head: &Head,
        seen: &[Range<usize>],
        slots: &Range<usize>,
        buffers: &mut Buffers,
    ) {
        let Buffers { q, scores, row, turned, scratch } = buffers;
        let d = self.head_dim;
        let rows = q.len() / d;
        scores.clear();
        scores.resize(rows * BLOCK, 0.0);
        let x = Rows { data: q, stride: d, count: rows, steps: d };
        let size = head.format().chunk();
        for (first, chunk) in chunks(&head.keys, size, slots) {
            // The block's values come next.
            let next = head.values.get(first / size);
            let out = &mut scores[first - slots.start..];
            match head.rotary() {
                Some(rotary) => {
                    let place = Place { rotary, token: first, turned };
                    chunk.accumulate_rotated(q, place, out, BLOCK, scratch);
                }
                None => chunk.accumulate(x, next, out, BLOCK, scratch),
            }
        }
        row.resize(d, 0.0);
        for slot in slots.start.max(head.packed_keys())..slots.end {
            head.new_keys.widen(slot - head.packed_keys(), row);
            let mut q = q.as_slice();
            if let Some(rotary) = head.rotary() {
                rotary.rotate_row(row, slot % PANEL);
                q = turned.turn(q, d, rotary, slot - slot % PANEL);
            }
            for (q, scores) in q.chunks_exact(d).zip(scores.chunks_exact_mut(BLOCK)) {
                scores[slot - slots.start] = vector::dot(q, row);
            }
        }
        if let Some(cap) = self.q.soft_cap {
            scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
        }
        self.hide(head, seen, slots, scores);
    }

    fn hide(&self, head: &Head, seen: &[Range<usize>], slots: &Range<usize>, scores: &mut [f32]) {
        let holes: Vec<usize> = if head.len() == head.slot_count() {
            Vec::new()
        } else {
            slots.clone().filter(|&slot| !head.is_live(slot)).map(|s| s - slots.start).collect()
        };
        for (row, scores) in scores.chunks_exact_mut(BLOCK).enumerate() {
            let seen = &seen[row % seen.len()];
            let before = seen.start.saturating_sub(slots.start).min(slots.len());
            let until = seen.end.saturating_sub(slots.start).min(slots.len());
            scores[..before].fill(f32::NEG_INFINITY);
            scores[until.max(before)..].fill(f32::NEG_INFINITY);
            holes.iter().for_each(|&hole| scores[hole] = f32::NEG_INFINITY);
        }
    }

    /// Joins the tiles of one block of queries, divides by the sums of weights, and puts rows in their places.
    fn gather(&self, tiles: Vec<(Item, Tile)>) -> Attended {
        let d = self.head_dim;
        let rows = self.q.data.len() / d;
        let (mut out, mut lse) = (vec![0.0; rows * d], vec![f32::NEG_INFINITY; rows]);
        let mut tiles = tiles.into_iter().peekable();
        while let Some((item, mut tile)) = tiles.next() {
            let same = |other: &Item| other.head == item.head && other.queries == item.queries;
            while let Some((_, other)) = tiles.next_if(|(other, _)| same(other)) {
                tile.join(&other);
            }
            for row in (0..tile.sum.len()).filter(|&row| tile.sum[row] > 0.0) {
                let (g, i) = (row / item.queries.len(), row % item.queries.len());
                let head = item.head * self.group + g;
                let to = head * self.q.tokens + item.queries.start + i;
                let place = &mut out[to * d..(to + 1) * d];
                place.copy_from_slice(&tile.out[row * tile.stride..][..d]);
                vector::scale(place, tile.sum[row].recip());
                lse[to] = tile.max[row] + tile.sum[row].ln();
            }
        }
        Attended { out, lse }
    }
}

impl Tile {
    fn new(rows: usize, head_dim: usize) -> Self {
        let stride = head_dim.next_multiple_of(16);
        Self {
            out: vec![0.0; rows * stride],
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
            stride,
        }
    }

    /// Turns scores into weights relative to each row's largest score so far, and rescales what was summed before.
    fn soften(&mut self, scores: &mut [f32], width: usize) {
        for (row, scores) in scores.chunks_exact_mut(BLOCK).enumerate() {
            let scores = &mut scores[..width];
            let max = self.max[row].max(vector::max(scores));
            if max == f32::NEG_INFINITY {
                scores.fill(0.0);
                continue;
            }
            let sum = vector::exp_sum(scores, max);
            if max > self.max[row] {
                let shrink = (self.max[row] - max).exp();
                self.sum[row] *= shrink;
                vector::scale(&mut self.out[row * self.stride..][..self.stride], shrink);
                self.max[row] = max;
            }
            self.sum[row] += sum;
        }
    }

    /// Adds the values of a block of slots, weighted with the scores that [`soften`](Self::soften) left.
    fn weigh(&mut self, head: &Head, slots: &Range<usize>, buffers: &mut Buffers) {
        let Buffers { scores, row, scratch, .. } = buffers;
        let size = head.format().chunk();
        for (first, chunk) in chunks(&head.values, size, slots) {
            // The next block's keys come next.
            let next = head.keys.get((first + BLOCK) / size);
            let steps = chunk.rows().min(slots.end - first);
            let data = &scores[first - slots.start..];
            let x = Rows { data, stride: BLOCK, count: self.sum.len(), steps };
            chunk.accumulate(x, next, &mut self.out, self.stride, scratch);
        }
        row.resize(head.head_dim(), 0.0);
        for slot in slots.start.max(head.packed_values())..slots.end {
            head.new_values.widen(slot - head.packed_values(), row);
            for (out, weights) in
                self.out.chunks_exact_mut(self.stride).zip(scores.chunks_exact(BLOCK))
            {
                vector::add_scaled(weights[slot - slots.start], row, out);
            }
        }
    }

    fn join(&mut self, other: &Tile) {
        for row in 0..self.max.len() {
            let max = self.max[row].max(other.max[row]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let (a, b) = ((self.max[row] - max).exp(), (other.max[row] - max).exp());
            let ours = &mut self.out[row * self.stride..][..self.stride];
            vector::scale(ours, a);
            vector::add_scaled(b, &other.out[row * self.stride..][..self.stride], ours);
            self.sum[row] = self.sum[row] * a + other.sum[row] * b;
            self.max[row] = max;
        }
    }
}

/// The chunks that lie in a block of slots, each with its first slot.
fn chunks<'a>(
    all: &'a [Packed],
    size: usize,
    slots: &Range<usize>,
) -> impl Iterator<Item = (usize, &'a Packed)> {
    let first = slots.start / size;
    let last = slots.end.div_ceil(size).min(all.len());
    all[first.min(last)..last].iter().zip(first..).map(move |(chunk, i)| (i * size, chunk))
}

fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(size).map(move |start| start..(start + size).min(end))
}
