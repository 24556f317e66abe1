//! A sequence on the device: for each kv head a block table and a ring of its newest entries.

use super::kernels::{Layout, TILE};
use super::records::{Shared, Table};
use crate::{Flush, Format};
use longctx_core::Result;
use longctx_cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use std::ops::Range;
use std::sync::Arc;

/// A kv head of a sequence. Entries are numbered from 0; those before `packed.values` are read from
/// records, the others from the ring.
#[derive(Debug, Clone)]
pub struct Head {
    pub table: Table,
    /// Entries.
    pub len: usize,
    pub packed: Packed,
    /// Entries from here on are in the ring.
    pub ring_from: usize,
    /// Entry e lies at place `(e + shift) % ring`.
    pub shift: usize,
}

/// How far a head is packed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Packed {
    /// Entries whose keys are packed: never fewer than `values`.
    pub keys: usize,
    /// Entries that are read from records.
    pub values: usize,
    /// Tiles whose values are packed: the last may go beyond `values`, never beyond `keys`.
    pub tiles: usize,
}

impl Head {
    fn new(records: &Shared) -> Self {
        let (table, packed) = (Table::new(records), Packed::default());
        Self { table, len: 0, packed, ring_from: 0, shift: 0 }
    }

    /// How far the head is packed once it has `len` entries.
    pub fn packed_at(&self, format: Format, len: usize) -> Packed {
        let Packed { keys, values, tiles } = self.packed;
        let ready = format.ready(len - keys, len - values);
        let (keys, values) = (keys + ready.0, values + ready.1);
        Packed { keys, values, tiles: tiles.max(values.div_ceil(TILE)) }
    }

    /// Records that the head takes for `more` entries.
    pub fn need(&self, format: Format, group: usize, more: usize) -> usize {
        self.packed_at(format, self.len + more).keys / group - self.table.numbers().len()
    }

    /// Entries that are read from the ring.
    pub fn residual(&self) -> usize {
        self.len - self.packed.values
    }

    /// What is left packed if the head is cut to `len` entries.
    ///
    /// With a rolling flush, groups go back to full precision as far as the ring still has them.
    pub fn cut(&self, format: Format, group: usize, len: usize) -> Cut {
        let Packed { mut keys, values, tiles } = self.packed;
        if let Flush::Rolling(residual) = format.flush() {
            let missing = (keys + residual).saturating_sub(len).next_multiple_of(group);
            let start = self.ring_from.max(keys.saturating_sub(group));
            keys -= missing.min(keys.saturating_sub(start) / group * group);
        }
        let mut unpacked = 0..0;
        if keys > len {
            keys = len - len % group;
            unpacked = keys..values.min(len);
        }
        let packed = Packed { keys, values: values.min(keys), tiles: tiles.min(keys / TILE) };
        Cut { packed, unpacked, ring_from: self.ring_from.min(keys) }
    }
}

/// What cutting a head does.
#[derive(Debug)]
pub struct Cut {
    pub packed: Packed,
    /// Entries that go from the record that is cut to the ring.
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
    residual + layout.group + format.overlap()
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
        8 * self.places * self.heads.len() + 4 * numbers + size_of::<Self>()
    }
}
