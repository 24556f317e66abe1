//! Attention over a pool's sequences.
//!
//! The algorithm is the online softmax over tiles of entries (FlashAttention, arXiv 2205.14135).
//! The codes of a kv head are unpacked in registers, once for all queries of its group. A call is
//! divided into sequences, kv heads, blocks of queries and pieces of entries, which run on several
//! threads.

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

/// Slots per tile; a multiple of every block's size.
const TILE: usize = 128;
/// Slots per piece. The weighted values of each piece are summed separately, then the sums are
/// merged. The pieces depend neither on the number of threads nor on the other sequences of the
/// call, so a sequence has the same result, bit for bit, in every batch.
const PIECE: usize = 16 * TILE;
/// Query rows per tile.
const ROWS: usize = 64;

/// The queries of some sequences, and the attention parameters.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a, T = f32> {
    /// Query vectors, `[tokens, heads, head_dim]`.
    pub data: &'a [T],
    /// Number of query heads.
    pub heads: usize,
    /// Softmax scale of the scores q·k.
    pub scale: f32,
    /// Soft cap: a score s becomes `cap * tanh(s / cap)`.
    pub soft_cap: Option<f32>,
    /// Sliding window, under [`Mask::Causal`]: the largest number of entries that a query sees, its
    /// own included.
    pub window: Option<usize>,
}

/// The entries of its sequence that a query sees.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Mask<'a> {
    /// Every query sees every entry.
    Full,
    /// The last n entries of a sequence belong to its n queries. A query sees the entries up to its
    /// own, within the window.
    Causal,
    /// Every query of a sequence sees the ranges of entries listed for it: `[sequences * kv_heads]`
    /// lists, each of disjoint, increasing ranges. Blocks outside of the ranges are not read.
    Entries(&'a [Vec<Range<usize>>]),
}

/// The attention output and the log-sum-exp of the scores.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AttentionOutput {
    /// `[tokens, heads, value_dim]`; zero where a query sees nothing.
    pub out: Vec<f32>,
    /// Natural log-sum-exp, `[tokens, heads]`; -inf where a query sees nothing.
    pub lse: Vec<f32>,
}

impl Pool {
    /// Computes attention of the queries of some sequences over the pool's entries of these
    /// sequences. The queries are concatenated: those of the i-th sequence are
    /// `cu_seqlens[i]..cu_seqlens[i + 1]`.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] if the queries or `cu_seqlens` do not fit, a
    /// head holds fewer entries than its sequence has causal queries, or the mask's ranges exceed
    /// the entries; [`Error::NotFinite`] for NaN or infinity among the queries.
    pub fn attend<T: Number>(
        &self,
        queries: &Queries<'_, T>,
        seqs: &[u64],
        cu_seqlens: &[usize],
        mask: Mask<'_>,
    ) -> Result<AttentionOutput> {
        let rows = queries.data.len() / self.shape().head_dim;
        let mut out = vec![0f32; rows * self.shape().value_dim];
        let mut lse = vec![0.0; rows];
        self.attend_into(queries, seqs, cu_seqlens, mask, &mut out, &mut lse)?;
        Ok(AttentionOutput { out, lse })
    }

    /// Like [`attend`](Self::attend), but writes to the caller's memory: `out`, `[tokens, heads,
    /// value_dim]`, in f32, f16 or bf16, and `lse`, `[tokens, heads]`.
    ///
    /// # Errors
    /// As [`attend`](Self::attend), and [`Error::Mismatch`] if a slice has a wrong length.
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
            tiles.for_each(|other| tile.merge(&other));
            while let Some((_, more)) = parts.next_if(|(other, _)| other.unit == item.unit) {
                more.iter().for_each(|other| tile.merge(other));
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

    /// Returns the attention probability that each entry receives, summed over the queries. Vector
    /// `[i * heads + h]` belongs to query head h of the i-th sequence and has one element per entry
    /// of its kv head.
    ///
    /// `lse` (`[tokens, heads]`) is the log-sum-exp over everything that the queries see, here and
    /// elsewhere.
    ///
    /// # Errors
    /// As [`attend`](Self::attend), and if `lse` has a wrong length.
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
