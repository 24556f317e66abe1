//! A file's heads, its codes left where they lie.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use super::header::{Counts, Layer};
use super::{FORMAT, VERSION, name};
use crate::array::Array;
use crate::{Axis, Error, Head, Packed, Result};
use bytemuck::Pod;
use bytes::Bytes;
use half::f16;
use safetensors::tensor::{Dtype, SafeTensors};

/// Maps a file that [`save`](super::save) has written and gives back its lists of heads.
///
/// The file must stay as it is while the heads live: they read from it. Appending to them copies no more than the chunk appended to.
///
/// # Errors
/// [`Error::File`] if the file can't be opened, is truncated or damaged, or is of another format or version.
pub fn load(path: impl AsRef<Path>) -> Result<Vec<Vec<Head>>> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|e| Error::file(path, e))?;
    // SAFETY: what the map shows may change only if the file is changed, which this function's documentation rules out.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::file(path, e))?;
    load_bytes(Bytes::from_owner(map)).map_err(|e| match e {
        Error::File { reason, .. } => Error::file(path, reason),
        other => Error::file(path, other),
    })
}

/// The same from the bytes of a file, which must lie at a multiple of 4 in memory.
///
/// # Errors
/// As [`load`], with an empty path.
pub fn load_bytes(bytes: Bytes) -> Result<Vec<Vec<Head>>> {
    let failed = |e: &dyn std::fmt::Display| Error::file("", e);
    let (header_len, header) = SafeTensors::read_metadata(&bytes).map_err(|e| failed(&e))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let entry = |key: &str| metadata.get(key).map(String::as_str).unwrap_or_default();
    if (entry("format"), entry("version")) != (FORMAT, VERSION) {
        let got = format!("format \"{}\", version \"{}\"", entry("format"), entry("version"));
        return Err(failed(&format!(
            "expected format \"{FORMAT}\", version \"{VERSION}\", got {got}"
        )));
    }
    if crc32fast::hash(entry("heads").as_bytes()).to_string() != entry("check") {
        return Err(failed(&"the description of its heads is damaged"));
    }
    let (layers, sums): (Vec<Option<Layer>>, HashMap<String, u32>) =
        serde_json::from_str(entry("heads")).map_err(|e| failed(&e))?;
    let mut tensors = HashMap::new();
    for (tensor, info) in header.tensors() {
        let (start, end) = info.data_offsets;
        let data = bytes.slice(8 + header_len + start..8 + header_len + end);
        if sums.get(&tensor) != Some(&crc32fast::hash(&data)) {
            return Err(failed(&format!("tensor {tensor} is damaged")));
        }
        tensors.insert(tensor, (info.dtype, data));
    }
    let source = Source { tensors };
    layers.iter().enumerate().map(|(l, layer)| source.layer(l, layer)).collect()
}

struct Source {
    tensors: HashMap<String, (Dtype, Bytes)>,
}

impl Source {
    fn layer(&self, l: usize, layer: &Option<Layer>) -> Result<Vec<Head>> {
        let Some(layer) = layer else { return Ok(Vec::new()) };
        let empty = layer.head()?;
        let heads = layer.heads.iter().enumerate();
        heads.map(|(h, counts)| self.head(l, h, *counts, empty.clone())).collect()
    }

    fn head(&self, l: usize, h: usize, counts: Counts, mut head: Head) -> Result<Head> {
        let (format, chunk, d) = (head.format(), head.format().chunk(), head.head_dim());
        let keys = Packed::new(chunk, d, format.keys(), Axis::Tokens)?;
        let values = Packed::new(chunk, d, format.values(), Axis::Channels)?;
        head.keys = self.chunks(&name(l, h, "keys"), counts.packed_keys, &keys)?;
        head.values = self.chunks(&name(l, h, "values"), counts.packed_values, &values)?;
        let new_keys = self.numbers(&name(l, h, "keys.new"))?;
        let new_values = self.numbers(&name(l, h, "values.new"))?;
        let live = bytemuck::pod_collect_to_vec(&self.tensor(&name(l, h, "live"), Dtype::U32)?);
        head.restore(counts, &new_keys, &new_values, live)
            .map_err(|e| Error::file("", format!("head {l}.{h}: {e}")))?;
        Ok(head)
    }

    /// The chunks of a matrix of so many rows, like an empty one.
    fn chunks(&self, matrix: &str, rows: usize, empty: &Packed) -> Result<Vec<Packed>> {
        let capacity = empty.capacity();
        let count = rows.div_ceil(capacity);
        let tensor = |t: &str, dtype, chunk_bytes| {
            let tensor = format!("{matrix}.{t}");
            let data = self.tensor(&tensor, dtype)?;
            if data.len() % chunk_bytes != 0 || data.len() / chunk_bytes != count {
                let expected = format!("{count} chunks of {chunk_bytes} bytes");
                let got = format!("expected {expected}, got {} bytes", data.len());
                return Err(Error::file("", format!("tensor {tensor}: {got}")));
            }
            Ok(data)
        };
        let (lines, params) = (size_of_val(&*empty.codes), size_of_val(&*empty.scales));
        let codes = tensor("codes", Dtype::U32, lines)?;
        let scales = tensor("scales", Dtype::F16, params)?;
        let zeros = tensor("zeros", Dtype::F16, params)?;
        self.numbers(&format!("{matrix}.scales"))?;
        self.numbers(&format!("{matrix}.zeros"))?;
        (0..count)
            .map(|i| {
                let part = |data: &Bytes, size| data.slice(i * size..(i + 1) * size);
                let mut chunk = Packed {
                    codes: values(part(&codes, lines))?,
                    scales: values(part(&scales, params))?,
                    zeros: values(part(&zeros, params))?,
                    ..empty.clone()
                };
                chunk.rows = capacity.min(rows - i * capacity);
                if chunk.rows < capacity {
                    // What is appended later must find zeros.
                    chunk.truncate(chunk.rows);
                }
                Ok(chunk)
            })
            .collect()
    }

    /// A tensor of finite halves.
    fn numbers(&self, name: &str) -> Result<Vec<f16>> {
        let numbers: Vec<f16> = bytemuck::pod_collect_to_vec(&self.tensor(name, Dtype::F16)?);
        match numbers.iter().find(|x| !x.is_finite()) {
            Some(bad) => Err(Error::file("", format!("tensor {name} holds {bad}"))),
            None => Ok(numbers),
        }
    }

    fn tensor(&self, name: &str, expected: Dtype) -> Result<Bytes> {
        match self.tensors.get(name) {
            Some((dtype, data)) if *dtype == expected => Ok(data.clone()),
            Some((dtype, _)) => {
                Err(Error::file("", format!("tensor {name}: expected {expected:?}, got {dtype:?}")))
            }
            None => Err(Error::file("", format!("tensor {name} is missing"))),
        }
    }
}

fn values<T: Pod>(bytes: Bytes) -> Result<Array<T>> {
    Array::shared(bytes).ok_or_else(|| Error::file("", "its tensors are not aligned"))
}
