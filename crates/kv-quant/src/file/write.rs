//! Heads to a file.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use super::header::Layer;
use super::{FORMAT, TENSORS, VERSION, name};
use crate::packed::Packed;
use crate::{Error, Head, Result};
use safetensors::tensor::{Dtype, View};

/// Writes lists of heads, one for each layer, to a safetensors file.
///
/// # Errors
/// [`Error::Mismatch`] for a list with heads of several formats; [`Error::File`] if the file can't be written.
pub fn save(path: impl AsRef<Path>, layers: &[&[Head]]) -> Result<()> {
    let path = path.as_ref();
    let failed = |e: &dyn std::fmt::Display| Error::file(path, e);
    let headers: Vec<_> = layers.iter().map(|heads| Layer::of(heads)).collect::<Result<_>>()?;
    let mut tensors = Vec::new();
    let mut sums = HashMap::new();
    for (l, heads) in layers.iter().enumerate() {
        for (h, head) in heads.iter().enumerate() {
            for (tensor, words) in TENSORS {
                let tensor_name = name(l, h, tensor);
                let view = Tensor::new(head, tensor, words);
                sums.insert(tensor_name.clone(), crc32fast::hash(&view.data()));
                tensors.push((tensor_name, view));
            }
        }
    }
    let json = serde_json::to_string(&(headers, sums)).map_err(|e| failed(&e))?;
    let metadata = HashMap::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("version".to_owned(), VERSION.to_owned()),
        ("check".to_owned(), crc32fast::hash(json.as_bytes()).to_string()),
        ("heads".to_owned(), json),
    ]);
    safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|e| failed(&e))
}

/// A tensor of a head; its bytes are joined from the chunks when they are written.
struct Tensor<'a> {
    head: &'a Head,
    name: &'static str,
    dtype: Dtype,
    shape: [usize; 1],
}

impl<'a> Tensor<'a> {
    fn new(head: &'a Head, name: &'static str, words: bool) -> Self {
        let (dtype, size) = if words { (Dtype::U32, 4) } else { (Dtype::F16, 2) };
        let mut bytes = 0;
        head.for_each_part(name, |part| bytes += part.len());
        Self { head, name, dtype, shape: [bytes / size] }
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
        self.head.for_each_part(self.name, |part| bytes.extend_from_slice(part));
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape[0] * self.dtype.bitsize() / 8
    }
}

impl Head {
    /// Hands the bytes of one of its tensors on, piece by piece.
    fn for_each_part(&self, name: &str, mut f: impl FnMut(&[u8])) {
        let mut chunks = |chunks: &[Packed], bytes: fn(&Packed) -> &[u8]| {
            chunks.iter().for_each(|chunk| f(bytes(chunk)));
        };
        match name {
            "keys.codes" => chunks(&self.keys, |c| bytemuck::cast_slice(&c.codes)),
            "keys.scales" => chunks(&self.keys, |c| bytemuck::cast_slice(&c.scales)),
            "keys.zeros" => chunks(&self.keys, |c| bytemuck::cast_slice(&c.zeros)),
            "values.codes" => chunks(&self.values, |c| bytemuck::cast_slice(&c.codes)),
            "values.scales" => chunks(&self.values, |c| bytemuck::cast_slice(&c.scales)),
            "values.zeros" => chunks(&self.values, |c| bytemuck::cast_slice(&c.zeros)),
            "keys.new" => self.new_keys.rows().for_each(|row| f(bytemuck::cast_slice(row))),
            "values.new" => self.new_values.rows().for_each(|row| f(bytemuck::cast_slice(row))),
            _ => f(bytemuck::cast_slice(self.live())),
        }
    }
}
