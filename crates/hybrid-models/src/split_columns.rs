//! Matrices that several threads write at once, each its own columns.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

/// A row-major matrix of units (channels, heads), each `per_unit` columns wide.
pub struct UnitMatrix<'a> {
    pub data: &'a mut [f32],
    pub per_unit: usize,
}

/// The columns of one task. No other task reads or writes them meanwhile.
pub struct Columns<'a> {
    start: *mut f32,
    row_stride: usize,
    rows: usize,
    count: usize,
    data: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `Columns` represents the exclusive borrow of its own columns, and f32 may move between
// threads.
#[allow(unsafe_code)]
unsafe impl Send for Columns<'_> {}

impl Columns<'_> {
    /// Returns the columns' part of a row.
    #[allow(unsafe_code)]
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: `split_columns` made `start` point at least `count` columns before the end of a
        // row of `row_stride` in a matrix of `rows` rows, so the part lies within it. Other tasks
        // have other columns, and `&mut self` keeps this task from holding two rows at a time.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.row_stride), self.count) }
    }
}

/// A matrix's address, shared with threads.
#[derive(Clone, Copy)]
struct BasePtr(*mut f32);

// SAFETY: only `split_columns` uses the address, and makes disjoint parts of it.
#[allow(unsafe_code)]
unsafe impl Send for BasePtr {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for BasePtr {}

impl BasePtr {
    fn get(self) -> *mut f32 {
        self.0
    }
}

/// Splits `units` units into tasks of `step` units and calls each task with its columns of every
/// matrix, in parallel if `parallel`.
pub fn split_columns<const N: usize>(
    units: usize,
    step: usize,
    parallel: bool,
    matrices: [UnitMatrix<'_>; N],
    task: impl Fn(Range<usize>, [Columns<'_>; N]) + Sync,
) {
    let bases = matrices.map(|UnitMatrix { data, per_unit }| {
        let width = units * per_unit;
        assert!(width > 0 && data.len().is_multiple_of(width), "rows of {width} numbers");
        (BasePtr(data.as_mut_ptr()), per_unit, data.len() / width)
    });
    let run = |i: usize| {
        let range = i * step..units.min((i + 1) * step);
        let columns = bases.map(|(base, per_unit, rows)| {
            let offset = if rows == 0 { 0 } else { range.start * per_unit };
            // SAFETY: `range` lies within `units`, so the address lies within the first row, if
            // there is one.
            #[allow(unsafe_code)]
            let start = unsafe { base.get().add(offset) };
            let count = range.len() * per_unit;
            Columns { start, row_stride: units * per_unit, rows, count, data: PhantomData }
        });
        task(range, columns);
    };
    let tasks = units.div_ceil(step);
    match parallel && tasks > 1 {
        true => (0..tasks).into_par_iter().for_each(run),
        false => (0..tasks).for_each(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_written_once() {
        for parallel in [false, true] {
            let (mut a, mut b) = (vec![0.0; 5 * 7], vec![0.0; 2 * 7 * 3]);
            let matrices = [
                UnitMatrix { data: &mut a, per_unit: 1 },
                UnitMatrix { data: &mut b, per_unit: 3 },
            ];
            split_columns(7, 3, parallel, matrices, |units, [mut a, mut b]| {
                for row in 0..5 {
                    for (x, unit) in a.row(row).iter_mut().zip(units.clone()) {
                        *x += (10 * row + unit) as f32;
                    }
                }
                for row in 0..2 {
                    for (i, x) in b.row(row).iter_mut().enumerate() {
                        *x += (100 * row + 3 * units.start + i) as f32;
                    }
                }
            });
            assert!((0..35).all(|i| a[i] == (10 * (i / 7) + i % 7) as f32));
            assert!((0..42).all(|i| b[i] == (100 * (i / 21) + i % 21) as f32));
        }
    }

    #[test]
    #[should_panic(expected = "row 2 of 2")]
    fn an_extra_row_is_refused() {
        let mut a = [0.0; 6];
        split_columns(3, 1, false, [UnitMatrix { data: &mut a, per_unit: 1 }], |_, [mut a]| {
            a.row(2)[0] = 1.0
        });
    }
}
