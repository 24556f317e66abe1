//! The division of a call's work.

use std::ops::Range;

use super::{Mask, PIECE, Queries, ROWS, TILE, check_queries};
use crate::number::Number;
use crate::pool::batch;
use crate::pool::head::Head;
use crate::{Error, Pool, Result};

/// A checked call.
pub struct Call<'a, T> {
    pub pool: &'a Pool,
    pub queries: &'a Queries<'a, T>,
    /// The kv heads of the call's sequences, `[sequences * kv_heads]`.
    pub heads: Vec<&'a Head>,
    /// If the mask lists entries: the visible slots of each head.
    pub listed: Option<Vec<Vec<Range<usize>>>>,
    pub cu_seqlens: &'a [usize],
    causal: bool,
    /// Query heads per kv head.
    pub group: usize,
}

/// Contiguous slots of a unit, and the number of the unit's slots before them.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    pub offset: usize,
    pub slots: Range<usize>,
}

/// A block of queries of one sequence and kv head.
pub struct Unit {
    /// `sequence * kv_heads + kv head`
    pub head: usize,
    /// The queries, as indices into the call's queries.
    pub queries: Range<usize>,
    /// The slots that at least one of them sees, in whole blocks.
    pub spans: Vec<Span>,
}

/// Some pieces of a unit's slots, processed by one thread.
pub struct Item {
    pub unit: usize,
    pub pieces: Range<usize>,
    /// Whether these are all of the unit's slots.
    pub whole: bool,
}

impl Unit {
    /// Returns the number of slots.
    pub fn len(&self) -> usize {
        self.spans.last().map_or(0, |span| span.offset + span.slots.len())
    }

    /// Returns the parts of spans between two offsets, each with the end of its span.
    pub fn parts(&self, offsets: Range<usize>) -> impl Iterator<Item = (Span, usize)> {
        let end = |span: &Span| span.offset + span.slots.len();
        let first = self.spans.partition_point(|span| end(span) <= offsets.start);
        let spans = self.spans[first..].iter();
        let Range { start: from, end: to } = offsets;
        spans.take_while(move |span| span.offset < to).map(move |span| {
            let start = span.offset.max(from);
            let slot = |offset: usize| span.slots.start + offset - span.offset;
            let slots = slot(start)..slot(end(span).min(to));
            (Span { offset: start - from, slots }, span.slots.end)
        })
    }
}

impl<'a, T: Number> Call<'a, T> {
    /// Checks a call.
    ///
    /// # Errors
    /// As [`Pool::attend`].
    pub fn new(
        pool: &'a Pool,
        queries: &'a Queries<'a, T>,
        (seqs, cu_seqlens): (&'a [u64], &'a [usize]),
        mask: Mask<'_>,
    ) -> Result<Self> {
        batch::check(seqs, cu_seqlens)?;
        check_queries(pool, queries, (seqs, cu_seqlens))?;
        let kv_heads = pool.shape().kv_heads;
        let mut heads = Vec::with_capacity(seqs.len() * kv_heads);
        for &seq in seqs {
            heads.extend(&pool.sequence(seq)?.heads);
        }
        let group = queries.heads / kv_heads;
        let causal = mask == Mask::Causal;
        let mut call = Self { pool, queries, heads, listed: None, cu_seqlens, causal, group };
        match mask {
            Mask::Full => {}
            Mask::Causal => call.check_causal()?,
            Mask::Entries(lists) => call.listed = Some(call.list(lists)?),
        }
        Ok(call)
    }

    /// Checks that each causal query's own entry is held.
    fn check_causal(&self) -> Result<()> {
        for (number, head) in self.heads.iter().enumerate() {
            let queries = self.queries_of(number).len();
            if head.len < queries {
                let expected = format!("at least the {queries} tokens of its queries");
                return Err(Error::mismatch("entries of a kv head", expected, head.len));
            }
        }
        Ok(())
    }

    /// Returns the slots of listed ranges of entries.
    fn list(&self, lists: &[Vec<Range<usize>>]) -> Result<Vec<Vec<Range<usize>>>> {
        if lists.len() != self.heads.len() {
            return Err(Error::mismatch("lists of entries", self.heads.len(), lists.len()));
        }
        let slots = |(list, head): (&Vec<Range<usize>>, &&Head)| {
            let mut end = 0;
            for range in list {
                if range.is_empty() || range.start < end || range.end > head.len {
                    let expected = format!("ranges in increasing order within {end}..{}", head.len);
                    return Err(Error::mismatch("listed entries", expected, format!("{range:?}")));
                }
                end = range.end;
            }
            Ok(list.iter().map(|range| head.slot_range(range)).collect())
        };
        lists.iter().zip(&self.heads).map(slots).collect()
    }

    /// Returns the number of output rows.
    pub fn rows(&self) -> usize {
        self.queries.data.len() / self.pool.shape().head_dim
    }

    /// Returns the queries of a head's sequence, as indices into the call's queries.
    pub fn queries_of(&self, head: usize) -> Range<usize> {
        let i = head / self.pool.shape().kv_heads;
        self.cu_seqlens[i]..self.cu_seqlens[i + 1]
    }

    /// Returns the slots that a query sees, ignoring holes and lists.
    pub fn seen(&self, number: usize, query: usize) -> Range<usize> {
        let head = self.heads[number];
        if !self.causal {
            return 0..head.slots();
        }
        let end = head.len - (self.queries_of(number).end - query - 1);
        let start = end.saturating_sub(self.queries.window.unwrap_or(end));
        head.slot_range(&(start..end))
    }

    /// Returns the blocks of a head's queries.
    pub fn query_blocks(&self, head: usize) -> impl Iterator<Item = Range<usize>> {
        blocks(self.queries_of(head), (ROWS / self.group).max(1))
    }

    /// Returns all units of work.
    pub fn units(&self) -> Vec<Unit> {
        let mut units = Vec::new();
        for head in 0..self.heads.len() {
            for queries in self.query_blocks(head) {
                let spans = self.spans(head, &queries);
                units.push(Unit { head, queries, spans });
            }
        }
        units
    }

    fn spans(&self, head: usize, queries: &Range<usize>) -> Vec<Span> {
        let slots = self.heads[head].slots();
        let mut spans: Vec<Span> = Vec::new();
        let mut add = |range: Range<usize>, size: usize| {
            let range = range.start / size * size..range.end.next_multiple_of(size).min(slots);
            match spans.last_mut() {
                Some(last) if last.slots.end >= range.start => last.slots.end = range.end,
                last => {
                    let offset = last.map_or(0, |last| last.offset + last.slots.len());
                    spans.push(Span { offset, slots: range });
                }
            }
        };
        if let Some(listed) = &self.listed {
            let size = self.pool.format().block_tokens();
            listed[head].iter().for_each(|range| add(range.clone(), size));
        } else {
            let last = self.seen(head, queries.end - 1);
            let start = self.seen(head, queries.start).start.min(last.start);
            if start < last.end {
                add(start..last.end, TILE);
                // Slots that no query sees are not scored.
                spans.iter_mut().for_each(|span| span.slots.end = last.end);
            }
        }
        spans
    }

    /// Divides the units among threads. No item is much larger than a thread's share of the total
    /// work.
    pub fn items(&self, units: &[Unit]) -> Vec<Item> {
        // Codes are read once for all rows, which costs as much as the products of a few rows.
        let cost = |unit: &Unit| 4 + self.group * unit.queries.len();
        let total: usize = units.iter().map(|unit| unit.len() * cost(unit)).sum();
        let share = total / (4 * rayon::current_num_threads());
        let mut items = Vec::with_capacity(units.len());
        for (number, unit) in units.iter().enumerate() {
            let pieces = unit.len().div_ceil(PIECE);
            let at_once = (share / (PIECE * cost(unit))).max(1);
            items.extend(blocks(0..pieces, at_once).map(|part| {
                let whole = part.len() == pieces;
                Item { unit: number, pieces: part, whole }
            }));
        }
        items
    }

    /// Returns the output row of a unit's row.
    pub fn row(&self, unit: &Unit, row: usize) -> usize {
        let (g, i) = (row / unit.queries.len(), row % unit.queries.len());
        let kv_head = unit.head % self.pool.shape().kv_heads;
        (unit.queries.start + i) * self.queries.heads + kv_head * self.group + g
    }
}

/// Splits a range into parts of a size.
pub fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(size).map(move |start| start..(start + size).min(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_spans() {
        let span = |offset, slots| Span { offset, slots };
        let spans = vec![span(0, 32..64), span(32, 128..256), span(160, 512..530)];
        let unit = Unit { head: 0, queries: 0..1, spans };
        assert_eq!(unit.len(), 178);
        let parts: Vec<_> = unit.parts(0..128).collect();
        assert_eq!(parts, [(span(0, 32..64), 64), (span(32, 128..224), 256)]);
        let parts: Vec<_> = unit.parts(128..256).collect();
        assert_eq!(parts, [(span(0, 224..256), 256), (span(32, 512..530), 530)]);
    }
}
