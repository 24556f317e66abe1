//! The minimum and maximum of each key channel per page.

use crate::GroupReduction;
use half::f16;
use longctx_core::Footprint;

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

    /// Adds a head's keys `[tokens, head_dim]` of the tokens from `first` on.
    pub fn add(&mut self, head: usize, first: usize, keys: &[f32]) {
        let (d, bounds) = (self.head_dim, &mut self.heads[head]);
        for (i, key) in keys.chunks_exact(d).enumerate() {
            let at = (first + i) / self.page_size * 2 * d;
            let rounded = key.iter().map(|&x| round(x));
            if at == bounds.len() {
                bounds.extend(rounded.clone());
                bounds.extend(rounded);
                continue;
            }
            let (low, high) = bounds[at..at + 2 * d].split_at_mut(d);
            for (x, (low, high)) in rounded.zip(low.iter_mut().zip(high)) {
                *low = if x < *low { x } else { *low };
                *high = if x > *high { x } else { *high };
            }
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
