//! One kv head's keys and values: packed chunks, and the newest tokens in full precision.

use std::ops::Range;
use std::sync::Arc;

use crate::hadamard::hadamard;
use crate::number::{Number, to_f16};
use crate::quantize::Quantizer;
use crate::residual::Residual;
use crate::rotary::Rotary;
use crate::words::Scratch;
use crate::{Axis, Error, Flush, Format, KeyBasis, Packed, Result};
use half::f16;

/// One kv head's keys and values.
///
/// Tokens come in at the end, in full precision; the format's flush moves them into packed chunks of a few dozen tokens, so that growing
/// never moves what is there. Entries that are dropped leave holes, which the attention skips; a chunk of holes is freed.
#[derive(Debug, Clone)]
pub struct Head {
    format: Format,
    head_dim: usize,
    rotary: Option<Arc<Rotary>>,
    pub(crate) keys: Vec<Packed>,
    pub(crate) values: Vec<Packed>,
    /// Keys packed, holes included; the rest is in `new_keys`.
    packed_keys: usize,
    packed_values: usize,
    pub(crate) new_keys: Residual,
    pub(crate) new_values: Residual,
    /// A bit for each packed key, set while it is held.
    live: Vec<u32>,
    len: usize,
}

/// Tokens on their way into a head: keys, in the format's basis, and values, `[tokens, head_dim]`.
#[derive(Debug)]
pub(crate) struct Tokens {
    keys: Vec<f16>,
    values: Vec<f16>,
}

/// Bytes that a [`Head`] holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeadBytes {
    /// Packed codes, holes included.
    pub codes: usize,
    /// Scales and zeros.
    pub scales: usize,
    /// The newest tokens, in f16.
    pub residual: usize,
    /// The bits that say which packed entries are held.
    pub live: usize,
    /// Allocated for tokens to come.
    pub slack: usize,
}

impl Head {
    /// An empty head of `head_dim` channels.
    ///
    /// # Errors
    /// [`Error::Setting`] if `head_dim` is zero, or the format has keys [before RoPE](KeyBasis::BeforeRope).
    pub fn new(head_dim: usize, format: Format) -> Result<Self> {
        if format.basis() == KeyBasis::BeforeRope {
            let expected = "a rotary embedding for keys before RoPE (`Head::before_rope`)";
            return Err(Error::setting("rotary embedding", expected, "none"));
        }
        Self::make(head_dim, format, None)
    }

    /// An empty head whose keys come as they are before the rotary embedding, and are rotated while they are scored. Queries come rotated. Nothing
    /// can be dropped from such a head, since a key's position is its number.
    ///
    /// # Errors
    /// [`Error::Setting`] if `head_dim` is zero or less than the embedding rotates.
    pub fn before_rope(head_dim: usize, format: Format, rotary: Arc<Rotary>) -> Result<Self> {
        let rotary_dims = 2 * rotary.frequencies().len();
        if rotary_dims > head_dim {
            let expected = format!("at most head_dim = {head_dim}");
            return Err(Error::setting("rotated channels", expected, rotary_dims));
        }
        Self::make(head_dim, format.with_basis(KeyBasis::BeforeRope), Some(rotary))
    }

    fn make(head_dim: usize, format: Format, rotary: Option<Arc<Rotary>>) -> Result<Self> {
        if head_dim == 0 {
            return Err(Error::setting("head_dim", "at least 1", head_dim));
        }
        Ok(Self {
            format,
            head_dim,
            rotary,
            keys: Vec::new(),
            values: Vec::new(),
            packed_keys: 0,
            packed_values: 0,
            new_keys: Residual::new(head_dim),
            new_values: Residual::new(head_dim),
            live: Vec::new(),
            len: 0,
        })
    }

    /// Appends tokens: keys and values `[tokens, head_dim]`, and packs what the format says is ready.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the slices are no whole rows or differ in length; [`Error::NotFinite`] and, beyond ±32752 (±65504 if
    /// nothing is packed), [`Error::OutOfRange`] with the position. On these nothing is appended.
    pub fn append<T: Number>(&mut self, keys: &[T], values: &[T]) -> Result<()> {
        self.take(&self.check(keys, values)?)
    }

    /// Tokens as they are packed, if they can be.
    pub(crate) fn check<T: Number>(&self, keys: &[T], values: &[T]) -> Result<Tokens> {
        let d = self.head_dim;
        if !keys.len().is_multiple_of(d) {
            let expected = format!("whole rows of {d} numbers");
            return Err(Error::mismatch("keys", expected, format!("{} numbers", keys.len())));
        }
        if values.len() != keys.len() {
            return Err(Error::mismatch("values", format!("{} numbers", keys.len()), values.len()));
        }
        let largest = self.largest();
        let mut tokens =
            Tokens { keys: to_f16(keys, d, largest)?, values: to_f16(values, d, largest)? };
        if self.format.basis() == KeyBasis::Hadamard {
            let mut rows: Vec<f32> = keys.iter().map(|x| x.widen()).collect();
            hadamard(&mut rows, d);
            tokens.keys = to_f16(&rows, d, largest)?;
        }
        Ok(tokens)
    }

    /// The largest number taken in. Half of f16's range, so that no group's range can be beyond it, whatever tokens come to share a group.
    fn largest(&self) -> f16 {
        match self.format.flush() {
            Flush::Never => f16::MAX,
            _ => f16::from_bits(f16::MAX.to_bits() - 0x400),
        }
    }

    /// Appends what [`check`](Self::check) has found fit for this head.
    pub(crate) fn take(&mut self, tokens: &Tokens) -> Result<()> {
        self.new_keys.push(&tokens.keys);
        self.new_values.push(&tokens.values);
        self.len += tokens.keys.len() / self.head_dim;
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        let (keys, values) = self.format.ready(self.new_keys.len(), self.new_values.len());
        let (chunk, d) = (self.format.chunk(), self.head_dim);
        let quantizer = &mut Quantizer::default();
        if keys > 0 {
            let room = || Packed::new(chunk, d, self.format.keys(), Axis::Tokens);
            pack(&mut self.keys, &self.new_keys, keys, d, room, quantizer)?;
            self.new_keys.drop_oldest(keys);
            self.live.resize((self.packed_keys + keys).div_ceil(32), 0);
            (self.packed_keys..self.packed_keys + keys)
                .for_each(|slot| self.live[slot / 32] |= 1 << (slot % 32));
            self.packed_keys += keys;
        }
        if values > 0 {
            let room = || Packed::new(chunk, d, self.format.values(), Axis::Channels);
            pack(&mut self.values, &self.new_values, values, d, room, quantizer)?;
            self.new_values.drop_oldest(values);
            self.packed_values += values;
        }
        Ok(())
    }

    /// Keeps the entries named and frees the others. Survivors close ranks: they are renumbered from 0 in order. Nothing is quantized anew.
    ///
    /// A packed chunk is freed once all its entries are gone. Keys that are quantized along channels, one by one, also move together
    /// with their values once half of what is packed is holes: each move is paid for by a dropped entry. Keys quantized along tokens
    /// share their scales with their chunk and can't leave it: there, drop runs of entries to get memory back.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless `keep` is strictly increasing and below [`len`](Self::len); if it is not everything, for keys
    /// [before RoPE](KeyBasis::BeforeRope).
    pub fn retain(&mut self, keep: &[u32]) -> Result<()> {
        if let Some(pair) = keep.windows(2).find(|pair| pair[0] >= pair[1]) {
            let got = format!("{} before {}", pair[0], pair[1]);
            return Err(Error::mismatch("entries to keep", "strictly increasing ones", got));
        }
        if let Some(&last) = keep.last().filter(|&&last| last as usize >= self.len) {
            let expected = format!("entries below {}", self.len);
            return Err(Error::mismatch("entries to keep", expected, last));
        }
        if self.rotary.is_some() && keep.len() < self.len {
            let expected = format!("all {}, for keys packed before RoPE", self.len);
            return Err(Error::mismatch("entries to keep", expected, keep.len()));
        }
        let slots: Vec<usize> = self.slots(keep.iter().map(|&entry| entry as usize)).collect();
        self.live.fill(0);
        let packed = slots.partition_point(|&slot| slot < self.packed_keys);
        slots[..packed].iter().for_each(|slot| self.live[slot / 32] |= 1 << (slot % 32));
        self.retain_new(&slots[packed..]);
        self.free_chunks();
        self.len = keep.len();
        self.close_ranks()
    }

    /// Values whose keys are packed already stay in the queue until they are packed too.
    fn retain_new(&mut self, slots: &[usize]) {
        let keys: Vec<_> = slots.iter().map(|slot| slot - self.packed_keys).collect();
        self.new_keys.retain(&keys);
        let waiting = self.packed_keys.saturating_sub(self.packed_values);
        let kept = slots.iter().map(|slot| slot - self.packed_values);
        let values: Vec<_> = (0..waiting).chain(kept).collect();
        self.new_values.retain(&values);
    }

    fn free_chunks(&mut self) {
        let chunk = self.format.chunk();
        let words = chunk / 32;
        let whole = self.packed_keys.min(self.packed_values) / chunk;
        for i in (0..whole).rev() {
            let bits = i * words..(i + 1) * words;
            if self.live[bits.clone()].iter().all(|&word| word == 0) {
                self.live.drain(bits);
                self.keys.remove(i);
                self.values.remove(i);
                self.packed_keys -= chunk;
                self.packed_values -= chunk;
            }
        }
    }

    /// Moves entries whose keys and values are packed one by one together, if half of their places are holes.
    fn close_ranks(&mut self) -> Result<()> {
        let whole = self.packed_keys.min(self.packed_values);
        let held: Vec<_> = (0..whole).filter(|&slot| self.is_live(slot)).collect();
        if self.format.keys().along == Axis::Tokens || whole == 0 || 2 * held.len() > whole {
            return Ok(());
        }
        let rest: Vec<_> = (whole..self.packed_keys).map(|slot| self.is_live(slot)).collect();
        self.keys = gather(&self.keys, held.iter().copied().chain(whole..self.packed_keys))?;
        self.values = gather(&self.values, held.iter().copied().chain(whole..self.packed_values))?;
        self.packed_keys -= whole - held.len();
        self.packed_values -= whole - held.len();
        self.live = vec![0; self.packed_keys.div_ceil(32)];
        let rest = rest.iter().enumerate().filter(|(_, live)| **live).map(|(i, _)| held.len() + i);
        (0..held.len()).chain(rest).for_each(|slot| self.live[slot / 32] |= 1 << (slot % 32));
        Ok(())
    }

    /// The keys and values held, dequantized: `[len, head_dim]` each. Keys are as queries meet them: rotated, if they came before RoPE.
    pub fn read(&self) -> (Vec<f32>, Vec<f32>) {
        let d = self.head_dim;
        let (mut keys, mut values) = (vec![0.0; self.len * d], vec![0.0; self.len * d]);
        let codes = &mut Vec::new();
        let rows = keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d));
        for (slot, (key, value)) in self.slots(0..self.len).zip(rows) {
            read_row(&self.keys, &self.new_keys, self.packed_keys, slot, codes, key);
            read_row(&self.values, &self.new_values, self.packed_values, slot, codes, value);
            if let Some(rotary) = &self.rotary {
                rotary.place(key, slot);
            }
        }
        if self.format.basis() == KeyBasis::Hadamard {
            hadamard(&mut keys, d);
        }
        (keys, values)
    }

    /// Where entries (increasing) lie, holes counted.
    pub(crate) fn slots(
        &self,
        entries: impl Iterator<Item = usize>,
    ) -> impl Iterator<Item = usize> {
        let mut word = 0;
        let mut before = 0; // entries held in the words before
        entries.map(move |entry| {
            while word < self.live.len() && before + self.live[word].count_ones() as usize <= entry
            {
                before += self.live[word].count_ones() as usize;
                word += 1;
            }
            match self.live.get(word) {
                Some(&bits) => 32 * word + nth_one(bits, entry - before),
                None => self.packed_keys + entry - before,
            }
        })
    }

    /// The slots of a range of entries: from its first entry's to just after its last's.
    pub(crate) fn slot_range(&self, entries: &Range<usize>) -> Range<usize> {
        if entries.is_empty() {
            return 0..0;
        }
        if self.len == self.slot_count() {
            return entries.clone();
        }
        let mut ends = self.slots([entries.start, entries.end - 1].into_iter());
        let first = ends.next().unwrap_or(0);
        first..ends.next().unwrap_or(first) + 1
    }

    /// What a file says of its tokens.
    #[cfg(feature = "save")]
    pub(crate) fn counts(&self) -> crate::file::Counts {
        let Self { len, packed_keys, packed_values, .. } = *self;
        crate::file::Counts { len, packed_keys, packed_values }
    }

    /// The bits that say which packed entries are held.
    #[cfg(feature = "save")]
    pub(crate) fn live(&self) -> &[u32] {
        &self.live
    }

    /// Takes in what a file holds beside the packed chunks.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the parts do not fit together.
    #[cfg(feature = "save")]
    pub(crate) fn restore(
        &mut self,
        counts: crate::file::Counts,
        new_keys: &[f16],
        new_values: &[f16],
        live: Vec<u32>,
    ) -> Result<()> {
        let d = self.head_dim;
        if !new_keys.len().is_multiple_of(d) || !new_values.len().is_multiple_of(d) {
            let expected = format!("whole rows of {d}");
            let got = format!("{} and {}", new_keys.len(), new_values.len());
            return Err(Error::mismatch("numbers of the newest tokens", expected, got));
        }
        let keys = counts.packed_keys + new_keys.len() / d;
        let values = counts.packed_values + new_values.len() / d;
        if keys != values {
            return Err(Error::mismatch("values", keys, values));
        }
        let largest = self.largest();
        let beyond = |x| crate::number::beyond(x, largest).is_some();
        if beyond(new_keys) || beyond(new_values) {
            let expected = format!("numbers within ±{largest}");
            return Err(Error::mismatch("newest tokens", expected, "others"));
        }
        let (last, bits) = (live.last().copied().unwrap_or(0), counts.packed_keys % 32);
        if live.len() != counts.packed_keys.div_ceil(32) || bits > 0 && last >> bits != 0 {
            let got = format!("{} words", live.len());
            return Err(Error::mismatch("bits of packed entries", counts.packed_keys, got));
        }
        let packed: usize = live.iter().map(|word| word.count_ones() as usize).sum();
        let len = packed + new_keys.len() / d;
        if counts.len != len || self.rotary.is_some() && packed != counts.packed_keys {
            return Err(Error::mismatch("entries held", counts.len, len));
        }
        self.new_keys.push(new_keys);
        self.new_values.push(new_values);
        (self.packed_keys, self.packed_values) = (counts.packed_keys, counts.packed_values);
        (self.live, self.len) = (live, len);
        Ok(())
    }

    /// Entries and holes.
    pub(crate) fn slot_count(&self) -> usize {
        self.packed_keys + self.new_keys.len()
    }

    /// Whether a slot holds an entry.
    pub(crate) fn is_live(&self, slot: usize) -> bool {
        slot >= self.packed_keys || self.live[slot / 32] >> (slot % 32) & 1 == 1
    }

    pub(crate) fn packed_keys(&self) -> usize {
        self.packed_keys
    }

    pub(crate) fn packed_values(&self) -> usize {
        self.packed_values
    }

    /// Entries held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Channels.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The rotary embedding of keys that came before it.
    pub fn rotary(&self) -> Option<&Arc<Rotary>> {
        self.rotary.as_ref()
    }

    /// How it is held.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes held.
    pub fn bytes(&self) -> HeadBytes {
        let mut bytes = HeadBytes { live: size_of_val(&*self.live), ..Default::default() };
        for packed in self.keys.iter().chain(&self.values) {
            let (codes, scales) = packed.bytes();
            // A chunk that is being filled counts by its rows.
            let used = |bytes: usize| bytes * packed.rows() / packed.capacity();
            bytes.codes += used(codes);
            bytes.scales += used(scales);
            bytes.slack += codes - used(codes) + scales - used(scales);
        }
        for new in [&self.new_keys, &self.new_values] {
            let (held, room) = new.bytes();
            bytes.residual += held;
            bytes.slack += room;
        }
        bytes
    }
}

/// Packs the oldest `count` rows into the chunks, the last of which may have room.
fn pack(
    chunks: &mut Vec<Packed>,
    new: &Residual,
    count: usize,
    columns: usize,
    room: impl Fn() -> Result<Packed>,
    quantizer: &mut Quantizer,
) -> Result<()> {
    let rows = new.oldest(count);
    let mut rows = rows.as_slice();
    while !rows.is_empty() {
        match chunks.last_mut() {
            Some(last) if last.rows() < last.capacity() => {
                let free = (last.capacity() - last.rows()) * columns;
                let (now, later) = rows.split_at(rows.len().min(free));
                last.push_f16(now, quantizer)?;
                rows = later;
            }
            _ => chunks.push(room()?),
        }
    }
    Ok(())
}

/// New chunks of the rows in the given slots.
fn gather(chunks: &[Packed], slots: impl Iterator<Item = usize>) -> Result<Vec<Packed>> {
    let mut gathered: Vec<Packed> = Vec::new();
    let (codes, scratch) = (&mut Vec::new(), &mut Scratch::default());
    for slot in slots {
        let size = chunks[0].capacity();
        let from = &chunks[slot / size];
        if gathered.last().is_none_or(|last| last.rows() == size) {
            gathered.push(Packed::new(size, from.columns(), from.scheme(), from.lanes)?);
        }
        if let Some(last) = gathered.last_mut() {
            last.push_packed(from, slot % size, codes, scratch);
        }
    }
    Ok(gathered)
}

fn read_row(
    chunks: &[Packed],
    new: &Residual,
    packed: usize,
    slot: usize,
    codes: &mut Vec<u8>,
    out: &mut [f32],
) {
    match slot.checked_sub(packed) {
        Some(i) => new.widen(i, out),
        None => {
            let chunk = chunks[0].capacity();
            chunks[slot / chunk].dequantize_row(slot % chunk, codes, out);
        }
    }
}

/// The position of the `n`-th set bit, counted from 0.
fn nth_one(mut bits: u32, n: usize) -> usize {
    for _ in 0..n {
        bits &= bits - 1;
    }
    bits.trailing_zeros() as usize
}
