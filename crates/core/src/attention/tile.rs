//! Attention on CPUs: tiles of query rows times blocks of entries, with an online softmax.

use std::ops::Range;

use super::element::{Element, with_slice};
use super::gemm::{Matrix, multiply};
use super::simd;
use crate::{AttentionShape, Error, Partial, Result, Visible};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Query rows of a tile: its scores (128 x 256 f32, 128 KiB) stay in the second-level cache.
const ROWS: usize = 128;
/// Entries of a block.
const BLOCK: usize = 256;
/// Up to so many rows, reading keys and values once beats packing them for a matrix product.
const FEW_ROWS: usize = 8;
/// A part of the entries smaller than this is not worth a thread's wake-up.
const MIN_SPLIT: usize = 512;

/// A run of consecutive entries of one kv head: `[entries, head_dim]`, row-major.
#[derive(Debug, Clone, Copy)]
pub struct Page<'a, T> {
    /// The keys.
    pub keys: &'a [T],
    /// The values; as many numbers as `keys`.
    pub values: &'a [T],
}

/// Attention of queries `[batch, heads, tokens, head_dim]` on the CPU over the pages of each batch entry and kv head
/// (`[batch * kv_heads]` lists, whose lengths may differ).
///
/// # Errors
/// [`Error::Mismatch`] if `q` or the pages do not fit `shape`, or a head has fewer entries than there are causal queries.
pub fn attend_pages<T: Element>(
    q: &Tensor,
    heads: &[Vec<Page<'_, T>>],
    shape: &AttentionShape,
    visible: Visible,
) -> Result<Partial> {
    let (batch, tokens) = shape.check_q(q)?;
    let lens = check_pages(heads, shape, batch, tokens, visible)?;
    let q = q.to_dtype(DType::F32)?.contiguous()?;
    let (out, lse) = with_slice::<f32, _>(&q, |q| {
        let call = Call { q, tokens, shape, visible };
        let done: Vec<_> = call
            .plan(&lens)
            .into_par_iter()
            .map_init(Scratch::default, |scratch, item| {
                let tile = call.attend(&item, &heads[item.head], lens[item.head], scratch);
                (item, tile)
            })
            .collect();
        Ok(call.gather(done))
    })?;
    Ok(Partial {
        out: Tensor::from_vec(out, (batch, shape.heads, tokens, shape.head_dim), &Device::Cpu)?,
        lse: Tensor::from_vec(lse, (batch, shape.heads, tokens), &Device::Cpu)?,
    })
}

/// Attention probability that each entry receives, summed over the queries, by a second pass that uses the log-sum-exp of a
/// first one: for query head h of batch b, the vector `[b * heads + h]`, one number per entry.
///
/// # Errors
/// As [`attend_pages`], and if `lse` is not `[batch, heads, tokens]`.
pub fn mass_pages<T: Element>(
    q: &Tensor,
    lse: &Tensor,
    heads: &[Vec<Page<'_, T>>],
    shape: &AttentionShape,
    visible: Visible,
) -> Result<Vec<Vec<f32>>> {
    let (batch, tokens) = shape.check_q(q)?;
    let lens = check_pages(heads, shape, batch, tokens, visible)?;
    if lse.dims() != [batch, shape.heads, tokens] {
        let expected = format!("[{batch}, {}, {tokens}]", shape.heads);
        return Err(Error::mismatch("lse", expected, format!("{:?}", lse.dims())));
    }
    let lse = lse.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    let q = q.to_dtype(DType::F32)?.contiguous()?;
    with_slice::<f32, _>(&q, |q| {
        let call = Call { q, tokens, shape, visible };
        let parts: Vec<(usize, Range<usize>)> = (0..heads.len())
            .flat_map(|h| blocks(0..lens[h], MIN_SPLIT).map(move |part| (h, part)))
            .collect();
        let sums: Vec<_> = parts
            .into_par_iter()
            .map_init(Scratch::default, |scratch, (head, part)| {
                call.mass(head, &part, &heads[head], lens[head], &lse, scratch)
            })
            .collect();
        let mut mass = vec![Vec::new(); batch * shape.heads];
        for (head, part) in sums {
            let group = part.len() / shape.group();
            for (g, sums) in part.chunks(group).enumerate() {
                mass[head * shape.group() + g].extend_from_slice(sums);
            }
        }
        Ok(mass)
    })
}

fn check_pages<T>(
    heads: &[Vec<Page<'_, T>>],
    shape: &AttentionShape,
    batch: usize,
    tokens: usize,
    visible: Visible,
) -> Result<Vec<usize>> {
    if heads.len() != batch * shape.kv_heads {
        let expected = format!("{batch} batch entries x {} kv heads", shape.kv_heads);
        return Err(Error::mismatch("lists of pages", expected, heads.len()));
    }
    let d = shape.head_dim;
    for (head, pages) in heads.iter().enumerate() {
        let fits =
            |p: &Page<'_, T>| p.keys.len() == p.values.len() && p.keys.len().is_multiple_of(d);
        if let Some(p) = pages.iter().find(|p| !fits(p)) {
            return Err(Error::mismatch(
                format!("page of head {head}"),
                format!("rows of {d} channels, as many values as keys"),
                format!("{} keys and {} values", p.keys.len(), p.values.len()),
            ));
        }
    }
    let len = |pages: &Vec<Page<'_, T>>| pages.iter().map(|p| p.keys.len() / d).sum::<usize>();
    let lens: Vec<_> = heads.iter().map(len).collect();
    if let (Visible::Causal, Some(&short)) = (visible, lens.iter().find(|&&len| len < tokens)) {
        let expected = format!("at least the {tokens} of the queries' own tokens");
        return Err(Error::mismatch("entries of a kv head", expected, short));
    }
    Ok(lens)
}

/// One call's queries and rules.
struct Call<'a> {
    q: &'a [f32],
    tokens: usize,
    shape: &'a AttentionShape,
    visible: Visible,
}

/// A tile's share of the work: a block of queries of one batch entry and kv head, over a range of its entries.
struct Item {
    head: usize,
    queries: Range<usize>,
    entries: Range<usize>,
}

/// What a tile computed: for each row the sum of weighted values, the largest score and the sum of weights.
struct Tile {
    out: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Call<'_> {
    /// Blocks of queries; if these are too few for all threads, each over several ranges of entries.
    fn plan(&self, lens: &[usize]) -> Vec<Item> {
        let queries = self.query_blocks();
        let wanted = 4 * rayon::current_num_threads();
        let splits = wanted.div_ceil((lens.len() * queries.len()).max(1));
        let mut items = Vec::new();
        for (head, &len) in lens.iter().enumerate() {
            for queries in &queries {
                let entries = self.visible_to(queries, len);
                let size = entries.len().div_ceil(splits).max(MIN_SPLIT);
                items.extend(blocks(entries, size).map(|entries| Item {
                    head,
                    queries: queries.clone(),
                    entries,
                }));
            }
        }
        items
    }

    fn query_blocks(&self) -> Vec<Range<usize>> {
        blocks(0..self.tokens, (ROWS / self.shape.group()).max(1)).collect()
    }

    /// Entries that at least one of the queries sees.
    fn visible_to(&self, queries: &Range<usize>, len: usize) -> Range<usize> {
        let of = |i| self.visible.range(i, self.tokens, len, self.shape.window);
        of(queries.start).start..of(queries.end - 1).end
    }

    fn attend<T: Element>(
        &self,
        item: &Item,
        pages: &[Page<'_, T>],
        len: usize,
        scratch: &mut Scratch,
    ) -> Tile {
        let d = self.shape.head_dim;
        let rows = self.shape.group() * item.queries.len();
        let mut tile = Tile {
            out: vec![0.0; rows * d],
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
        };
        let Scratch { q, scores, keys, values } = scratch;
        self.gather_queries(item.head, &item.queries, q);
        for_each_block(pages, d, &item.entries, |start, page| {
            let keys = T::widen(page.keys, keys);
            self.score(q, keys, &item.queries, start, len, scores);
            tile.soften(scores, d);
            weigh(scores, T::widen(page.values, values), d, &mut tile.out);
        });
        tile
    }

    fn mass<T: Element>(
        &self,
        head: usize,
        entries: &Range<usize>,
        pages: &[Page<'_, T>],
        len: usize,
        lse: &[f32],
        scratch: &mut Scratch,
    ) -> (usize, Vec<f32>) {
        let group = self.shape.group();
        let mut sums = vec![0.0; group * entries.len()];
        let Scratch { q, scores, keys, .. } = scratch;
        for queries in self.query_blocks() {
            let seen = self.visible_to(&queries, len);
            let seen = seen.start.max(entries.start)..seen.end.min(entries.end);
            if seen.is_empty() {
                continue;
            }
            self.gather_queries(head, &queries, q);
            for_each_block(pages, self.shape.head_dim, &seen, |start, page| {
                let keys = T::widen(page.keys, keys);
                self.score(q, keys, &queries, start, len, scores);
                let width = keys.len() / self.shape.head_dim;
                for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
                    let (g, i) = (row / queries.len(), row % queries.len());
                    let lse = lse[(head * group + g) * self.tokens + queries.start + i];
                    if lse > f32::NEG_INFINITY {
                        simd::exp_sum(scores, lse);
                        let at = g * entries.len() + start - entries.start;
                        simd::add(&mut sums[at..at + width], scores);
                    }
                }
            });
        }
        (head, sums)
    }

    /// The queries of a kv head's group, scaled: row `g * queries.len() + i` is query i of the g-th head.
    fn gather_queries(&self, head: usize, queries: &Range<usize>, out: &mut Vec<f32>) {
        let d = self.shape.head_dim;
        out.clear();
        for g in 0..self.shape.group() {
            let start = ((head * self.shape.group() + g) * self.tokens + queries.start) * d;
            out.extend_from_slice(&self.q[start..start + queries.len() * d]);
        }
        simd::scale(out, self.shape.scale);
    }

    /// Scores of all rows against the keys of the entries from `start` on; -inf where a row does not see an entry.
    fn score(
        &self,
        q: &[f32],
        keys: &[f32],
        queries: &Range<usize>,
        start: usize,
        len: usize,
        scores: &mut Vec<f32>,
    ) {
        let d = self.shape.head_dim;
        let (rows, width) = (q.len() / d, keys.len() / d);
        scores.resize(rows * width, 0.0);
        if rows <= FEW_ROWS {
            simd::scores(q, keys, d, scores);
        } else {
            let keys = Matrix::new(keys, width, d).transpose();
            multiply(Matrix::new(q, rows, d), keys, scores, width, false);
        }
        if let Some(cap) = self.shape.soft_cap {
            scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
        }
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let query = queries.start + row % queries.len();
            let seen = self.visible.range(query, self.tokens, len, self.shape.window);
            let before = seen.start.saturating_sub(start).min(width);
            let until = seen.end.saturating_sub(start).min(width);
            scores[..before].fill(f32::NEG_INFINITY);
            scores[until..].fill(f32::NEG_INFINITY);
        }
    }

    /// Joins the tiles of one block of queries, divides by the sums of weights, and puts rows in their places.
    fn gather(&self, done: Vec<(Item, Tile)>) -> (Vec<f32>, Vec<f32>) {
        let d = self.shape.head_dim;
        let rows = self.q.len() / d;
        let mut out = vec![0.0; rows * d];
        let mut lse = vec![f32::NEG_INFINITY; rows];
        let mut done = done.into_iter().peekable();
        while let Some((item, mut tile)) = done.next() {
            let same = |other: &Item| other.head == item.head && other.queries == item.queries;
            while let Some((_, other)) = done.next_if(|(other, _)| same(other)) {
                tile.join(&other, d);
            }
            for (row, (values, (max, sum))) in
                tile.out.chunks_exact(d).zip(tile.max.iter().zip(&tile.sum)).enumerate()
            {
                let (g, i) = (row / item.queries.len(), row % item.queries.len());
                let to =
                    (item.head * self.shape.group() + g) * self.tokens + item.queries.start + i;
                if *sum > 0.0 {
                    let place = &mut out[to * d..(to + 1) * d];
                    place.copy_from_slice(values);
                    simd::scale(place, sum.recip());
                    lse[to] = max + sum.ln();
                }
            }
        }
        (out, lse)
    }
}

impl Tile {
    /// Turns scores into weights relative to each row's largest score so far, and rescales what was summed before.
    fn soften(&mut self, scores: &mut [f32], head_dim: usize) {
        let rows = self.max.len();
        let width = scores.len() / rows;
        for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
            let max = self.max[row].max(simd::max(scores));
            if max == f32::NEG_INFINITY {
                scores.fill(0.0);
                continue;
            }
            let sum = simd::exp_sum(scores, max);
            if max > self.max[row] {
                let shrink = (self.max[row] - max).exp();
                self.sum[row] *= shrink;
                simd::scale(&mut self.out[row * head_dim..][..head_dim], shrink);
                self.max[row] = max;
            }
            self.sum[row] += sum;
        }
    }

    fn join(&mut self, other: &Tile, head_dim: usize) {
        for row in 0..self.max.len() {
            let max = self.max[row].max(other.max[row]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let (a, b) = ((self.max[row] - max).exp(), (other.max[row] - max).exp());
            let ours = &mut self.out[row * head_dim..][..head_dim];
            let theirs = &other.out[row * head_dim..][..head_dim];
            ours.iter_mut().zip(theirs).for_each(|(x, y)| *x = *x * a + y * b);
            self.sum[row] = self.sum[row] * a + other.sum[row] * b;
            self.max[row] = max;
        }
    }
}

/// Adds the values weighted with `weights` to `out`.
fn weigh(weights: &[f32], values: &[f32], head_dim: usize, out: &mut [f32]) {
    let (rows, width) = (out.len() / head_dim, values.len() / head_dim);
    if rows <= FEW_ROWS {
        simd::accumulate(weights, values, head_dim, out);
    } else {
        let values = Matrix::new(values, width, head_dim);
        multiply(Matrix::new(weights, rows, width), values, out, head_dim, true);
    }
}

/// Calls `f` with the first entry's number and the rows of each block of the pages that lies within `entries`.
fn for_each_block<T>(
    pages: &[Page<'_, T>],
    head_dim: usize,
    entries: &Range<usize>,
    mut f: impl FnMut(usize, Page<'_, T>),
) {
    let mut first = 0;
    for page in pages {
        let len = page.keys.len() / head_dim;
        let wanted = entries.start.max(first)..entries.end.min(first + len);
        for block in blocks(wanted, BLOCK) {
            let rows = (block.start - first) * head_dim..(block.end - first) * head_dim;
            f(block.start, Page { keys: &page.keys[rows.clone()], values: &page.values[rows] });
        }
        first += len;
    }
}

fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(size).map(move |start| start..(start + size).min(end))
}
