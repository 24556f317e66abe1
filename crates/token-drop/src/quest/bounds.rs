//! The minimum and maximum of each key channel per page.

use std::ops::Range;

use crate::GroupReduction;
use candle_core::Tensor;
use half::f16;
use longctx_core::{Footprint, Result};

/// Bounds of one sequence's pages.
#[derive(Debug, Clone)]
pub struct PageBounds {
    page_size: usize,
    head_dim: usize,
    /// For each kv head the minimum and maximum of each channel in each page, including the last,
    /// partial one: `[pages, 2, head_dim]`, rounded to f16 as in the published code.
    heads: Vec<Vec<f16>>,
}

impl PageBounds {
    /// Creates bounds without pages.
    pub fn new(kv_heads: usize, page_size: usize, head_dim: usize) -> Self {
        Self { page_size, head_dim, heads: vec![Vec::new(); kv_heads] }
    }

    /// Adds a key of each head, `[kv_heads * head_dim]`, to a page.
    pub fn add(&mut self, page: usize, keys: &[f32]) {
        for (head, key) in keys.chunks_exact(self.head_dim).enumerate() {
            self.add_to_head(head, page, key);
        }
    }

    /// Adds a head's key to a page, which is new or one of those that exist.
    pub fn add_to_head(&mut self, head: usize, page: usize, key: &[f32]) {
        let (d, bounds) = (self.head_dim, &mut self.heads[head]);
        let at = page * 2 * d;
        let rounded = key.iter().map(|&x| round(x));
        if at == bounds.len() {
            bounds.extend(rounded.clone());
            bounds.extend(rounded);
            return;
        }
        let (low, high) = bounds[at..at + 2 * d].split_at_mut(d);
        for (x, (low, high)) in rounded.zip(low.iter_mut().zip(high)) {
            *low = if x < *low { x } else { *low };
            *high = if x > *high { x } else { *high };
        }
    }

    /// Drops the pages that are not entirely within the first `len` tokens. Returns the first token
    /// without bounds.
    pub fn truncate(&mut self, len: usize) -> usize {
        let whole = len / self.page_size;
        self.heads.iter_mut().for_each(|head| head.truncate(whole * 2 * self.head_dim));
        whole * self.page_size
    }

    /// Returns the `count` pages of a head with the highest bounds for the queries of its group, in
    /// text order, among the pages of `len` tokens. The newest page is always included.
    pub fn select_pages(
        &self,
        head: usize,
        queries: &[f32],
        len: usize,
        count: usize,
    ) -> Vec<usize> {
        let (d, pages) = (self.head_dim, len.div_ceil(self.page_size));
        if pages <= count {
            return (0..pages).collect();
        }
        let older = &self.heads[head][..(pages - 1) * 2 * d];
        let mut page = vec![0.0; 2 * d];
        let mut scores = vec![Vec::with_capacity(pages - 1); queries.len() / d];
        for bounds in older.chunks_exact(2 * d) {
            page.iter_mut().zip(bounds).for_each(|(to, x)| *to = x.to_f32());
            for (scores, query) in scores.iter_mut().zip(queries.chunks_exact(d)) {
                scores.push(bound(query, &page));
            }
        }
        let scores = GroupReduction::Max.reduce_lists(&scores);
        let mut order: Vec<_> = (0..pages - 1).collect();
        let best_first = |&a: &usize, &b: &usize| scores[b].total_cmp(&scores[a]).then(a.cmp(&b));
        if count > 1 {
            order.select_nth_unstable_by(count - 2, best_first);
        }
        order.truncate(count - 1);
        order.push(pages - 1);
        order.sort_unstable();
        order
    }

    pub fn footprint(&self) -> Footprint {
        let numbers: usize = self.heads.iter().map(Vec::capacity).sum();
        Footprint { bookkeeping: numbers * size_of::<f16>(), ..Default::default() }
    }
}

/// Reduces a sequence's keys, `[tokens, channels]` from token `first` on, to fewer rows of the same
/// bounds: the minimum and maximum of each whole page, and the keys of partial pages. Returns them
/// with the page of each row.
pub fn reduce_pages(keys: &Tensor, first: usize, page_size: usize) -> Result<(Tensor, Vec<usize>)> {
    let end = first + keys.dim(0)?;
    let whole = first.next_multiple_of(page_size)..end / page_size * page_size;
    let page = |token| token / page_size;
    if whole.is_empty() {
        return Ok((keys.clone(), (first..end).map(page).collect()));
    }
    let part = |tokens: &Range<usize>| keys.narrow(0, tokens.start - first, tokens.len());
    let of_pages = part(&whole)?.reshape((whole.len() / page_size, page_size, ()))?;
    let mut rows = vec![of_pages.min(1)?, of_pages.max(1)?];
    let whole_pages = page(whole.start)..page(whole.end);
    let mut pages: Vec<_> = whole_pages.clone().chain(whole_pages).collect();
    for partial in [first..whole.start, whole.end..end] {
        if !partial.is_empty() {
            rows.push(part(&partial)?);
            pages.extend(partial.map(page));
        }
    }
    Ok((Tensor::cat(&rows, 0)?, pages))
}

/// Returns an upper bound of the scores of keys within a page's bounds.
fn bound(query: &[f32], page: &[f32]) -> f32 {
    let (low, high) = page.split_at(query.len());
    let ends = low.iter().zip(high).zip(query);
    ends.map(|((low, high), q)| (q * low).max(q * high)).sum()
}

/// Rounds to f16; saturates at its largest finite number.
fn round(x: f32) -> f16 {
    f16::from_f32(x.clamp(-f16::MAX.to_f32(), f16::MAX.to_f32()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn reduced_rows_have_the_bounds_of_all_keys() {
        let (kv_heads, page, d) = (2, 8, 4);
        for (earlier, count) in [(0, 3), (0, 8), (0, 29), (3, 4), (3, 5), (3, 30), (16, 16)] {
            let tokens = earlier + count;
            let keys = Tensor::randn(0f32, 1.0, (tokens, kv_heads * d), &Device::Cpu).unwrap();
            let (mut all, mut reduced) =
                (PageBounds::new(kv_heads, page, d), PageBounds::new(kv_heads, page, d));
            for (token, key) in keys.to_vec2::<f32>().unwrap().iter().enumerate() {
                all.add(token / page, key);
                if token < earlier {
                    reduced.add(token / page, key);
                }
            }
            let newer = keys.narrow(0, earlier, count).unwrap();
            let (rows, pages) = reduce_pages(&newer, earlier, page).unwrap();
            for (page, row) in pages.into_iter().zip(rows.to_vec2::<f32>().unwrap()) {
                reduced.add(page, &row);
            }
            assert_eq!(reduced.heads, all.heads, "{earlier} and {count} tokens");
        }
    }
}
