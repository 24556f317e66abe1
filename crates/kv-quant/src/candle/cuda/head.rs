//! A sequence on the device: for each kv head a block table and a ring of its newest entries.

use super::records::{Shared, Table};
use crate::cuda::{KvHead, Layout, TILE};
use crate::{Axis, Flush, Format};
use longctx_core::Result;
use longctx_cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use longctx_cuda::{Uploaded, upload};
use std::ops::Range;
use std::sync::Arc;

/// A kv head of a sequence. Appended tokens take *slots*, numbered from 0. Slots before
/// `packed.values` are read from records, the others from the ring. An entry evicted from a record
/// leaves a hole; entries are the slots that are not holes.
#[derive(Debug, Clone)]
pub struct Head {
    pub table: Table,
    /// Number of slots: entries and holes.
    pub slots: usize,
    pub valid: ValidityMask,
    pub packed: Packed,
    /// First slot in the ring.
    pub ring_from: usize,
    /// Slot s is at position `(s + shift) % ring`.
    pub shift: usize,
}

/// The number of packed slots of a head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Packed {
    /// Slots whose keys are packed; at least `values`.
    pub keys: usize,
    /// Slots that are read from records.
    pub values: usize,
    /// Tiles whose values are packed; the last can extend beyond `values`, but not beyond `keys`.
    pub tiles: usize,
}

impl Head {
    fn new(records: &Shared) -> Self {
        let (table, packed, valid) =
            (Table::new(records), Packed::default(), ValidityMask::default());
        Self { table, slots: 0, valid, packed, ring_from: 0, shift: 0 }
    }

    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.slots - self.valid.holes
    }

    /// Returns the slots of all entries; `None` if there are no holes.
    pub fn entry_slots(&self) -> Option<Vec<u32>> {
        let slots = || self.valid.slots_of(0..self.len()).map(|slot| slot as u32).collect();
        (self.valid.holes > 0).then(slots)
    }

    /// Returns whether another head holds as many slots, packed as far.
    pub fn is_like(&self, other: &Self) -> bool {
        let records = |head: &Self| head.table.numbers().len();
        (self.slots, self.packed, records(self)) == (other.slots, other.packed, records(other))
    }

    /// Returns the number of slots that are read from the ring.
    pub fn residual(&self) -> usize {
        self.slots - self.packed.values
    }

    /// Returns the effect of a truncation that drops nothing.
    pub fn unchanged(&self) -> Truncation {
        Truncation { packed: self.packed, unpacked: 0..0, ring_from: self.ring_from }
    }

    /// Returns the effect of a truncation to `slots` slots.
    ///
    /// With a rolling flush, groups that are still in the ring return to full precision. If a
    /// record of tokens that are packed one by one is divided, it is kept, and its other slots
    /// become holes. A divided record of keys along tokens is unpacked.
    pub fn truncated(&self, format: Format, group: usize, slots: usize) -> Truncation {
        let Packed { mut keys, values, tiles } = self.packed;
        if let Flush::Rolling(residual) = format.flush() {
            let missing = (keys + residual).saturating_sub(slots).next_multiple_of(group);
            let start = self.ring_from.max(keys.saturating_sub(group));
            keys -= missing.min(keys.saturating_sub(start) / group * group);
        }
        let (mut unpacked, mut ring_from) = (0..0, self.ring_from);
        if keys > slots && format.keys().axis == Axis::Channels {
            keys = slots.next_multiple_of(group);
            // The ring positions of earlier slots contain removed tokens.
            ring_from = keys;
        } else if keys > slots {
            keys = slots - slots % group;
            unpacked = keys..values.min(slots);
        }
        let packed = Packed { keys, values: values.min(keys), tiles: tiles.min(keys / TILE) };
        Truncation { packed, unpacked, ring_from: ring_from.min(keys) }
    }
}

/// The slots that are not holes.
#[derive(Debug, Clone, Default)]
pub struct ValidityMask {
    /// A bit per slot that was packed at the last eviction, set if the slot is not a hole. Later
    /// slots are not holes. Empty if there are no holes.
    bits: Vec<u32>,
    holes: usize,
    /// For each word of `bits`, the word and the number of entries before its slots, as `valid` in
    /// kernels/args.cuh.
    on_device: Option<Arc<Uploaded>>,
}

impl ValidityMask {
    /// Marks the listed slots among the first `slots` as entries; later slots are not holes either.
    pub fn new(
        stream: &Arc<CudaStream>,
        slots: usize,
        entries: impl Iterator<Item = usize>,
    ) -> Result<Self> {
        let mut bits = vec![0u32; slots.div_ceil(32)];
        let mut count = 0;
        for slot in entries {
            bits[slot / 32] |= 1 << (slot % 32);
            count += 1;
        }
        if count == slots {
            return Ok(Self::default());
        }
        let on_device = Arc::new(upload(stream, &words(&bits))?);
        Ok(Self { bits, holes: slots - count, on_device: Some(on_device) })
    }

    /// Returns the bits of the first `packed` slots, in which the slots from `slots` on are holes.
    pub fn truncated(&self, stream: &Arc<CudaStream>, packed: usize, slots: usize) -> Result<Self> {
        if self.holes == 0 && packed <= slots {
            return Ok(Self::default());
        }
        Self::new(stream, packed, (0..packed.min(slots)).filter(|&slot| self.contains(slot)))
    }

    pub fn holes(&self) -> usize {
        self.holes
    }

    /// Returns the number of slots that the bits cover.
    pub fn slots(&self) -> usize {
        32 * self.bits.len()
    }

    pub fn address(&self) -> u64 {
        self.on_device.as_ref().map_or(0, |words| words.address())
    }

    pub fn contains(&self, slot: usize) -> bool {
        self.bits.get(slot / 32).is_none_or(|bits| bits >> (slot % 32) & 1 == 1)
    }

    /// Returns the slots of entries, which are passed in increasing order.
    pub fn slots_of(&self, entries: impl Iterator<Item = usize>) -> impl Iterator<Item = usize> {
        let (mut word, mut before) = (0, 0);
        entries.map(move |entry| {
            while let Some(bits) = self.bits.get(word)
                && before + bits.count_ones() as usize <= entry
            {
                before += bits.count_ones() as usize;
                word += 1;
            }
            match self.bits.get(word) {
                Some(&bits) => 32 * word + nth_one(bits, entry - before),
                None => entry + self.holes,
            }
        })
    }

    pub fn bytes(&self) -> usize {
        4 * self.bits.len() + self.on_device.as_ref().map_or(0, |words| words.len())
    }
}

/// Returns each word of bits with the number of bits before it, as in kernels/args.cuh.
pub fn words(bits: &[u32]) -> Vec<u64> {
    let mut before = 0u64;
    let word = |&bits: &u32| {
        let word = before << 32 | u64::from(bits);
        before += u64::from(bits.count_ones());
        word
    };
    bits.iter().map(word).collect()
}

/// Returns the position of the `n`-th set bit, counted from 0.
fn nth_one(mut bits: u32, n: usize) -> usize {
    for _ in 0..n {
        bits &= bits - 1;
    }
    bits.trailing_zeros() as usize
}

/// The effect of truncating a head.
#[derive(Debug)]
pub struct Truncation {
    pub packed: Packed,
    /// Slots that return from the divided record to the ring.
    pub unpacked: Range<usize>,
    pub ring_from: usize,
}

/// Returns the capacity of a ring: the residual, the next group, and the packed entries that a
/// rolling flush keeps.
pub fn ring_places(format: Format, layout: Layout) -> usize {
    let residual = match format.flush() {
        Flush::Staggered(residual) | Flush::Rolling(residual) => residual,
        Flush::Immediate | Flush::Never => 0,
    };
    residual + layout.group() + format.residual_overlap()
}

/// Returns the largest numbers of key records and of value tiles that one token completes.
pub fn completed_by_token(format: Format, layout: Layout) -> (usize, usize) {
    match format.flush() {
        Flush::Staggered(residual) => (residual / layout.group(), 1),
        Flush::Rolling(_) => (1, layout.group() / TILE),
        Flush::Immediate | Flush::Never => (0, 0),
    }
}

/// Number of records per head in the table of a new sequence.
const PLACES: usize = 16;

/// The state of a sequence.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub heads: Vec<Head>,
    /// `[kv_heads, ring, head_dim]`, f16 or bf16.
    pub ring_k: CudaSlice<u16>,
    pub ring_v: CudaSlice<u16>,
    /// Record addresses of all heads, `[kv_heads, places]`.
    pub table: CudaSlice<u64>,
    pub places: usize,
    /// A number that is unique among all sequences of the pool.
    pub number: u64,
    /// The error of a failed call, if the sequence is poisoned.
    pub poisoned: Option<String>,
}

/// The memory of all heads.
#[derive(Debug, Clone, Copy)]
pub struct AllAddresses {
    first: KvHead,
    /// Bytes from a head's table to the next head's, and from ring to ring.
    table: u64,
    ring: u64,
}

impl AllAddresses {
    /// Returns a head's memory, without the bits of its holes.
    pub fn of_head(&self, head: usize) -> KvHead {
        let head = head as u64;
        KvHead {
            table: self.first.table + head * self.table,
            ring_k: self.first.ring_k + head * self.ring,
            ring_v: self.first.ring_v + head * self.ring,
            valid: 0,
        }
    }
}

impl Sequence {
    /// `ring`: elements of the ring of a kv head.
    pub fn new(
        stream: &Arc<CudaStream>,
        records: &Shared,
        (kv_heads, ring): (usize, usize),
        number: u64,
    ) -> Result<Self> {
        let heads = (0..kv_heads).map(|_| Head::new(records)).collect();
        let ring = || stream.alloc_zeros(kv_heads * ring);
        let (ring_k, ring_v) = (ring()?, ring()?);
        let table = stream.alloc_zeros(kv_heads * PLACES)?;
        Ok(Self { heads, ring_k, ring_v, table, places: PLACES, number, poisoned: None })
    }

    /// Returns a sequence with the same entries that shares the records.
    pub fn fork(&self, stream: &Arc<CudaStream>, number: u64) -> Result<Self> {
        let copy = |ring| stream.clone_dtod(ring);
        let (ring_k, ring_v) = (copy(&self.ring_k)?, copy(&self.ring_v)?);
        let table = stream.clone_dtod(&self.table)?;
        let (heads, places) = (self.heads.clone(), self.places);
        Ok(Self { heads, ring_k, ring_v, table, places, number, poisoned: None })
    }

    /// Makes room in the device's table for `records` records per head.
    pub fn reserve(&mut self, stream: &Arc<CudaStream>, records: usize) -> Result<()> {
        if records <= self.places {
            return Ok(());
        }
        let (old, heads) = (self.places, self.heads.len());
        let places = records.max(old + old / 4);
        let mut grown = stream.alloc_zeros::<u64>(heads * places)?;
        for head in 0..heads {
            let from = self.table.slice(head * old..(head + 1) * old);
            let mut to = grown.slice_mut(head * places..head * places + old);
            stream.memcpy_dtod(&from, &mut to)?;
        }
        (self.table, self.places) = (grown, places);
        Ok(())
    }

    /// Writes a head's whole table to the device.
    pub fn upload(&mut self, stream: &Arc<CudaStream>, head: usize) -> Result<()> {
        let addresses = self.heads[head].table.addresses(0);
        if addresses.is_empty() {
            return Ok(());
        }
        let first = head * self.places;
        let mut to = self.table.slice_mut(first..first + addresses.len());
        Ok(stream.memcpy_htod(&addresses, &mut to)?)
    }

    /// Returns whether all heads hold the same tokens, packed as far, without holes.
    pub fn is_uniform(&self) -> bool {
        let first = &self.heads[0];
        let like = |head: &Head| head.is_like(first) && head.shift == first.shift;
        self.heads.iter().all(|head| head.valid.holes == 0 && like(head))
    }

    /// `ring`: elements of the ring of a kv head.
    pub fn addresses(&self, stream: &CudaStream, ring: usize) -> AllAddresses {
        let first = KvHead {
            valid: 0,
            table: self.table.device_ptr(stream).0,
            ring_k: self.ring_k.device_ptr(stream).0,
            ring_v: self.ring_v.device_ptr(stream).0,
        };
        AllAddresses { first, table: 8 * self.places as u64, ring: 2 * ring as u64 }
    }

    /// Returns the bytes of the rings.
    pub fn ring_bytes(&self) -> usize {
        2 * (self.ring_k.len() + self.ring_v.len())
    }

    /// Returns the bytes of the tables, on the device and on the host.
    pub fn table_bytes(&self) -> usize {
        let numbers: usize = self.heads.iter().map(|head| head.table.numbers().len()).sum();
        let valid: usize = self.heads.iter().map(|head| head.valid.bytes()).sum();
        8 * self.places * self.heads.len() + 4 * numbers + valid + size_of::<Self>()
    }
}
