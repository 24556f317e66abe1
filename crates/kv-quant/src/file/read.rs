//! Loads a file's sequences into pools.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use super::header::{Counts, Layer};
use super::{FORMAT, PLAIN, VERSION, name};
use crate::hadamard::hadamard;
use crate::layout::Layout;
use crate::pool::Sequence;
use crate::pool::head::Head;
use crate::pool::memory::{BlockDelta, PAGE, PoolMemory};
use crate::{Axis, Error, Flush, Pool, Result};
use half::f16;
use safetensors::tensor::{Dtype, SafeTensors};

/// A file of sequences. Its checksums have been verified.
pub struct CacheFile {
    bytes: Vec<u8>,
    layers: Vec<Option<Layer>>,
    /// Dtype and byte range of each tensor.
    tensors: HashMap<String, (Dtype, Range<usize>)>,
}

/// The parts of one head, checked.
struct Parts<'a> {
    counts: Counts,
    keys: Matrix<'a>,
    values: Matrix<'a>,
    new_keys: Vec<f16>,
    new_values: Vec<f16>,
    validity: Vec<u32>,
}

/// The bytes of a packed matrix.
struct Matrix<'a> {
    codes: &'a [u8],
    scales: &'a [u8],
    zero_points: &'a [u8],
    factors: &'a [u8],
}

impl Pool {
    /// Creates a sequence from the `layer`-th sequence of a file. It continues like the saved one,
    /// except that the newest packed group is no longer kept in full precision as well.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the sequence exists, the file has no such layer, or its pool had
    /// other settings; [`Error::File`] if the layer's tensors are inconsistent;
    /// [`Error::PoolFull`]. On an error nothing has changed.
    pub fn load(&mut self, seq: u64, file: &CacheFile, layer: usize) -> Result<()> {
        self.check_unseen(seq)?;
        let like = file.pool(layer)?;
        if (like.shape, like.format, &like.rotary) != (self.shape, self.format, &self.rotary) {
            let of = |pool: &Pool| {
                let rotary = pool.rotary.as_ref().map(|r| (r.frequencies().len(), r.first()));
                format!("{:?}, {:?}, {rotary:?}", pool.shape, pool.format)
            };
            return Err(Error::mismatch("pool of the saved sequence", of(self), of(&like)));
        }
        let counts = file.layer(layer)?.heads.iter().enumerate();
        let parts: Vec<_> = counts
            .map(|(h, &counts)| file.parts(self, (layer, h), counts))
            .collect::<Result<_>>()?;
        let mut need = BlockDelta::default();
        parts.iter().for_each(|parts| need += parts.need(&self.memory));
        self.check_room(self.memory.bytes(need).max(0) as usize)?;
        let heads = parts.into_iter().map(|parts| parts.head(&mut self.memory)).collect();
        self.seqs.insert(seq, Sequence { heads });
        Ok(())
    }
}

impl fmt::Debug for CacheFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheFile").field("layers", &self.layers).finish_non_exhaustive()
    }
}

impl CacheFile {
    /// Reads a file written by [`save`](super::save) into memory.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read, is truncated or damaged, or has another format or
    /// version.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
        Self::from_bytes(bytes).map_err(|e| match e {
            Error::File { reason, .. } => Error::file(path, reason),
            other => Error::file(path, other),
        })
    }

    /// Reads a file from its bytes.
    ///
    /// # Errors
    /// As [`open`](Self::open), with an empty path.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        let failed = |e: &dyn fmt::Display| Error::file("", e);
        let (header_len, header) = SafeTensors::read_metadata(&bytes).map_err(|e| failed(&e))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let entry = |key: &str| metadata.get(key).map(String::as_str).unwrap_or_default();
        if entry("format") != FORMAT || ![VERSION, PLAIN].contains(&entry("version")) {
            let got = format!("format \"{}\", version \"{}\"", entry("format"), entry("version"));
            return Err(failed(&format!(
                "expected format \"{FORMAT}\", version \"{VERSION}\" or \"{PLAIN}\", got {got}"
            )));
        }
        if crc32fast::hash(entry("heads").as_bytes()).to_string() != entry("check") {
            return Err(failed(&"the description of its heads is damaged"));
        }
        let (layers, sums): (_, HashMap<String, u32>) =
            serde_json::from_str(entry("heads")).map_err(|e| failed(&e))?;
        let mut tensors = HashMap::new();
        for (tensor, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            let place = 8 + header_len + start..8 + header_len + end;
            if sums.get(&tensor) != Some(&crc32fast::hash(&bytes[place.clone()])) {
                return Err(failed(&format!("tensor {tensor} is damaged")));
            }
            tensors.insert(tensor, (info.dtype, place));
        }
        if tensors.len() != sums.len() {
            let (expected, got) = (sums.len(), tensors.len());
            return Err(failed(&format!("expected {expected} tensors, got {got}")));
        }
        Ok(Self { bytes, layers, tensors })
    }

    /// Returns the number of sequences in the file.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Returns whether the file contains no sequence.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Returns whether the `layer`-th sequence has heads: files of earlier releases have lists
    /// without heads.
    #[cfg(feature = "candle")]
    pub(crate) fn has(&self, layer: usize) -> bool {
        self.layers.get(layer).is_some_and(Option::is_some)
    }

    /// Creates an empty pool with the settings of the pool that held the `layer`-th sequence.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is no such sequence; [`Error::File`] for one without heads, or
    /// with a description that no pool supports.
    pub fn pool(&self, layer: usize) -> Result<Pool> {
        self.layer(layer)?.pool().map_err(|e| Error::file("", format!("layer {layer}: {e}")))
    }

    fn layer(&self, layer: usize) -> Result<&Layer> {
        match self.layers.get(layer) {
            Some(Some(layer)) => Ok(layer),
            Some(None) => Err(Error::file("", format!("layer {layer} has no heads"))),
            None => {
                Err(Error::mismatch("layer of the file", format!("below {}", self.len()), layer))
            }
        }
    }

    /// Returns the parts of a head, checked against each other and the pool.
    fn parts(&self, pool: &Pool, (l, h): (usize, usize), counts: Counts) -> Result<Parts<'_>> {
        let layout = pool.memory.layout;
        let numbers = |tensor: &str| self.numbers(&name(l, h, tensor));
        let mut parts = Parts {
            counts,
            keys: self.matrix(&name(l, h, "keys"), counts.packed_keys, &layout.keys)?,
            values: self.matrix(&name(l, h, "values"), counts.packed_values, &layout.values)?,
            new_keys: numbers("keys.new")?,
            new_values: numbers("values.new")?,
            validity: bytemuck::pod_collect_to_vec(self.tensor(&name(l, h, "live"), Dtype::U32)?),
        };
        if self.layer(l)?.has_rotated_tail() {
            parts.rotate_tail_back(pool);
        }
        parts.check(pool).map_err(|e| Error::file("", format!("head {l}.{h}: {e}")))?;
        Ok(parts)
    }

    /// Returns the blocks' parts of a matrix of `rows` rows.
    fn matrix(&self, matrix: &str, rows: usize, layout: &Layout) -> Result<Matrix<'_>> {
        let count = rows.div_ceil(layout.capacity);
        let tensor = |t: &str, dtype, block_bytes: usize| {
            let tensor = format!("{matrix}.{t}");
            // Version 1 has no factors.
            if block_bytes == 0 && !self.tensors.contains_key(&tensor) {
                return Ok(&[][..]);
            }
            let data = self.tensor(&tensor, dtype)?;
            if data.len() != count * block_bytes {
                let expected = format!("{count} blocks of {block_bytes} bytes");
                let got = format!("expected {expected}, got {} bytes", data.len());
                return Err(Error::file("", format!("tensor {tensor}: {got}")));
            }
            if dtype == Dtype::F16 {
                self.numbers(&tensor)?;
            }
            Ok(data)
        };
        let halves = |t, count: usize| tensor(t, Dtype::F16, count * size_of::<f16>());
        Ok(Matrix {
            codes: tensor("codes", Dtype::U32, layout.lines() * 64)?,
            scales: halves("scales", layout.scales())?,
            zero_points: halves("zeros", layout.zero_points())?,
            factors: halves("factors", layout.factors())?,
        })
    }

    /// Returns a tensor of finite f16 numbers.
    fn numbers(&self, name: &str) -> Result<Vec<f16>> {
        let numbers: Vec<f16> = bytemuck::pod_collect_to_vec(self.tensor(name, Dtype::F16)?);
        match numbers.iter().find(|x| !x.is_finite()) {
            Some(bad) => Err(Error::file("", format!("tensor {name} holds {bad}"))),
            None => Ok(numbers),
        }
    }

    fn tensor(&self, name: &str, expected: Dtype) -> Result<&[u8]> {
        match self.tensors.get(name) {
            Some((dtype, place)) if *dtype == expected => Ok(&self.bytes[place.clone()]),
            Some((dtype, _)) => {
                Err(Error::file("", format!("tensor {name}: expected {expected:?}, got {dtype:?}")))
            }
            None => Err(Error::file("", format!("tensor {name} is missing"))),
        }
    }
}

impl Parts<'_> {
    /// Rotates the newest keys of a file of version 1 back to their original basis.
    fn rotate_tail_back(&mut self, pool: &Pool) {
        let mut rows: Vec<f32> = self.new_keys.iter().map(|x| x.to_f32()).collect();
        hadamard(&mut rows, pool.shape.head_dim);
        let largest = pool.largest();
        let half = |&x: &f32| f16::from_f32(x).clamp(-largest, largest);
        self.new_keys = rows.iter().map(half).collect();
    }

    /// Checks that tensors and counts are consistent.
    fn check(&self, pool: &Pool) -> Result<()> {
        let Counts { len, packed_keys, packed_values } = self.counts;
        let (head_dim, value_dim) = (pool.shape.head_dim, pool.shape.value_dim);
        let (new_keys, new_values) = (self.new_keys.len(), self.new_values.len());
        if !new_keys.is_multiple_of(head_dim) || !new_values.is_multiple_of(value_dim) {
            let expected = format!("whole rows of {head_dim} and {value_dim}");
            let got = format!("{new_keys} and {new_values}");
            return Err(Error::mismatch("numbers of the newest tokens", expected, got));
        }
        let keys = packed_keys.checked_add(new_keys / head_dim);
        let values = packed_values.checked_add(new_values / value_dim);
        if keys.is_none() || keys != values {
            return Err(Error::mismatch("values", format!("{keys:?}"), format!("{values:?}")));
        }
        let staggered = matches!(pool.format.flush(), Flush::Staggered(_));
        let chunk = pool.format.block_tokens();
        let along_tokens = pool.format.keys().axis == Axis::Tokens;
        if packed_values > packed_keys
            || packed_values < packed_keys && !staggered
            || along_tokens && !packed_keys.is_multiple_of(chunk)
        {
            let expected = format!("whole groups of {chunk}, and no more values than keys");
            let got = format!("{packed_keys} keys and {packed_values} values");
            return Err(Error::mismatch("packed tokens", expected, got));
        }
        let largest = pool.largest();
        let exceeds = |x| crate::number::first_out_of_range(x, largest).is_some();
        if exceeds(&self.new_keys) || exceeds(&self.new_values) {
            let expected = format!("numbers within ±{largest}");
            return Err(Error::mismatch("newest tokens", expected, "others"));
        }
        let (last, bits) = (self.validity.last().copied().unwrap_or(0), packed_keys % 32);
        if self.validity.len() != packed_keys.div_ceil(32) || bits > 0 && last >> bits != 0 {
            let got = format!("{} words", self.validity.len());
            return Err(Error::mismatch("bits of packed entries", packed_keys, got));
        }
        let packed: usize = self.validity.iter().map(|word| word.count_ones() as usize).sum();
        let held = packed + new_keys / head_dim;
        if len != held || pool.rotary.is_some() && packed != packed_keys {
            return Err(Error::mismatch("entries held", len, held));
        }
        Ok(())
    }

    fn blocks(&self, memory: &PoolMemory) -> usize {
        self.counts.packed_keys.div_ceil(memory.layout.keys.capacity)
    }

    fn need(&self, memory: &PoolMemory) -> BlockDelta {
        let Counts { packed_keys, packed_values, .. } = self.counts;
        let pages = |packed: usize, numbers: usize, columns: usize| {
            let rows = numbers / columns;
            ((packed % PAGE + rows).div_ceil(PAGE) * usize::from(rows > 0)) as isize
        };
        BlockDelta {
            blocks: self.blocks(memory) as isize,
            key_pages: pages(packed_keys, self.new_keys.len(), memory.layout.keys.columns),
            value_pages: pages(packed_values, self.new_values.len(), memory.layout.values.columns),
        }
    }

    /// Copies everything into a pool's memory.
    fn head(self, memory: &mut PoolMemory) -> Head {
        let Counts { len, packed_keys, packed_values } = self.counts;
        let mut head = Head { packed_keys, packed_values, len, ..Head::default() };
        for i in 0..self.blocks(memory) {
            let block = memory.blocks.alloc();
            head.blocks.push(block);
            let (keys, values) = memory.layout.parts_mut(memory.blocks.get_mut(block), 0, 0);
            for (matrix, part) in [(&self.keys, keys), (&self.values, values)] {
                copy(matrix.codes, i, bytemuck::cast_slice_mut(part.codes));
                copy(matrix.scales, i, bytemuck::cast_slice_mut(part.scales));
                copy(matrix.zero_points, i, bytemuck::cast_slice_mut(part.zero_points));
                copy(matrix.factors, i, bytemuck::cast_slice_mut(part.factors));
            }
        }
        let PoolMemory { layout, key_pages, value_pages, .. } = memory;
        head.keys.replace(key_pages, packed_keys, &self.new_keys, layout.keys.columns);
        head.values.replace(value_pages, packed_values, &self.new_values, layout.values.columns);
        head.validity = self.validity;
        head.drop_full_mask();
        head
    }
}

/// Copies the `i`-th part of `from` to `to`, if there is one. Parts have the length of `to`.
fn copy(from: &[u8], i: usize, to: &mut [u8]) {
    if let Some(part) = from.get(i * to.len()..(i + 1) * to.len()) {
        to.copy_from_slice(part);
    }
}
