//! Packed keys and values of one layer for many sequences, in blocks that sequences share.

mod append;
pub(crate) mod batch;
mod footprint;
pub(crate) mod head;
pub(crate) mod memory;
mod residual;
mod retain;
mod slab_memory;
mod slabs;
mod truncate;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::rotary::Rotary;
use crate::{Codes, Error, Format, KeyBasis, Result};
pub use footprint::PoolBytes;
use head::Head;
use memory::{BlockLayout, PoolMemory};
use rayon::prelude::*;

/// Number of entries that a thread dequantizes at a time.
const READ: usize = 128;

/// The dimensions of a layer's heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PoolShape {
    /// Number of key/value heads.
    pub kv_heads: usize,
    /// Channels of a key or query.
    pub head_dim: usize,
    /// Channels of a value or output.
    pub value_dim: usize,
}

/// Packed keys and values of one layer for many sequences of any lengths.
///
/// A sequence has a block table for each kv head. A block holds a few dozen packed tokens of one kv
/// head; the newest tokens (the residual) are in pages in full precision. Forks share blocks and
/// pages; a shared one is copied before it is written. Sequence ids are chosen by the caller. A
/// pool grows as needed, unless it has a fixed [capacity](Self::with_capacity).
///
/// Evicted entries leave holes, which the attention skips. A block with only holes is freed.
#[derive(Debug, Clone)]
pub struct Pool {
    pub(crate) shape: PoolShape,
    pub(crate) format: Format,
    pub(crate) rotary: Option<Arc<Rotary>>,
    pub(crate) memory: PoolMemory,
    pub(crate) seqs: BTreeMap<u64, Sequence>,
    capacity: Option<usize>,
}

/// The pool's entries of one sequence.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    /// The kv heads, `[kv_heads]`.
    pub heads: Vec<Head>,
}

impl Sequence {
    fn new(kv_heads: usize) -> Self {
        Self { heads: vec![Head::default(); kv_heads] }
    }
}

impl Pool {
    /// Creates an empty pool.
    ///
    /// # Errors
    /// [`Error::Setting`] for a dimension of 0, or a format with keys [before
    /// RoPE](KeyBasis::BeforeRope).
    pub fn new(shape: PoolShape, format: Format) -> Result<Self> {
        if format.key_basis() == KeyBasis::BeforeRope {
            let expected = "a rotary embedding for keys before RoPE (`Pool::before_rope`)";
            return Err(Error::setting("rotary embedding", expected, "none"));
        }
        Self::make(shape, format, None)
    }

    /// Creates an empty pool whose keys are given before the rotary embedding and are rotated when
    /// they are scored. Queries are given rotated. Entries of such a pool cannot be
    /// [evicted](Self::retain), because the position of a key is its index.
    ///
    /// # Errors
    /// [`Error::Setting`] for a dimension of 0, fewer channels than the embedding rotates, or keys
    /// that are not plain asymmetric integers.
    pub fn before_rope(shape: PoolShape, format: Format, rotary: Arc<Rotary>) -> Result<Self> {
        let keys = format.keys();
        if keys.codes != Codes::Asymmetric || keys.rotated {
            let expected = "asymmetric integers for keys before RoPE, without a Hadamard rotation";
            return Err(Error::setting("keys", expected, format!("{keys:?}")));
        }
        let rotated = 2 * rotary.frequencies().len();
        if rotated > shape.head_dim {
            let expected = format!("at most head_dim = {}", shape.head_dim);
            return Err(Error::setting("rotated channels", expected, rotated));
        }
        Self::make(shape, format.with_key_basis(KeyBasis::BeforeRope), Some(rotary))
    }

    fn make(shape: PoolShape, format: Format, rotary: Option<Arc<Rotary>>) -> Result<Self> {
        let PoolShape { kv_heads, head_dim, value_dim } = shape;
        let sizes = [("kv_heads", kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)];
        if let Some((name, size)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(Error::setting(name, "at least 1", size));
        }
        let memory = PoolMemory::new(BlockLayout::new(&format, head_dim, value_dim)?);
        Ok(Self { shape, format, rotary, memory, seqs: BTreeMap::new(), capacity: None })
    }

    /// Limits the blocks and pages in use to `bytes` bytes.
    ///
    /// Block tables, and allocated blocks that are not in use, are not included: see
    /// [`footprint`](Self::footprint).
    ///
    /// An empty pool with a capacity of 32 MiB or more allocates 4 MiB at a time, in huge pages
    /// where the system has them, which makes attention over long sequences faster. It keeps the
    /// memory until it is [cleared](Self::clear). All other pools allocate 16 blocks at a time up
    /// to 16 MiB, and 4 MiB at a time beyond. They free memory when more than an eighth of it is
    /// unused.
    pub fn with_capacity(self, bytes: usize) -> Self {
        const LARGE: usize = 32 << 20;
        let large = bytes >= LARGE && self.seqs.is_empty();
        let memory = if large { self.memory.with_large_slabs() } else { self.memory };
        Self { memory, capacity: Some(bytes), ..self }
    }

    /// Returns the largest number of bytes of blocks and pages; `None` for a pool that grows.
    pub fn capacity(&self) -> Option<usize> {
        self.capacity
    }

    /// Returns the bytes that are still free for blocks and pages; `usize::MAX` for a pool that
    /// grows.
    pub fn free_bytes(&self) -> usize {
        self.capacity.map_or(usize::MAX, |bytes| bytes.saturating_sub(self.memory.used()))
    }

    pub(crate) fn check_room(&self, needed: usize) -> Result<()> {
        match self.free_bytes() {
            free if needed > free => Err(Error::PoolFull { needed, free }),
            _ => Ok(()),
        }
    }

    /// Makes `to` a copy of `from` that shares all of its memory. Only the tables of block numbers
    /// are copied. A block or page is copied when one of the sequences writes to it.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`] for `from`; [`Error::Mismatch`] if `to` exists.
    pub fn fork(&mut self, from: u64, to: u64) -> Result<()> {
        self.check_unseen(to)?;
        let Some(sequence) = self.seqs.get(&from) else { return Err(Error::UnknownSequence(from)) };
        let heads = sequence.heads.iter().map(|head| head.fork(&mut self.memory)).collect();
        self.seqs.insert(to, Sequence { heads });
        Ok(())
    }

    pub(crate) fn check_unseen(&self, seq: u64) -> Result<()> {
        match self.seqs.contains_key(&seq) {
            true => Err(Error::mismatch("sequence", "a new one", format!("{seq}, which exists"))),
            false => Ok(()),
        }
    }

    /// Removes a sequence and frees its blocks. Returns whether it existed.
    pub fn remove(&mut self, seq: u64) -> bool {
        let Some(mut sequence) = self.seqs.remove(&seq) else { return false };
        sequence.heads.iter_mut().for_each(|head| head.release(&mut self.memory));
        self.memory.shrink();
        true
    }

    /// Removes all sequences and frees all memory.
    pub fn clear(&mut self) {
        self.seqs.clear();
        self.memory.clear();
    }

    /// Returns the sequences, in increasing order.
    pub fn seqs(&self) -> impl ExactSizeIterator<Item = u64> {
        self.seqs.keys().copied()
    }

    /// Returns the number of entries of each kv head, `[kv_heads]`; `None` for an unknown sequence.
    pub fn lens(&self, seq: u64) -> Option<Vec<usize>> {
        Some(self.seqs.get(&seq)?.heads.iter().map(|head| head.len).collect())
    }

    /// Returns the keys `[entries, head_dim]` and values `[entries, value_dim]` of one kv head,
    /// dequantized. Keys given before RoPE are returned rotated.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] if there is no such head.
    pub fn read(&self, seq: u64, kv_head: usize) -> Result<(Vec<f32>, Vec<f32>)> {
        let len = self.head(seq, kv_head)?.len;
        self.read_range(seq, kv_head, 0..len)
    }

    /// Reads a range of entries, like [`read`](Self::read).
    ///
    /// # Errors
    /// As [`read`](Self::read), and [`Error::Mismatch`] for a range past the head's end.
    pub fn read_range(
        &self,
        seq: u64,
        kv_head: usize,
        entries: Range<usize>,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let head = self.head(seq, kv_head)?;
        if entries.start > entries.end || entries.end > head.len {
            let expected = format!("a range within {}", head.len);
            return Err(Error::mismatch("entries to read", expected, format!("{entries:?}")));
        }
        let PoolShape { head_dim, value_dim, .. } = self.shape;
        let mut keys = vec![0.0; entries.len() * head_dim];
        let mut values = vec![0.0; entries.len() * value_dim];
        let slots: Vec<usize> = head.slots_of(entries).collect();
        let parts =
            keys.par_chunks_mut(READ * head_dim).zip(values.par_chunks_mut(READ * value_dim));
        parts.zip(slots.par_chunks(READ)).for_each(|((keys, values), slots)| {
            let codes = &mut Vec::new();
            let rows = keys.chunks_exact_mut(head_dim).zip(values.chunks_exact_mut(value_dim));
            for (&slot, (key, value)) in slots.iter().zip(rows) {
                head.read_key(&self.memory, slot, codes, key);
                head.read_value(&self.memory, slot, codes, value);
                if let Some(rotary) = &self.rotary {
                    rotary.rotate_to_token(key, slot);
                }
            }
        });
        Ok((keys, values))
    }

    fn head(&self, seq: u64, kv_head: usize) -> Result<&Head> {
        let heads = &self.sequence(seq)?.heads;
        let wrong = || Error::mismatch("kv head", format!("below {}", heads.len()), kv_head);
        heads.get(kv_head).ok_or_else(wrong)
    }

    pub(crate) fn sequence(&self, seq: u64) -> Result<&Sequence> {
        self.seqs.get(&seq).ok_or(Error::UnknownSequence(seq))
    }

    /// Returns the dimensions of the heads.
    pub fn shape(&self) -> PoolShape {
        self.shape
    }

    /// Returns the format of keys and values.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Returns the rotary embedding of keys given before RoPE.
    pub fn rotary(&self) -> Option<&Arc<Rotary>> {
        self.rotary.as_ref()
    }
}
