//! Bytes held by a pool, counted.

use super::head::Head;
use super::memory::{PAGE, PoolMemory};
use super::{Pool, Sequence};
use half::f16;

/// Bytes held by a [`Pool`] or by one of its sequences.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolBytes {
    /// Packed codes, including holes.
    pub codes: usize,
    /// Scales, zero points and factors.
    pub scales: usize,
    /// The newest tokens in full precision (the residual), in f16.
    pub residual: usize,
    /// Block tables, reference counts, and validity masks of packed entries.
    pub bookkeeping: usize,
    /// Memory allocated for future tokens: free blocks, and the free part of blocks being filled.
    pub slack: usize,
}

impl PoolBytes {
    /// Returns the sum of all fields.
    pub fn total(&self) -> usize {
        self.codes + self.scales + self.residual + self.bookkeeping + self.slack
    }
}

impl Pool {
    /// Returns the bytes held for all sequences, including allocated memory that is not in use.
    pub fn footprint(&self) -> PoolBytes {
        let mut bytes = PoolBytes::default();
        let mut counted = self.memory.slabs().map(|slabs| vec![false; slabs.identifiers()]);
        for sequence in self.seqs.values() {
            self.add(sequence, &mut bytes, &mut |kind, block| {
                !std::mem::replace(&mut counted[kind][block as usize], true)
            });
        }
        for slabs in self.memory.slabs() {
            let (free, tables) = slabs.overhead();
            bytes.slack += free;
            bytes.bookkeeping += tables;
        }
        bytes
    }

    /// Returns the bytes held for one sequence; shared memory counts in full. Zeros for an unknown
    /// sequence.
    pub fn seq_footprint(&self, seq: u64) -> PoolBytes {
        let mut bytes = PoolBytes::default();
        if let Some(sequence) = self.seqs.get(&seq) {
            self.add(sequence, &mut bytes, &mut |_, _| true);
        }
        bytes
    }

    /// Adds a sequence's blocks and pages for which `new` returns true (not counted yet).
    fn add(
        &self,
        sequence: &Sequence,
        bytes: &mut PoolBytes,
        new: &mut impl FnMut(usize, u32) -> bool,
    ) {
        bytes.bookkeeping += size_of::<Sequence>() + size_of::<u64>();
        for head in &sequence.heads {
            head.add_blocks(&self.memory, bytes, |block| new(0, block));
            let residuals =
                [(&head.keys, &self.memory.key_pages), (&head.values, &self.memory.value_pages)];
            let columns = [self.shape.head_dim, self.shape.value_dim];
            for (kind, ((residual, slabs), columns)) in
                residuals.into_iter().zip(columns).enumerate()
            {
                for (i, &page) in (residual.start / PAGE..).zip(&residual.pages) {
                    if new(1 + kind, page) {
                        let rows = residual.end.min((i + 1) * PAGE) - residual.start.max(i * PAGE);
                        let held = rows * columns * size_of::<f16>();
                        bytes.residual += held;
                        bytes.slack += slabs.block_bytes() - held;
                    }
                }
                bytes.bookkeeping += residual.table_bytes();
            }
            let tables = head.blocks.capacity() + head.validity.capacity();
            bytes.bookkeeping += tables * size_of::<u32>() + size_of::<Head>();
        }
    }
}

impl Head {
    /// A block being filled counts by its rows.
    fn add_blocks(
        &self,
        memory: &PoolMemory,
        bytes: &mut PoolBytes,
        mut new: impl FnMut(u32) -> bool,
    ) {
        for (i, &block) in self.blocks.iter().enumerate() {
            if !new(block) {
                continue;
            }
            let mut used = 0;
            let parts = self.block(memory, i);
            for part in [parts.keys(), parts.values()] {
                let share = |bytes: usize| bytes * part.rows / part.layout.capacity;
                let codes = share(size_of_val(part.codes));
                let scales = [part.scales, part.zero_points, part.factors];
                let scales = share(scales.map(size_of_val::<[half::f16]>).iter().sum());
                bytes.codes += codes;
                bytes.scales += scales;
                used += codes + scales;
            }
            bytes.slack += memory.blocks.block_bytes() - used;
        }
    }
}
