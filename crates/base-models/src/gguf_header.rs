//! The header of a GGUF file: metadata by key, and the locations of tensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use crate::ggml_types::tensor_type;
use candle_core::quantized::GgmlDType;
use longctx_core::{Error, Result};

const MAGIC: u32 = u32::from_le_bytes(*b"GGUF");
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_DIMS: u32 = 4;
/// Arrays of arrays occur in no known file. Deeper nesting is refused.
const MAX_DEPTH: usize = 2;

/// A metadata value. Integers of all widths share a variant, and so do floats.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    /// An array of arrays. Its contents are not kept.
    Nested,
}

/// The location of a tensor.
#[derive(Debug)]
pub(crate) struct TensorInfo {
    pub dtype: GgmlDType,
    /// Outermost dimension first, unlike in the file.
    pub dims: Vec<usize>,
    /// Index of the file among the parts.
    pub part: usize,
    /// Offset of the first byte in that file.
    pub start: u64,
    pub bytes: usize,
}

/// Metadata by key, and tensors in the order of the file.
pub(crate) type Contents = (BTreeMap<String, Value>, Vec<(String, TensorInfo)>);

/// Reads the header of a file. Allocations are bounded by a multiple of the file's size.
///
/// # Errors
/// [`Error::File`] if the header is damaged or truncated; [`Error::Unsupported`] with the first
/// tensor of an unsupported type.
pub(crate) fn read(path: &Path, file: &File) -> Result<Contents> {
    let size = file.metadata().map_err(|e| Error::file(path, e))?.len();
    Header { path, reader: BufReader::new(file), at: 0, size, short_lengths: false }.read()
}

struct Header<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    at: u64,
    size: u64,
    /// Whether lengths have 32 bits (version 1).
    short_lengths: bool,
}

impl Header<'_> {
    fn read(&mut self) -> Result<Contents> {
        if self.u32()? != MAGIC {
            return Err(self.error("this is no GGUF file"));
        }
        match self.u32()? {
            1 => self.short_lengths = true,
            2 | 3 => {}
            version if version.swap_bytes() <= 3 => {
                return Err(self.error("the file is big-endian, which is not supported"));
            }
            version => return Err(self.error(format!("version {version} of GGUF (known: 1 to 3)"))),
        }
        let (tensor_count, key_count) = (self.length()?, self.length()?);
        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = self.string()?;
            let kind = self.u32()?;
            let value = self.value(&key, kind, 0)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(self.error(format!("metadata {key:?} is there twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(n @ 1..=0x8000_0000)) if (*n as u64).is_power_of_two() => *n as u64,
            Some(other) => {
                let what = format!("general.alignment is {other:?}, which is no power of two");
                return Err(self.error(what));
            }
        };
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            let name = self.string()?;
            let info = self.tensor(&name)?;
            tensors.push((name, info));
        }
        let data = self.at.next_multiple_of(alignment);
        for (_, info) in &mut tensors {
            info.start = info.start.saturating_add(data);
        }
        self.check_ends(&tensors)?;
        Ok((metadata, tensors))
    }

    fn tensor(&mut self, name: &str) -> Result<TensorInfo> {
        let rank = self.u32()?;
        if !(1..=MAX_DIMS).contains(&rank) {
            return Err(self.error(format!("tensor {name:?} has {rank} dimensions")));
        }
        let mut dims = Vec::new();
        for _ in 0..rank {
            let dim = self.length()?;
            dims.push(usize::try_from(dim).unwrap_or(0));
        }
        let (id, start) = (self.u32()?, self.u64()?);
        let (type_name, block, block_bytes, dtype) = tensor_type(id);
        let Some(dtype) = dtype else {
            let path = self.path.display();
            let what = format!("{path}: tensor {name:?} is of type {type_name} ({id})");
            return Err(Error::Unsupported(what));
        };
        let row = dims[0];
        dims.reverse();
        let bytes = dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        let bytes = bytes.and_then(|n| (n / block).checked_mul(block_bytes));
        match bytes {
            Some(bytes) if bytes > 0 && row.is_multiple_of(block) => {
                Ok(TensorInfo { dtype, dims, part: 0, start, bytes })
            }
            _ => {
                let what = format!("tensor {name:?} of type {type_name} can't have the shape");
                Err(self.error(format!("{what} {dims:?}")))
            }
        }
    }

    /// Detects a truncated file before anything is loaded: names the first tensor that exceeds it.
    fn check_ends(&self, tensors: &[(String, TensorInfo)]) -> Result<()> {
        let end = |info: &TensorInfo| info.start.saturating_add(info.bytes as u64);
        let beyond = tensors.iter().filter(|(_, info)| end(info) > self.size);
        match beyond.min_by_key(|(_, info)| info.start) {
            None => Ok(()),
            Some((name, info)) => {
                let ends = format!("ends at byte {}, the file at {}", end(info), self.size);
                Err(self.error(format!("truncated: tensor {name:?} {ends}")))
            }
        }
    }

    fn value(&mut self, key: &str, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Integer(self.bytes::<1>()?[0].into()),
            1 => Value::Integer(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes()?).into()),
            7 => Value::Bool(self.bytes::<1>()?[0] != 0),
            8 => Value::Text(self.string()?),
            9 if depth < MAX_DEPTH => self.array(key, depth)?,
            10 => Value::Integer(self.u64()?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.bytes()?).into()),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            _ => return Err(self.error(format!("metadata {key:?} has a value of type {kind}"))),
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Value> {
        let kind = self.u32()?;
        let count = self.length()?;
        // Each element takes at least a byte of the file, so a wrong count ends the loop soon.
        let mut array = match kind {
            8 => Value::Texts(Vec::new()),
            6 | 12 => Value::Floats(Vec::new()),
            9 => Value::Nested,
            _ => Value::Integers(Vec::new()),
        };
        for _ in 0..count {
            let value = self.value(key, kind, depth + 1)?;
            match (&mut array, value) {
                (Value::Texts(all), Value::Text(text)) => all.push(text),
                (Value::Floats(all), Value::Float(x)) => all.push(x as f32),
                (Value::Integers(all), Value::Bool(on)) => all.push(on.into()),
                (Value::Integers(all), Value::Integer(n)) => {
                    let n = i64::try_from(n);
                    all.push(n.map_err(|e| self.error(format!("metadata {key:?}: {e}")))?);
                }
                _ => {}
            }
        }
        Ok(array)
    }

    fn string(&mut self) -> Result<String> {
        let length = self.length()?;
        if length > self.size - self.at {
            return Err(self.truncated());
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        // Some writers end strings with a zero byte, and some cut within a character.
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn length(&mut self) -> Result<u64> {
        if self.short_lengths { self.u32().map(u64::from) } else { self.u64() }
    }

    fn u32(&mut self) -> Result<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.at += bytes.len() as u64;
        if self.at > self.size {
            return Err(self.truncated());
        }
        self.reader.read_exact(bytes).map_err(|e| Error::file(self.path, e))
    }

    fn truncated(&self) -> Error {
        self.error(format!("truncated: the header goes on beyond the file's {} bytes", self.size))
    }

    fn error(&self, reason: impl std::fmt::Display) -> Error {
        Error::file(self.path, reason)
    }
}
