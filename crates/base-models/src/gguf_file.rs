//! The container of GGUF: metadata by key and tensors by name, in one file or split over several.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::files;
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml};
use longctx_core::{Error, Result};

const MAGIC: u32 = u32::from_le_bytes(*b"GGUF");
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_DIMS: u32 = 4;
/// Arrays of arrays occur in no known file; deeper ones are refused.
const MAX_DEPTH: usize = 2;

/// A metadata value. Whole numbers and floats of all widths share a variant.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    /// An array of arrays. Its content is not kept.
    Nested,
}

/// Where a tensor lies.
#[derive(Debug)]
pub(crate) struct TensorInfo {
    dtype: GgmlDType,
    /// Outermost first, unlike in the file.
    dims: Vec<usize>,
    /// The file, counted from the first part.
    part: usize,
    /// The first byte in that file.
    start: u64,
    bytes: usize,
}

impl TensorInfo {
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }
}

/// An open GGUF file with all its parts. The metadata is that of the first part.
#[derive(Debug)]
pub(crate) struct GgufFile {
    path: PathBuf,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    parts: Vec<Mutex<File>>,
}

impl GgufFile {
    /// Reads the headers of a file and of the parts that belong to it (`name-00001-of-00003.gguf`
    /// and so on).
    ///
    /// # Errors
    /// [`Error::File`] with the file that is missing, truncated or damaged; [`Error::Unsupported`]
    /// with the first tensor whose type can't be multiplied.
    pub fn open(path: &Path) -> Result<Self> {
        let first = Part::read(path)?;
        let count = split_number(path, &first, "split.count")?.unwrap_or(1);
        let no = split_number(path, &first, "split.no")?.unwrap_or(0);
        if no != 0 {
            let reason = format!("this is part {} of {count}; name the first part", no + 1);
            return Err(Error::file(path, reason));
        }
        let expected = split_number(path, &first, "split.tensors.count")?;
        let mut file = Self {
            path: path.into(),
            metadata: first.metadata,
            tensors: BTreeMap::new(),
            parts: Vec::new(),
        };
        file.add(path, first.file, first.tensors)?;
        for part in 1..count {
            let path = part_path(path, part, count)?;
            let next = Part::read(&path)?;
            let no = split_number(&path, &next, "split.no")?;
            if no != Some(part) || split_number(&path, &next, "split.count")? != Some(count) {
                let reason = format!("this is not part {} of {count}", part + 1);
                return Err(Error::file(path, reason));
            }
            file.add(&path, next.file, next.tensors)?;
        }
        match expected {
            Some(n) if count > 1 && n != file.tensors.len() as u64 => {
                let got = format!("the parts hold {} tensors, not {n}", file.tensors.len());
                Err(Error::file(path, got))
            }
            _ => Ok(file),
        }
    }

    fn add(&mut self, path: &Path, file: File, tensors: Vec<(String, TensorInfo)>) -> Result<()> {
        let part = self.parts.len();
        self.parts.push(Mutex::new(file));
        for (name, info) in tensors {
            if self.tensors.contains_key(&name) {
                return Err(Error::file(path, format!("tensor {name:?} is there twice")));
            }
            self.tensors.insert(name, TensorInfo { part, ..info });
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The text of a key that must hold one.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.bad(key, "is no text")),
        }
    }

    /// The whole number of a key that must hold one, at least 0.
    pub fn number(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) => {
                usize::try_from(*n).map(Some).map_err(|_| self.bad(key, format!("is {n}")))
            }
            Some(_) => Err(self.bad(key, "is no whole number")),
        }
    }

    /// The number of a key that must hold one.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x)),
            Some(Value::Integer(n)) => Ok(Some(*n as f64)),
            Some(_) => Err(self.bad(key, "is no number")),
        }
    }

    /// The switch of a key that must hold one.
    pub fn switch(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(*on)),
            Some(_) => Err(self.bad(key, "is neither true nor false")),
        }
    }

    /// The list of texts of a key that must hold one.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(Value::Integers(none)) if none.is_empty() => Ok(Some(&[])),
            Some(_) => Err(self.bad(key, "is no list of texts")),
        }
    }

    /// An error about a metadata key.
    pub fn bad(&self, key: &str, reason: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("metadata {key:?} {reason}"))
    }

    /// Reads a tensor.
    pub fn read(&self, name: &str, device: &Device) -> Result<QTensor> {
        let failed =
            |e: &dyn std::fmt::Display| Error::file(&self.path, format!("tensor {name:?}: {e}"));
        let info = self.tensors.get(name).ok_or_else(|| failed(&"it is not there"))?;
        let mut data = vec![0; info.bytes];
        let file = self.parts[info.part].lock();
        let mut file = file.unwrap_or_else(|poisoned| poisoned.into_inner());
        file.seek(SeekFrom::Start(info.start)).map_err(|e| failed(&e))?;
        file.read_exact(&mut data).map_err(|e| failed(&e))?;
        drop(file);
        qtensor_from_ggml(info.dtype, &data, info.dims.clone(), device).map_err(|e| failed(&e))
    }
}

fn split_number(path: &Path, part: &Part, key: &str) -> Result<Option<u64>> {
    match part.metadata.get(key) {
        None => Ok(None),
        Some(Value::Integer(n)) if (0..=0xffff_ffff).contains(n) => Ok(Some(*n as u64)),
        Some(other) => Err(Error::file(path, format!("metadata {key:?} is {other:?}"))),
    }
}

/// The path of another part, counted from 0, beside the first one.
fn part_path(first: &Path, part: u64, count: u64) -> Result<PathBuf> {
    let name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let prefix = name.strip_suffix(&format!("-00001-of-{count:05}.gguf")).ok_or_else(|| {
        let reason = format!("this is part 1 of {count}, but not named …-00001-of-{count:05}.gguf");
        Error::file(first, reason)
    })?;
    Ok(first.with_file_name(format!("{prefix}-{:05}-of-{count:05}.gguf", part + 1)))
}

/// One file.
struct Part {
    file: File,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<(String, TensorInfo)>,
}

impl Part {
    fn read(path: &Path) -> Result<Self> {
        let file = files::open(path)?;
        let size = file.metadata().map_err(|e| Error::file(path, e))?.len();
        let mut header =
            Header { path, reader: BufReader::new(file), at: 0, size, short_lengths: false };
        let (metadata, tensors) = header.read()?;
        Ok(Self { file: header.reader.into_inner(), metadata, tensors })
    }
}

/// Reads a header. No allocation goes beyond a multiple of the file's size.
struct Header<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    at: u64,
    size: u64,
    /// Version 1 has lengths of 32 bits.
    short_lengths: bool,
}

type Contents = (BTreeMap<String, Value>, Vec<(String, TensorInfo)>);

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

    /// A truncated file is found out before anything is loaded, by the first tensor that goes past
    /// its end.
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
        // Each element takes at least a byte of the file, so a false count ends the loop soon.
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
        // Some writers end strings with a zero, and some cut within a character.
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

/// ggml's name of a type, the weights of a block, its bytes, and candle's type if it can be
/// multiplied.
fn tensor_type(id: u32) -> (&'static str, usize, usize, Option<GgmlDType>) {
    let known = |name, dtype: GgmlDType| (name, dtype.block_size(), dtype.type_size(), Some(dtype));
    let name = match id {
        0 => return known("F32", GgmlDType::F32),
        1 => return known("F16", GgmlDType::F16),
        2 => return known("Q4_0", GgmlDType::Q4_0),
        3 => return known("Q4_1", GgmlDType::Q4_1),
        6 => return known("Q5_0", GgmlDType::Q5_0),
        7 => return known("Q5_1", GgmlDType::Q5_1),
        8 => return known("Q8_0", GgmlDType::Q8_0),
        10 => return known("Q2_K", GgmlDType::Q2K),
        11 => return known("Q3_K", GgmlDType::Q3K),
        12 => return known("Q4_K", GgmlDType::Q4K),
        13 => return known("Q5_K", GgmlDType::Q5K),
        14 => return known("Q6_K", GgmlDType::Q6K),
        30 => return known("BF16", GgmlDType::BF16),
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        39 => "MXFP4",
        40 => "NVFP4",
        41 => "Q1_0",
        42 => "Q2_0",
        _ => "unknown to this reader",
    };
    (name, 1, 1, None)
}
