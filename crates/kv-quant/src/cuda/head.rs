//! A sequence on the device: for each kv head a block table and a ring of its newest entries.

use super::kernels::TILE;
use super::layout::Layout;
use super::records::{Shared, Table};
use crate::{Axis, Flush, Format};
use longctx_core::Result;
use longctx_cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use std::ops::Range;
use std::sync::Arc;

/// A kv head of a sequence. Tokens appended take *slots*, numbered from 0; those before
/// `packed.values` are read from records, the others from the ring. An entry that is dropped from a
/// record leaves a hole; entries are the slots that are no holes.
#[derive(Debug, Clone)]
pub struct Head {
    pub table: Table,
    /// Entries and holes.
    pub slots: usize,
    pub live: Live,
    pub packed: Packed,
    /// Slots from here on are in the ring.
    pub ring_from: usize,
    /// Slot s lies at place `(s + shift) % ring`.
    pub shift: usize,
}

/// How far a head is packed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Packed {
    /// Slots whose keys are packed: never fewer than `values`.
    pub keys: usize,
    /// Slots that are read from records.
    pub values: usize,
    /// Tiles whose values are packed: the last may go beyond `values`, never beyond `keys`.
    pub tiles: usize,
}

impl Head {
    fn new(records: &Shared) -> Self {
        let (table, packed, live) = (Table::new(records), Packed::default(), Live::default());
        Self { table, slots: 0, live, packed, ring_from: 0, shift: 0 }
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.slots - self.live.holes
    }

    /// The slots of all entries; `None` where there are no holes.
    pub fn entry_slots(&self) -> Option<Vec<u32>> {
        let slots = || self.live.slots_of(0..self.len()).map(|slot| slot as u32).collect();
        (self.live.holes > 0).then(slots)
    }

    /// How far the head is packed once it has so many slots.
    pub fn packed_at(&self, format: Format, slots: usize) -> Packed {
        let Packed { keys, values, tiles } = self.packed;
        let ready = format.ready(slots - keys, slots - values);
        let (keys, values) = (keys + ready.0, values + ready.1);
        Packed { keys, values, tiles: tiles.max(values.div_ceil(TILE)) }
    }

    /// Records that the head takes for `more` entries.
    pub fn need(&self, format: Format, group: usize, more: usize) -> usize {
        self.packed_at(format, self.slots + more).keys / group - self.table.numbers().len()
    }

    /// Slots that are read from the ring.
    pub fn residual(&self) -> usize {
        self.slots - self.packed.values
    }

    /// What is left packed if the head is cut to so many slots.
    ///
    /// With a rolling flush, groups go back to full precision as far as the ring still has them. A
    /// cut into a record of tokens that are packed one by one keeps the record: its other slots
    /// become holes. A cut into a record of keys along tokens unpacks it.
    pub fn cut(&self, format: Format, group: usize, slots: usize) -> Cut {
        let Packed { mut keys, values, tiles } = self.packed;
        if let Flush::Rolling(residual) = format.flush() {
            let missing = (keys + residual).saturating_sub(slots).next_multiple_of(group);
            let start = self.ring_from.max(keys.saturating_sub(group));
            keys -= missing.min(keys.saturating_sub(start) / group * group);
        }
        let (mut unpacked, mut ring_from) = (0..0, self.ring_from);
        if keys > slots && format.keys().axis == Axis::Channels {
            keys = slots.next_multiple_of(group);
            // The ring has what the dropped tokens were.
            ring_from = keys;
        } else if keys > slots {
            keys = slots - slots % group;
            unpacked = keys..values.min(slots);
        }
        let packed = Packed { keys, values: values.min(keys), tiles: tiles.min(keys / TILE) };
        Cut { packed, unpacked, ring_from: ring_from.min(keys) }
    }
}

/// Which slots are no holes.
#[derive(Debug, Clone, Default)]
pub struct Live {
    /// A bit for each slot that was packed when entries were last dropped, set for those that are
    /// no holes. There are no holes after these; without any, there are no bits.
    bits: Vec<u32>,
    holes: usize,
    /// For each word of `bits`, that word and the entries before its slots, as `live` in
    /// kernels/args.cuh.
    on_device: Option<Arc<CudaSlice<u64>>>,
}

impl Live {
    /// Of so many slots those listed are no holes; later slots are none, either.
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
        let on_device = Arc::new(stream.clone_htod(&words(&bits))?);
        Ok(Self { bits, holes: slots - count, on_device: Some(on_device) })
    }

    /// The same of the first `packed` slots alone, of which those from `slots` on are holes.
    pub fn cut(&self, stream: &Arc<CudaStream>, packed: usize, slots: usize) -> Result<Self> {
        if self.holes == 0 && packed <= slots {
            return Ok(Self::default());
        }
        Self::new(stream, packed, (0..packed.min(slots)).filter(|&slot| self.contains(slot)))
    }

    pub fn holes(&self) -> usize {
        self.holes
    }

    /// Slots that the bits cover.
    pub fn slots(&self) -> usize {
        32 * self.bits.len()
    }

    pub fn address(&self, stream: &CudaStream) -> u64 {
        self.on_device.as_ref().map_or(0, |words| words.device_ptr(stream).0)
    }

    pub fn contains(&self, slot: usize) -> bool {
        self.bits.get(slot / 32).is_none_or(|bits| bits >> (slot % 32) & 1 == 1)
    }

    /// The slots of entries, which are given in increasing order.
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
        4 * self.bits.len() + self.on_device.as_ref().map_or(0, |words| 8 * words.len())
    }
}

/// Each word of bits and the number of bits before it, as kernels/args.cuh has them.
pub fn words(bits: &[u32]) -> Vec<u64> {
    let mut before = 0u64;
    let word = |&bits: &u32| {
        let word = before << 32 | u64::from(bits);
        before += u64::from(bits.count_ones());
        word
    };
    bits.iter().map(word).collect()
}

/// The position of the `n`-th set bit, counted from 0.
fn nth_one(mut bits: u32, n: usize) -> usize {
    for _ in 0..n {
        bits &= bits - 1;
    }
    bits.trailing_zeros() as usize
}

/// What cutting a head does.
#[derive(Debug)]
pub struct Cut {
    pub packed: Packed,
    /// Slots that go from the record that is cut to the ring.
    pub unpacked: Range<usize>,
    pub ring_from: usize,
}

/// Places of a ring: the residual, a group that comes, and what a rolling flush keeps of packed
/// entries.
pub fn ring_places(format: Format, layout: Layout) -> usize {
    let residual = match format.flush() {
        Flush::Staggered(residual) | Flush::Rolling(residual) => residual,
        Flush::Immediate | Flush::Never => 0,
    };
    residual + layout.group + format.residual_overlap()
}

/// Records of a head that a new sequence's table has room for.
const PLACES: usize = 16;

/// A sequence.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub heads: Vec<Head>,
    /// `[kv_heads, ring, head_dim]`, f16 or bf16.
    pub ring_k: CudaSlice<u16>,
    pub ring_v: CudaSlice<u16>,
    /// The addresses of the heads' records, `[kv_heads, places]`.
    pub table: CudaSlice<u64>,
    pub places: usize,
    /// A number that no other sequence of the pool has had.
    pub number: u64,
    /// Why it can't go on.
    pub poisoned: Option<String>,
}

/// Where a head's parts lie on the device.
pub struct Addresses {
    pub table: u64,
    pub ring_k: u64,
    pub ring_v: u64,
}

impl Sequence {
    /// `ring`: numbers of the ring of a kv head.
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

    /// A sequence with the same entries that shares the records.
    pub fn fork(&self, stream: &Arc<CudaStream>, number: u64) -> Result<Self> {
        let copy = |ring| stream.clone_dtod(ring);
        let (ring_k, ring_v) = (copy(&self.ring_k)?, copy(&self.ring_v)?);
        let table = stream.clone_dtod(&self.table)?;
        let (heads, places) = (self.heads.clone(), self.places);
        Ok(Self { heads, ring_k, ring_v, table, places, number, poisoned: None })
    }

    /// Makes room in the device's table for `records` records of each head.
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

    /// Writes a head's table to the device anew.
    pub fn upload(&mut self, stream: &Arc<CudaStream>, head: usize) -> Result<()> {
        let addresses = self.heads[head].table.addresses(0);
        if addresses.is_empty() {
            return Ok(());
        }
        let first = head * self.places;
        let mut to = self.table.slice_mut(first..first + addresses.len());
        Ok(stream.memcpy_htod(&addresses, &mut to)?)
    }

    /// `ring`: numbers of the ring of a kv head.
    pub fn addresses(&self, stream: &CudaStream, head: usize, ring: usize) -> Addresses {
        let of = |x: &CudaSlice<u16>| x.device_ptr(stream).0 + 2 * (head * ring) as u64;
        let table = self.table.device_ptr(stream).0 + 8 * (head * self.places) as u64;
        Addresses { table, ring_k: of(&self.ring_k), ring_v: of(&self.ring_v) }
    }

    /// Bytes of the rings.
    pub fn ring_bytes(&self) -> usize {
        2 * (self.ring_k.len() + self.ring_v.len())
    }

    /// Bytes of the tables, on the device and on the host.
    pub fn table_bytes(&self) -> usize {
        let numbers: usize = self.heads.iter().map(|head| head.table.numbers().len()).sum();
        let live: usize = self.heads.iter().map(|head| head.live.bytes()).sum();
        8 * self.places * self.heads.len() + 4 * numbers + live + size_of::<Self>()
    }
}
