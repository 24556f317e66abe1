//! Writes sequences to a file.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::header::Layer;
use super::{FORMAT, TENSORS, VERSION, name};
use crate::pool::head::Head;
use crate::pool::memory::PoolMemory;
use crate::{Error, Pool, Result};
use safetensors::tensor::{Dtype, View};

/// Writes sequences, for example one of each layer's pool, to a safetensors file. An existing file
/// is replaced after everything is written.
///
/// # Errors
/// [`Error::UnknownSequence`]; [`Error::File`] if the file cannot be written.
pub fn save(path: impl AsRef<Path>, sequences: &[(&Pool, u64)]) -> Result<()> {
    let path = path.as_ref();
    let (tensors, metadata) = parts(sequences)?;
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|e| Error::file(path, e))
}

/// Returns the bytes that [`save`] writes.
///
/// # Errors
/// [`Error::UnknownSequence`].
pub fn to_bytes(sequences: &[(&Pool, u64)]) -> Result<Vec<u8>> {
    let (tensors, metadata) = parts(sequences)?;
    safetensors::serialize(tensors, Some(metadata)).map_err(|e| Error::file("", e))
}

/// Tensors with their names, and the metadata.
type Parts<'a> = (Vec<(String, Tensor<'a>)>, HashMap<String, String>);

fn parts<'a>(sequences: &[(&'a Pool, u64)]) -> Result<Parts<'a>> {
    let (mut layers, mut tensors, mut sums) = (Vec::new(), Vec::new(), BTreeMap::new());
    for (l, &(pool, seq)) in sequences.iter().enumerate() {
        let sequence = pool.sequence(seq)?;
        layers.push(Layer::of(pool, sequence));
        for (h, head) in sequence.heads.iter().enumerate() {
            for (tensor, words) in TENSORS {
                let tensor_name = name(l, h, tensor);
                let view = Tensor::new(head, &pool.memory, tensor, words);
                sums.insert(tensor_name.clone(), crc32fast::hash(&view.data()));
                tensors.push((tensor_name, view));
            }
        }
    }
    let json = serde_json::to_string(&(layers, sums)).map_err(|e| Error::file("", e))?;
    let metadata = HashMap::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("version".to_owned(), VERSION.to_owned()),
        ("check".to_owned(), crc32fast::hash(json.as_bytes()).to_string()),
        ("heads".to_owned(), json),
    ]);
    Ok((tensors, metadata))
}

/// A tensor of a head. Its bytes are collected from the blocks when they are written.
struct Tensor<'a> {
    head: &'a Head,
    memory: &'a PoolMemory,
    name: &'static str,
    dtype: Dtype,
    shape: [usize; 1],
}

impl<'a> Tensor<'a> {
    fn new(head: &'a Head, memory: &'a PoolMemory, name: &'static str, words: bool) -> Self {
        let (dtype, size) = if words { (Dtype::U32, 4) } else { (Dtype::F16, 2) };
        let mut bytes = 0;
        head.for_each_part(memory, name, |part| bytes += part.len());
        Self { head, memory, name, dtype, shape: [bytes / size] }
    }
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        self.head.for_each_part(self.memory, self.name, |part| bytes.extend_from_slice(part));
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape[0] * self.dtype.bitsize() / 8
    }
}

impl Head {
    /// Calls `f` with the bytes of a tensor, part by part.
    fn for_each_part(&self, memory: &PoolMemory, name: &str, mut f: impl FnMut(&[u8])) {
        let chunk = memory.layout.keys.capacity;
        let keys = (0..self.packed_keys.div_ceil(chunk)).map(|i| self.block(memory, i).keys());
        let values =
            (0..self.packed_values.div_ceil(chunk)).map(|i| self.block(memory, i).values());
        let columns = [memory.layout.keys.columns, memory.layout.values.columns];
        match name {
            "keys.codes" => keys.for_each(|part| f(bytemuck::cast_slice(part.codes))),
            "keys.scales" => keys.for_each(|part| f(bytemuck::cast_slice(part.scales))),
            "keys.zeros" => keys.for_each(|part| f(bytemuck::cast_slice(part.zero_points))),
            "keys.factors" => keys.for_each(|part| f(bytemuck::cast_slice(part.factors))),
            "values.codes" => values.for_each(|part| f(bytemuck::cast_slice(part.codes))),
            "values.scales" => values.for_each(|part| f(bytemuck::cast_slice(part.scales))),
            "values.zeros" => values.for_each(|part| f(bytemuck::cast_slice(part.zero_points))),
            "values.factors" => values.for_each(|part| f(bytemuck::cast_slice(part.factors))),
            "keys.new" => (self.packed_keys..self.slots()).for_each(|slot| {
                f(bytemuck::cast_slice(self.keys.row(&memory.key_pages, slot, columns[0])));
            }),
            "values.new" => (self.packed_values..self.slots()).for_each(|slot| {
                f(bytemuck::cast_slice(self.values.row(&memory.value_pages, slot, columns[1])));
            }),
            _ => f(bytemuck::cast_slice(&self.validity_bits())),
        }
    }
}
