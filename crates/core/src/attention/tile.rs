//! Attention on CPUs: tiles of query rows times blocks of entries, with an online softmax.

use std::ops::Range;

use super::element::{Element, with_slice};
use super::simd;
use crate::{AttentionShape, AttentionState, Batch, Error, Mask, Result};
use candle_core::{DType, Device, Tensor};
use longctx_simd::matrix::{Matrix, Parallelism, multiply};
use rayon::prelude::*;

/// Query rows per tile: its scores (128 x 256 f32, 128 KiB) fit in the L2 cache.
const ROWS: usize = 128;
/// Entries per block.
const BLOCK: usize = 256;
/// Up to this many rows, one pass over keys and values is faster than packing them for a matrix
/// product.
const FEW_ROWS: usize = 8;
/// For a range with fewer entries, waking a thread does not pay.
const MIN_SPLIT: usize = 512;

/// A run of consecutive entries of one kv head, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a, T> {
    /// Keys, `[entries, head_dim]`.
    pub keys: &'a [T],
    /// Values, `[entries, value_dim]`.
    pub values: &'a [T],
}

/// Attention of queries `[tokens, heads, head_dim]` on the CPU over the pages of each sequence and
/// kv head (`[sequences * kv_heads]` lists, of any lengths). The caller applies a mask of [entry
/// ranges](Mask::Entries) beforehand: the pages are then the selected ranges.
///
/// # Errors
/// [`Error::Mismatch`] if `q` or the pages do not fit `shape`, or a head has fewer entries than
/// there are causal queries.
pub fn attend_pages<T: Element>(
    batch: &Batch,
    q: &Tensor,
    heads: &[Vec<Page<'_, T>>],
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<AttentionState> {
    let tokens = check_queries(batch, q, shape)?;
    let lens = check_pages(heads, shape, batch, mask)?;
    let q = q.to_dtype(DType::F32)?.contiguous()?;
    let (out, lse) = with_slice::<f32, _>(&q, |q| {
        let call = Call { q, batch, shape, mask };
        let done: Vec<_> = call
            .plan(&lens)
            .into_par_iter()
            .map_init(Scratch::default, |scratch, work| {
                let tile = call.attend(&work, &heads[work.head], lens[work.head], scratch);
                (work, tile)
            })
            .collect();
        Ok(call.merge_tiles(done))
    })?;
    Ok(AttentionState {
        out: Tensor::from_vec(out, (tokens, shape.heads, shape.value_dim), &Device::Cpu)?,
        lse: Tensor::from_vec(lse, (tokens, shape.heads), &Device::Cpu)?,
    })
}

/// Returns the attention probability that each entry receives, summed over the queries. A second
/// pass that uses the log-sum-exp of the first. Vector `[i * heads + h]` belongs to query head h of
/// the i-th sequence and has one element per entry.
///
/// # Errors
/// As [`attend_pages`], and if `lse` is not `[tokens, heads]`.
pub fn attention_sums_pages<T: Element>(
    batch: &Batch,
    q: &Tensor,
    lse: &Tensor,
    heads: &[Vec<Page<'_, T>>],
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<Vec<Vec<f32>>> {
    let tokens = check_queries(batch, q, shape)?;
    let lens = check_pages(heads, shape, batch, mask)?;
    if lse.dims() != [tokens, shape.heads] {
        let expected = format!("[{tokens}, {}]", shape.heads);
        return Err(Error::mismatch("lse", expected, format!("{:?}", lse.dims())));
    }
    let lse = lse.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    let q = q.to_dtype(DType::F32)?.contiguous()?;
    with_slice::<f32, _>(&q, |q| {
        let call = Call { q, batch, shape, mask };
        let parts: Vec<(usize, Range<usize>)> = (0..heads.len())
            .flat_map(|h| blocks(0..lens[h], MIN_SPLIT).map(move |part| (h, part)))
            .collect();
        let sums: Vec<_> = parts
            .into_par_iter()
            .map_init(Scratch::default, |scratch, (head, part)| {
                call.attention_sums(head, &part, &heads[head], lens[head], &lse, scratch)
            })
            .collect();
        let mut all = vec![Vec::new(); heads.len() * shape.heads_per_kv()];
        for (head, part) in sums {
            let entries = part.len() / shape.heads_per_kv();
            for (g, sums) in part.chunks(entries).enumerate() {
                all[head * shape.heads_per_kv() + g].extend_from_slice(sums);
            }
        }
        Ok(all)
    })
}

fn check_queries(batch: &Batch, q: &Tensor, shape: &AttentionShape) -> Result<usize> {
    let tokens = shape.check_q(q)?;
    if tokens != batch.tokens() {
        return Err(Error::mismatch("tokens of q", batch.tokens(), tokens));
    }
    Ok(tokens)
}

/// Returns the number of entries of each sequence and kv head.
fn check_pages<T>(
    heads: &[Vec<Page<'_, T>>],
    shape: &AttentionShape,
    batch: &Batch,
    mask: Mask<'_>,
) -> Result<Vec<usize>> {
    if heads.len() != batch.seqs().len() * shape.kv_heads {
        let expected = format!("{} sequences x {} kv heads", batch.seqs().len(), shape.kv_heads);
        return Err(Error::mismatch("lists of pages", expected, heads.len()));
    }
    let (d, dv) = (shape.head_dim, shape.value_dim);
    for (head, pages) in heads.iter().enumerate() {
        let fits = |p: &Page<'_, T>| {
            p.keys.len().is_multiple_of(d) && p.keys.len() / d * dv == p.values.len()
        };
        if let Some(p) = pages.iter().find(|p| !fits(p)) {
            return Err(Error::mismatch(
                format!("page of head {head}"),
                format!("rows of {d} channels, as many rows of {dv} as values"),
                format!("{} keys and {} values", p.keys.len(), p.values.len()),
            ));
        }
    }
    let len = |pages: &Vec<Page<'_, T>>| pages.iter().map(|p| p.keys.len() / d).sum::<usize>();
    let lens: Vec<_> = heads.iter().map(len).collect();
    if mask == Mask::Causal {
        for ((seq, tokens), lens) in batch.iter().zip(lens.chunks(shape.kv_heads)) {
            if let Some(&short) = lens.iter().find(|&&len| len < tokens.len()) {
                let what = format!("entries of a kv head of sequence {seq}");
                let expected = format!("at least the {} of the queries' own tokens", tokens.len());
                return Err(Error::mismatch(what, expected, short));
            }
        }
    }
    Ok(lens)
}

/// The queries and mask of one call. A "head" is a kv head of one sequence, numbered `[sequences *
/// kv_heads]`.
struct Call<'a> {
    q: &'a [f32],
    batch: &'a Batch,
    shape: &'a AttentionShape,
    mask: Mask<'a>,
}

/// The work of one tile: a block of queries of one head, over a range of its entries. Query indices
/// are relative to the sequence.
struct TileWork {
    head: usize,
    queries: Range<usize>,
    entries: Range<usize>,
}

/// The result of one tile: for each row the sum of weighted values, the largest score and the sum
/// of weights.
struct Tile {
    out: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    f32_block: F32Block,
}

/// The keys and values of a block in f32.
#[derive(Default)]
struct F32Block {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Call<'_> {
    /// Returns blocks of queries, each over one or more ranges of entries. The range length is
    /// chosen so that every thread gets a few ranges, however the entries are distributed among the
    /// sequences.
    fn plan(&self, lens: &[usize]) -> Vec<TileWork> {
        let whole: Vec<TileWork> = (0..lens.len())
            .flat_map(|head| self.query_blocks(head).map(move |queries| (head, queries)))
            .map(|(head, queries)| {
                let entries = self.visible_to(head, &queries, lens[head]);
                TileWork { head, queries, entries }
            })
            .collect();
        let total: usize = whole.iter().map(|work| work.entries.len()).sum();
        let size = total.div_ceil(4 * rayon::current_num_threads()).max(MIN_SPLIT);
        let split = |work: TileWork| {
            // Equal parts, so that none is much smaller than the others.
            let parts = work.entries.len().div_ceil(size).max(1);
            let size = work.entries.len().div_ceil(parts).max(1);
            let TileWork { head, queries, entries } = work;
            blocks(entries, size).map(move |entries| TileWork {
                head,
                queries: queries.clone(),
                entries,
            })
        };
        whole.into_iter().flat_map(split).collect()
    }

    /// Returns the tokens of the sequence of a head.
    fn tokens(&self, head: usize) -> Range<usize> {
        let seq = head / self.shape.kv_heads;
        self.batch.cu_seqlens()[seq]..self.batch.cu_seqlens()[seq + 1]
    }

    fn query_blocks(&self, head: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        blocks(0..self.tokens(head).len(), (ROWS / self.shape.heads_per_kv()).max(1))
    }

    /// Returns the entries that at least one of the queries sees.
    fn visible_to(&self, head: usize, queries: &Range<usize>, len: usize) -> Range<usize> {
        let tokens = self.tokens(head).len();
        let of = |i| self.mask.range(i, tokens, len, self.shape.window);
        of(queries.start).start..of(queries.end - 1).end
    }

    fn attend<T: Element>(
        &self,
        work: &TileWork,
        pages: &[Page<'_, T>],
        len: usize,
        scratch: &mut Scratch,
    ) -> Tile {
        let dv = self.shape.value_dim;
        let rows = self.shape.heads_per_kv() * work.queries.len();
        let mut tile = Tile {
            out: vec![0.0; rows * dv],
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
        };
        let Scratch { q, scores, f32_block } = scratch;
        self.gather_queries(work.head, &work.queries, q);
        for_each_block(pages, self.shape, &work.entries, rows, f32_block, |start, runs| {
            self.score(q, runs, work.head, &work.queries, start, len, scores);
            tile.update_softmax(scores, dv);
            accumulate_values(scores, runs, dv, &mut tile.out);
        });
        tile
    }

    fn attention_sums<T: Element>(
        &self,
        head: usize,
        entries: &Range<usize>,
        pages: &[Page<'_, T>],
        len: usize,
        lse: &[f32],
        scratch: &mut Scratch,
    ) -> (usize, Vec<f32>) {
        let group = self.shape.heads_per_kv();
        let mut sums = vec![0.0; group * entries.len()];
        let Scratch { q, scores, f32_block } = scratch;
        for queries in self.query_blocks(head) {
            let seen = self.visible_to(head, &queries, len);
            let seen = seen.start.max(entries.start)..seen.end.min(entries.end);
            if seen.is_empty() {
                continue;
            }
            self.gather_queries(head, &queries, q);
            let rows = group * queries.len();
            for_each_block(pages, self.shape, &seen, rows, f32_block, |start, runs| {
                self.score(q, runs, head, &queries, start, len, scores);
                let width = scores.len() / rows;
                for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
                    let lse = lse[self.row(head, &queries, row)];
                    if lse > f32::NEG_INFINITY {
                        longctx_simd::exp_sum(scores, lse);
                        let at = row / queries.len() * entries.len() + start - entries.start;
                        longctx_simd::add(scores, &mut sums[at..at + width]);
                    }
                }
            });
        }
        (head, sums)
    }

    /// Returns the index of a tile's row among `[tokens, heads]`: row `g * queries.len() + i` is
    /// query i of the group's g-th head.
    fn row(&self, head: usize, queries: &Range<usize>, row: usize) -> usize {
        let token = self.tokens(head).start + queries.start + row % queries.len();
        let query_head =
            head % self.shape.kv_heads * self.shape.heads_per_kv() + row / queries.len();
        token * self.shape.heads + query_head
    }

    /// Copies the scaled queries of a kv head's group to `out`.
    fn gather_queries(&self, head: usize, queries: &Range<usize>, out: &mut Vec<f32>) {
        let d = self.shape.head_dim;
        out.clear();
        for row in 0..self.shape.heads_per_kv() * queries.len() {
            let start = self.row(head, queries, row) * d;
            out.extend_from_slice(&self.q[start..start + d]);
        }
        longctx_simd::scale(out, self.shape.scale);
    }

    /// Computes the scores of all rows against the keys of the entries from `start` on; -inf where
    /// a row does not see an entry.
    #[allow(clippy::too_many_arguments)]
    fn score(
        &self,
        q: &[f32],
        runs: &[Page<'_, f32>],
        head: usize,
        queries: &Range<usize>,
        start: usize,
        len: usize,
        scores: &mut Vec<f32>,
    ) {
        let d = self.shape.head_dim;
        let rows = q.len() / d;
        let width = runs.iter().map(|run| run.keys.len() / d).sum();
        scores.resize(rows * width, 0.0);
        if let ([run], true) = (runs, rows > FEW_ROWS) {
            let keys = Matrix::new(run.keys, width, d).transpose();
            multiply(Matrix::new(q, rows, d), keys, scores, width, 0.0, Parallelism::None);
        } else {
            let mut at = 0;
            for run in runs {
                simd::scores(q, run.keys, d, &mut scores[at..], width);
                at += run.keys.len() / d;
            }
        }
        if let Some(cap) = self.shape.soft_cap {
            scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
        }
        let tokens = self.tokens(head).len();
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let query = queries.start + row % queries.len();
            let seen = self.mask.range(query, tokens, len, self.shape.window);
            let before = seen.start.saturating_sub(start).min(width);
            let until = seen.end.saturating_sub(start).min(width);
            scores[..before].fill(f32::NEG_INFINITY);
            scores[until..].fill(f32::NEG_INFINITY);
        }
    }

    /// Merges the tiles of each block of queries, divides by the sums of weights, and scatters the
    /// rows to the output.
    fn merge_tiles(&self, done: Vec<(TileWork, Tile)>) -> (Vec<f32>, Vec<f32>) {
        let dv = self.shape.value_dim;
        let rows = self.batch.tokens() * self.shape.heads;
        let mut out = vec![0.0; rows * dv];
        let mut lse = vec![f32::NEG_INFINITY; rows];
        let mut done = done.into_iter().peekable();
        while let Some((work, mut tile)) = done.next() {
            let same = |other: &TileWork| other.head == work.head && other.queries == work.queries;
            while let Some((_, other)) = done.next_if(|(other, _)| same(other)) {
                tile.merge(&other, dv);
            }
            for (row, (values, (max, sum))) in
                tile.out.chunks_exact(dv).zip(tile.max.iter().zip(&tile.sum)).enumerate()
            {
                let to = self.row(work.head, &work.queries, row);
                if *sum > 0.0 {
                    let place = &mut out[to * dv..(to + 1) * dv];
                    place.copy_from_slice(values);
                    longctx_simd::scale(place, sum.recip());
                    lse[to] = max + sum.ln();
                }
            }
        }
        (out, lse)
    }
}

impl Tile {
    /// Converts scores to weights relative to each row's running maximum, and rescales the previous
    /// sums.
    fn update_softmax(&mut self, scores: &mut [f32], value_dim: usize) {
        let rows = self.max.len();
        let width = scores.len() / rows;
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let max = self.max[row].max(longctx_simd::max(scores));
            if max == f32::NEG_INFINITY {
                scores.fill(0.0);
                continue;
            }
            let sum = longctx_simd::exp_sum(scores, max);
            if max > self.max[row] {
                let shrink = (self.max[row] - max).exp();
                self.sum[row] *= shrink;
                longctx_simd::scale(&mut self.out[row * value_dim..][..value_dim], shrink);
                self.max[row] = max;
            }
            self.sum[row] += sum;
        }
    }

    fn merge(&mut self, other: &Tile, value_dim: usize) {
        for row in 0..self.max.len() {
            let max = self.max[row].max(other.max[row]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let (a, b) = ((self.max[row] - max).exp(), (other.max[row] - max).exp());
            let ours = &mut self.out[row * value_dim..][..value_dim];
            let theirs = &other.out[row * value_dim..][..value_dim];
            ours.iter_mut().zip(theirs).for_each(|(x, y)| *x = *x * a + y * b);
            self.sum[row] = self.sum[row] * a + other.sum[row] * b;
            self.max[row] = max;
        }
    }
}

/// Adds the values of a block's runs to `out`, weighted with `weights` `[rows, entries of the
/// block]`.
fn accumulate_values(weights: &[f32], runs: &[Page<'_, f32>], value_dim: usize, out: &mut [f32]) {
    let rows = out.len() / value_dim;
    let width = weights.len() / rows;
    if let ([run], true) = (runs, rows > FEW_ROWS) {
        let values = Matrix::new(run.values, width, value_dim);
        let weights = Matrix::new(weights, rows, width);
        multiply(weights, values, out, value_dim, 1.0, Parallelism::None);
    } else {
        let mut at = 0;
        for run in runs {
            simd::accumulate(&weights[at..], width, run.values, value_dim, out);
            at += run.values.len() / value_dim;
        }
    }
}

/// Calls `f` once per block of at most [`BLOCK`] entries of the pages that lie within `entries`.
/// Its arguments are the index of the first entry, and the keys and values in f32.
///
/// Pages may be far shorter than a block. They are copied into one run, because a matrix product
/// with few columns is slow. Exception: if few rows read f32 pages, each page is a separate run
/// that is read in place, because a copy would cost more.
fn for_each_block<T: Element>(
    pages: &[Page<'_, T>],
    shape: &AttentionShape,
    entries: &Range<usize>,
    rows: usize,
    f32_block: &mut F32Block,
    f: impl FnMut(usize, &[Page<'_, f32>]),
) {
    if rows <= FEW_ROWS && T::DTYPE == DType::F32 {
        for_each_block_in_place(pages, shape, entries, f);
    } else {
        for_each_f32_block(pages, shape, entries, f32_block, f);
    }
}

fn for_each_block_in_place<T: Element>(
    pages: &[Page<'_, T>],
    shape: &AttentionShape,
    entries: &Range<usize>,
    mut f: impl FnMut(usize, &[Page<'_, f32>]),
) {
    let mut runs: Vec<Page<'_, f32>> = Vec::new();
    let (mut start, mut filled) = (entries.start, 0);
    for_each_run(pages, shape, entries, |first, run| {
        let count = run.keys.len() / shape.head_dim;
        if filled + count > BLOCK {
            f(start, &runs);
            runs.clear();
            (start, filled) = (first, 0);
        }
        let Page { keys, values } = run;
        runs.push(Page { keys: bytemuck::cast_slice(keys), values: bytemuck::cast_slice(values) });
        filled += count;
    });
    if filled > 0 {
        f(start, &runs);
    }
}

fn for_each_f32_block<T: Element>(
    pages: &[Page<'_, T>],
    shape: &AttentionShape,
    entries: &Range<usize>,
    f32_block: &mut F32Block,
    mut f: impl FnMut(usize, &[Page<'_, f32>]),
) {
    let (d, dv) = (shape.head_dim, shape.value_dim);
    let F32Block { keys, values } = f32_block;
    keys.resize(BLOCK * d, 0.0);
    values.resize(BLOCK * dv, 0.0);
    let (mut start, mut filled) = (entries.start, 0);
    for_each_run(pages, shape, entries, |_, page| {
        let count = page.keys.len() / d;
        let mut done = 0;
        while done < count {
            let now = (BLOCK - filled).min(count - done);
            let rows = |x| done * x..(done + now) * x;
            let place = |x| filled * x..(filled + now) * x;
            T::widen_into(&page.keys[rows(d)], &mut keys[place(d)]);
            T::widen_into(&page.values[rows(dv)], &mut values[place(dv)]);
            (done, filled) = (done + now, filled + now);
            if filled == BLOCK {
                f(start, &[Page { keys, values }]);
                (start, filled) = (start + filled, 0);
            }
        }
    });
    if filled > 0 {
        f(start, &[Page { keys: &keys[..filled * d], values: &values[..filled * dv] }]);
    }
}

/// Calls `f` with the index of the first entry and the rows of each run: at most [`BLOCK`] entries
/// of one page that lie within `entries`.
fn for_each_run<'a, T>(
    pages: &[Page<'a, T>],
    shape: &AttentionShape,
    entries: &Range<usize>,
    mut f: impl FnMut(usize, Page<'a, T>),
) {
    let (d, dv) = (shape.head_dim, shape.value_dim);
    let mut first = 0;
    for page in pages {
        let len = page.keys.len() / d;
        let wanted = entries.start.max(first)..entries.end.min(first + len);
        for run in blocks(wanted, BLOCK) {
            let rows = |x: usize| (run.start - first) * x..(run.end - first) * x;
            f(run.start, Page { keys: &page.keys[rows(d)], values: &page.values[rows(dv)] });
        }
        first += len;
    }
}

fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(size).map(move |start| start..(start + size).min(end))
}
