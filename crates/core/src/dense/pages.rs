//! Keys and values of one kv head in pages: growing never moves what is there, and freed pages go back at once.

use crate::attention::{Element, Page};

/// Entries of a page.
const PAGE: usize = 256;
/// A page that is not full has room for fewer entries than this beyond those it holds: many heads hold few entries under an
/// eviction policy, and room that nothing uses would be most of their memory.
const ROOM: usize = 16;

/// One kv head's keys and values, `[entries, head_dim]` each, cut into pages of 256 entries.
#[derive(Debug, Clone)]
pub struct Pages<T> {
    head_dim: usize,
    keys: Vec<Vec<T>>,
    values: Vec<Vec<T>>,
}

impl<T: Element> Pages<T> {
    pub fn new(head_dim: usize) -> Self {
        Self { head_dim, keys: Vec::new(), values: Vec::new() }
    }

    pub fn len(&self) -> usize {
        match self.keys.as_slice() {
            [] => 0,
            [full @ .., last] => full.len() * PAGE + last.len() / self.head_dim,
        }
    }

    pub fn append(&mut self, keys: &[T], values: &[T]) {
        extend(&mut self.keys, keys, self.head_dim);
        extend(&mut self.values, values, self.head_dim);
    }

    /// Keeps the entries named, in increasing order, moving them forward in place.
    pub fn retain(&mut self, keep: &[u32]) {
        for pages in [&mut self.keys, &mut self.values] {
            compact(pages, keep, self.head_dim);
        }
    }

    pub fn pages(&self) -> Vec<Page<'_, T>> {
        let pair = |(keys, values)| Page { keys, values };
        self.keys
            .iter()
            .map(Vec::as_slice)
            .zip(self.values.iter().map(Vec::as_slice))
            .map(pair)
            .collect()
    }

    /// Bytes that hold entries, and bytes allocated beyond them.
    pub fn bytes(&self) -> (usize, usize) {
        let pages = || self.keys.iter().chain(&self.values);
        let held: usize = pages().map(Vec::len).sum();
        let allocated: usize = pages().map(Vec::capacity).sum();
        (held * size_of::<T>(), (allocated - held) * size_of::<T>())
    }
}

fn extend<T: Copy>(pages: &mut Vec<Vec<T>>, mut rows: &[T], head_dim: usize) {
    let page = PAGE * head_dim;
    while !rows.is_empty() {
        match pages.last_mut() {
            Some(last) if last.len() < page => {
                let (now, later) = rows.split_at(rows.len().min(page - last.len()));
                let room = (last.len() + now.len()).next_multiple_of(ROOM * head_dim);
                last.reserve_exact(room - last.len());
                last.extend_from_slice(now);
                rows = later;
            }
            _ => pages.push(Vec::new()),
        }
    }
}

fn compact<T: Copy>(pages: &mut Vec<Vec<T>>, keep: &[u32], head_dim: usize) {
    let place = |entry: usize| (entry / PAGE, entry % PAGE * head_dim);
    for (to, &from) in keep.iter().enumerate() {
        let ((to_page, to), (from_page, from)) = (place(to), place(from as usize));
        if to_page == from_page {
            pages[to_page].copy_within(from..from + head_dim, to);
        } else {
            let (before, after) = pages.split_at_mut(from_page);
            let row = &after[0][from..from + head_dim];
            before[to_page][to..to + head_dim].copy_from_slice(row);
        }
    }
    pages.truncate(keep.len().div_ceil(PAGE));
    if let Some(last) = pages.last_mut() {
        last.truncate((keep.len() - 1) % PAGE * head_dim + head_dim);
        last.shrink_to(last.len().next_multiple_of(ROOM * head_dim));
    }
}
