//! The newest tokens in full precision: a ring of f16 rows.

use crate::kernel::widen_into;
use half::f16;

/// Rows that room is made for at a time.
const STEP: usize = 8;

/// A first-in, first-out queue of rows, in f16.
#[derive(Debug, Clone)]
pub struct Residual {
    columns: usize,
    ring: Vec<f16>,
    first: usize,
    len: usize,
}

impl Residual {
    pub fn new(columns: usize) -> Self {
        Self { columns, ring: Vec::new(), first: 0, len: 0 }
    }

    /// Rows held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Row `i`, counted from the oldest.
    pub fn row(&self, i: usize) -> &[f16] {
        let at = (self.first + i) % self.room() * self.columns;
        &self.ring[at..at + self.columns]
    }

    /// All rows, the oldest first.
    #[cfg(feature = "save")]
    pub fn rows(&self) -> impl Iterator<Item = &[f16]> {
        (0..self.len).map(|i| self.row(i))
    }

    /// Writes row `i` in f32.
    pub fn widen(&self, i: usize, out: &mut [f32]) {
        widen_into(self.row(i), out);
    }

    /// The oldest `count` rows, one after the other.
    pub fn oldest(&self, count: usize) -> Vec<f16> {
        let mut rows = Vec::with_capacity(count * self.columns);
        (0..count).for_each(|i| rows.extend_from_slice(self.row(i)));
        rows
    }

    /// Appends rows.
    pub fn push(&mut self, rows: &[f16]) {
        let count = rows.len() / self.columns;
        self.make_room(self.len + count);
        for (i, row) in rows.chunks_exact(self.columns).enumerate() {
            let at = (self.first + self.len + i) % self.room() * self.columns;
            self.ring[at..at + self.columns].copy_from_slice(row);
        }
        self.len += count;
    }

    /// Forgets the oldest `count` rows. What a whole prompt needed is given back once few rows are left: a ring shrinks when it is more
    /// than half empty, so that moving the rest costs no more than dropping did.
    pub fn drop_oldest(&mut self, count: usize) {
        self.len -= count;
        if self.len > 0 {
            self.first = (self.first + count) % self.room();
        }
        if self.room() > 2 * (self.len + STEP) || self.len == 0 {
            let left: Vec<_> = (0..self.len).collect();
            self.retain(&left);
        }
    }

    /// Keeps the rows named, in increasing order.
    pub fn retain(&mut self, keep: &[usize]) {
        let mut kept = Self::new(self.columns);
        kept.make_room(keep.len());
        keep.iter().for_each(|&i| kept.push(self.row(i)));
        *self = kept;
    }

    /// Bytes of the rows, and of the room for more.
    pub fn bytes(&self) -> (usize, usize) {
        let held = self.len * self.columns;
        (held * size_of::<f16>(), (self.ring.capacity() - held) * size_of::<f16>())
    }

    fn room(&self) -> usize {
        self.ring.len() / self.columns
    }

    fn make_room(&mut self, rows: usize) {
        if rows <= self.room() {
            return;
        }
        let mut ring = Vec::with_capacity(rows.next_multiple_of(STEP) * self.columns);
        (0..self.len).for_each(|i| ring.extend_from_slice(self.row(i)));
        ring.resize(ring.capacity(), f16::ZERO);
        *self = Self { ring, first: 0, ..*self };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_queue() {
        let row = |i: usize| vec![f16::from_f32(i as f32); 3];
        let mut queue = Residual::new(3);
        let mut oldest = 0;
        for i in 0..200 {
            queue.push(&row(i));
            if queue.len() > 40 {
                queue.drop_oldest(1);
                oldest += 1;
            }
            assert_eq!(queue.row(queue.len() - 1), row(i));
            assert_eq!(queue.row(0), row(oldest));
        }
        assert_eq!(queue.oldest(2), [row(160), row(161)].concat());
        // Rows never need more than the next step of room.
        assert!(queue.bytes().1 <= STEP * 3 * 2);
        queue.retain(&[0, 39]);
        assert_eq!(queue.oldest(2), [row(160), row(199)].concat());
        queue.drop_oldest(2);
        assert_eq!(queue.bytes(), (0, 0));
    }
}
