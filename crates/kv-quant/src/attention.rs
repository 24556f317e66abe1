//! Attention over a pool's sequences.
//!
//! Online softmax over tiles of entries (FlashAttention, arXiv 2205.14135); a kv head's codes are
//! unpacked in registers, once for all queries of its group. The work of a call is cut into
//! sequences, kv heads, blocks of queries and pieces of entries, and shared over threads.

mod plan;
mod score;
mod sums;
mod tile;

use std::ops::Range;

use crate::number::Number;
use crate::pool::batch;
use crate::{Error, Pool, Position, Result};
use plan::Call;
use rayon::prelude::*;
use score::Buffers;
use tile::Tile;

/// Slots of a tile; a multiple of every block's size.
const TILE: usize = 128;
/// Slots whose weighted values are summed by themselves before sums are joined, on any number of
/// threads and whatever else a call does: so a sequence has the same result, bit by bit, in every
/// batch.
const PIECE: usize = 16 * TILE;
/// Query rows of a tile.
const ROWS: usize = 64;

/// The queries of some sequences, and how they attend.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a, T = f32> {
    /// `[tokens, heads, head_dim]`
    pub data: &'a [T],
    /// Query heads.
    pub heads: usize,
    /// Scores are q·k times this.
    pub scale: f32,
    /// Scores s become `cap * tanh(s / cap)`.
    pub soft_cap: Option<f32>,
    /// Under [`Mask::Causal`], a query sees so many entries at most: the newest, its own included.
    pub window: Option<usize>,
}

/// Which entries of its sequence a query sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mask<'a> {
    /// Every query sees every entry.
    Full,
    /// A sequence's last n entries are its n queries' own tokens. A query sees the entries up to its
    /// own, within the window.
    Causal,
    /// Every query of a sequence sees the ranges of entries listed for it: `[sequences * kv_heads]`
    /// lists, each of disjoint ranges in increasing order. Blocks without such entries are not read.
    Entries(&'a [Vec<Range<usize>>]),
}

/// The softmax-weighted sums of values, and the logarithms of the sums of exponentiated scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Attended {
    /// `[tokens, heads, value_dim]`; zero where a query sees nothing.
    pub out: Vec<f32>,
    /// `[tokens, heads]`; -inf where a query sees nothing.
    pub lse: Vec<f32>,
}

impl Pool {
    /// Attention of the queries of some sequences, one after the other, over what the pool holds of
    /// them. The i-th sequence's queries are those from `cu_seqlens[i]` to `cu_seqlens[i + 1]`.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] if the queries or `cu_seqlens` do not fit, a
    /// head holds fewer entries than its sequence has queries that see themselves, or the mask's
    /// ranges do not fit the entries; [`Error::NotFinite`] for NaN or infinity among the queries.
    pub fn attend<T: Number>(
        &self,
        queries: &Queries<'_, T>,
        seqs: &[u64],
        cu_seqlens: &[usize],
        mask: Mask<'_>,
    ) -> Result<Attended> {
        let rows = queries.data.len() / self.shape().head_dim;
        let mut out = vec![0f32; rows * self.shape().value_dim];
        let mut lse = vec![0.0; rows];
        self.attend_into(queries, seqs, cu_seqlens, mask, &mut out, &mut lse)?;
        Ok(Attended { out, lse })
    }

    /// [`attend`](Self::attend) into the caller's memory: `out`, `[tokens, heads, value_dim]`, in
    /// f32, f16 or bf16, and `lse`, `[tokens, heads]`.
    ///
    /// # Errors
    /// As [`attend`](Self::attend), and [`Error::Mismatch`] if a slice has another length.
    pub fn attend_into<T: Number, O: Number>(
        &self,
        queries: &Queries<'_, T>,
        seqs: &[u64],
        cu_seqlens: &[usize],
        mask: Mask<'_>,
        out: &mut [O],
        lse: &mut [f32],
    ) -> Result<()> {
        let call = Call::new(self, queries, (seqs, cu_seqlens), mask)?;
        let (rows, value_dim) = (call.rows(), self.shape().value_dim);
        if out.len() != rows * value_dim {
            return Err(Error::mismatch("output", rows * value_dim, out.len()));
        }
        if lse.len() != rows {
            return Err(Error::mismatch("lse", rows, lse.len()));
        }
        let nothing = vec![0.0; value_dim];
        out.chunks_exact_mut(value_dim).for_each(|row| O::narrow_all(&nothing, row));
        lse.fill(f32::NEG_INFINITY);
        let units = call.units();
        let items = call.items(&units);
        let tiles: Vec<Vec<Tile>> = items
            .par_iter()
            .map_init(Buffers::default, |buffers, item| call.attend(&units, item, buffers))
            .collect();
        let mut parts = items.iter().zip(tiles).peekable();
        while let Some((item, tiles)) = parts.next() {
            let mut tiles = tiles.into_iter();
            let Some(mut tile) = tiles.next() else { continue };
            tiles.for_each(|other| tile.join(&other));
            while let Some((_, more)) = parts.next_if(|(other, _)| other.unit == item.unit) {
                more.iter().for_each(|other| tile.join(other));
            }
            let (unit, layout) = (&units[item.unit], self.memory.layout.values);
            for row in 0..tile.rows() {
                let Some((values, log)) = tile.finish(row, &layout) else { continue };
                let to = call.row(unit, row);
                O::narrow_all(values, &mut out[to * value_dim..][..value_dim]);
                lse[to] = log;
            }
        }
        Ok(())
    }

    /// Attention probability that each entry receives, summed over the queries: for query head h of
    /// the i-th sequence, the vector `[i * heads + h]`, one number per entry of its kv head.
    ///
    /// `lse` (`[tokens, heads]`) is the log-sum-exp of all that the queries see, here and elsewhere.
    ///
    /// # Errors
    /// As [`attend`](Self::attend), and if `lse` has another length.
    pub fn attention_sums<T: Number>(
        &self,
        queries: &Queries<'_, T>,
        lse: &[f32],
        seqs: &[u64],
        cu_seqlens: &[usize],
        mask: Mask<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        let call = Call::new(self, queries, (seqs, cu_seqlens), mask)?;
        if lse.len() != call.rows() {
            return Err(Error::mismatch("lse", call.rows(), lse.len()));
        }
        Ok(call.sums(lse))
    }
}

/// Checks that the queries fit the pool and are finite.
fn check_queries<T: Number>(
    pool: &Pool,
    queries: &Queries<'_, T>,
    (seqs, cu_seqlens): (&[u64], &[usize]),
) -> Result<()> {
    let (heads, kv_heads, head_dim) = (queries.heads, pool.shape().kv_heads, pool.shape().head_dim);
    if heads == 0 || !heads.is_multiple_of(kv_heads) {
        let expected = format!("a multiple of the {kv_heads} kv heads");
        return Err(Error::mismatch("query heads", expected, heads));
    }
    let tokens = cu_seqlens.last().copied().unwrap_or(0);
    if queries.data.len() != tokens.saturating_mul(heads).saturating_mul(head_dim) {
        let expected = format!("{tokens} tokens x {heads} heads x {head_dim}");
        let got = format!("{} numbers", queries.data.len());
        return Err(Error::mismatch("queries", expected, got));
    }
    match queries.data.iter().position(|x| !x.widen().is_finite()) {
        Some(at) => {
            let value = queries.data[at].widen();
            let position: Position =
                batch::position("queries", (seqs, cu_seqlens), heads, head_dim, at);
            Err(Error::NotFinite { value, at: position })
        }
        None => Ok(()),
    }
}
