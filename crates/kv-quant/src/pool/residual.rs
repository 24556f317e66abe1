//! The residual of a head: its newest keys or values in full precision, rows of f16 in pages.

use super::memory::PAGE;
use super::slabs::Slabs;
use half::f16;

/// The rows of the slots from `start` to `end`. Pages begin at multiples of [`PAGE`] slots.
#[derive(Debug, Clone, Default)]
pub struct Residual {
    pub start: usize,
    pub end: usize,
    pub pages: Vec<u32>,
}

/// Returns the number of pages of the slots from `start` to `end`.
fn pages_of(start: usize, end: usize) -> usize {
    if start == end { 0 } else { end.div_ceil(PAGE) - start / PAGE }
}

/// Returns the rows of a page.
pub fn rows_mut(page: &mut [crate::layout::Line]) -> &mut [f16] {
    bytemuck::cast_slice_mut(page)
}

impl Residual {
    /// Returns the row of a slot.
    pub fn row<'a>(&self, slabs: &'a Slabs, slot: usize, columns: usize) -> &'a [f16] {
        let page = slabs.get(self.page(slot));
        &bytemuck::cast_slice(page)[slot % PAGE * columns..][..columns]
    }

    /// Returns the page of a slot.
    pub fn page(&self, slot: usize) -> u32 {
        self.pages[slot / PAGE - self.start / PAGE]
    }

    /// Returns the number of pages taken from `slabs` by advancing to `start` and `end`.
    pub fn pages_needed(&self, slabs: &Slabs, start: usize, end: usize) -> isize {
        let (before, after) = self.pages.split_at(self.pages_before(start));
        let freed = before.iter().filter(|&&page| !slabs.is_shared(page)).count();
        let stay = after.len();
        let copied = end > self.end && stay > 0 && self.shares_last_page(slabs);
        pages_of(start, end) as isize - stay as isize - freed as isize + isize::from(copied)
    }

    /// Releases the rows before `start`.
    pub fn advance(&mut self, slabs: &mut Slabs, start: usize) {
        let before = self.pages_before(start);
        self.pages.drain(..before).for_each(|page| slabs.release(page));
        self.start = start;
        self.end = self.end.max(start);
    }

    /// Makes room for rows up to `end`.
    pub fn grow(&mut self, slabs: &mut Slabs, end: usize) {
        if end > self.end
            && self.shares_last_page(slabs)
            && let Some(last) = self.pages.last_mut()
        {
            *last = slabs.make_unique(*last);
        }
        self.pages.resize_with(pages_of(self.start, end), || slabs.alloc());
        self.end = end;
    }

    /// Releases the rows from `end` on.
    pub fn truncate(&mut self, slabs: &mut Slabs, end: usize) {
        self.end = end;
        self.start = self.start.min(end);
        let left = pages_of(self.start, end);
        self.pages.drain(left..).for_each(|page| slabs.release(page));
    }

    /// Returns the number of pages taken from `slabs` by replacing all rows with `rows` rows from
    /// `start` on.
    pub fn pages_to_replace(&self, slabs: &Slabs, start: usize, rows: usize) -> isize {
        let freed = self.pages.iter().filter(|&&page| !slabs.is_shared(page)).count();
        pages_of(start, start + rows) as isize - freed as isize
    }

    /// Replaces all rows with the given ones, starting at slot `start`.
    pub fn replace(&mut self, slabs: &mut Slabs, start: usize, rows: &[f16], columns: usize) {
        self.release(slabs);
        (self.start, self.end) = (start, start);
        self.grow(slabs, start + rows.len() / columns);
        for (slot, row) in (start..).zip(rows.chunks_exact(columns)) {
            let page = rows_mut(slabs.get_mut(self.page(slot)));
            page[slot % PAGE * columns..][..columns].copy_from_slice(row);
        }
    }

    /// Adds a reference to the pages, for a copy of the table.
    pub fn share(&self, slabs: &mut Slabs) {
        self.pages.iter().for_each(|&page| slabs.share(page));
    }

    /// Releases all pages.
    pub fn release(&mut self, slabs: &mut Slabs) {
        self.pages.drain(..).for_each(|page| slabs.release(page));
    }

    /// Returns the bytes of the table.
    pub fn table_bytes(&self) -> usize {
        self.pages.capacity() * size_of::<u32>()
    }

    /// Returns the number of pages that are unused once the rows begin at `start`.
    fn pages_before(&self, start: usize) -> usize {
        if start < self.end { start / PAGE - self.start / PAGE } else { self.pages.len() }
    }

    /// Returns whether new rows are written to a page that others hold too.
    fn shares_last_page(&self, slabs: &Slabs) -> bool {
        let partly_filled = !self.end.is_multiple_of(PAGE);
        partly_filled && self.pages.last().is_some_and(|&page| slabs.is_shared(page))
    }
}
