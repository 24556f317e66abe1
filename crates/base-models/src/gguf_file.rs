//! The GGUF container: metadata by key and tensors by name, in one file or several parts.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::gguf_header::{self, TensorInfo, Value};
use candle_core::Device;
use candle_core::quantized::{QTensor, ggml_file::qtensor_from_ggml};
use longctx_checkpoint::files;
use longctx_core::{Error, Result};

/// An open GGUF file with all its parts. The metadata is that of the first part.
#[derive(Debug)]
pub(crate) struct GgufFile {
    path: PathBuf,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    parts: Vec<Mutex<File>>,
}

impl GgufFile {
    /// Reads the headers of a file and of its other parts (`name-00001-of-00003.gguf` and so on).
    ///
    /// # Errors
    /// [`Error::File`] with the file that is missing, truncated or damaged; [`Error::Unsupported`]
    /// with the first tensor of an unsupported type.
    pub fn open(path: &Path) -> Result<Self> {
        let first = files::open(path)?;
        let (metadata, tensors) = gguf_header::read(path, &first)?;
        let mut file =
            Self { path: path.into(), metadata, tensors: BTreeMap::new(), parts: Vec::new() };
        file.add(path, first, tensors)?;
        let number = |key| split_number(path, &file.metadata, key);
        let (no, count) = (number("split.no")?.unwrap_or(0), number("split.count")?.unwrap_or(1));
        let expected = number("split.tensors.count")?;
        if no != 0 {
            let reason = format!("this is part {} of {count}; name the first part", no + 1);
            return Err(Error::file(path, reason));
        }
        for part in 1..count {
            let path = part_path(path, part, count)?;
            let next = files::open(&path)?;
            let (metadata, tensors) = gguf_header::read(&path, &next)?;
            let number = |key| split_number(&path, &metadata, key);
            if number("split.no")? != Some(part) || number("split.count")? != Some(count) {
                let reason = format!("this is not part {} of {count}", part + 1);
                return Err(Error::file(path, reason));
            }
            file.add(&path, next, tensors)?;
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

    /// Returns a string value; an error for another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.bad(key, "is no text")),
        }
    }

    /// Returns a non-negative integer value; an error for another type.
    pub fn number(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(n)) => {
                usize::try_from(*n).map(Some).map_err(|_| self.bad(key, format!("is {n}")))
            }
            Some(_) => Err(self.bad(key, "is no whole number")),
        }
    }

    /// Returns a number value; an error for another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x)),
            Some(Value::Integer(n)) => Ok(Some(*n as f64)),
            Some(_) => Err(self.bad(key, "is no number")),
        }
    }

    /// Returns a boolean value; an error for another type.
    pub fn switch(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(*on)),
            Some(_) => Err(self.bad(key, "is neither true nor false")),
        }
    }

    /// Returns a list of strings; an error for another type.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(Value::Integers(none)) if none.is_empty() => Ok(Some(&[])),
            Some(_) => Err(self.bad(key, "is no list of texts")),
        }
    }

    /// Creates an error about a metadata key.
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

fn split_number(path: &Path, metadata: &BTreeMap<String, Value>, key: &str) -> Result<Option<u64>> {
    match metadata.get(key) {
        None => Ok(None),
        Some(Value::Integer(n)) if (0..=0xffff_ffff).contains(n) => Ok(Some(*n as u64)),
        Some(other) => Err(Error::file(path, format!("metadata {key:?} is {other:?}"))),
    }
}

/// Returns the path of another part, counted from 0, beside the first one.
fn part_path(first: &Path, part: u64, count: u64) -> Result<PathBuf> {
    let name = first.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let prefix = name.strip_suffix(&format!("-00001-of-{count:05}.gguf")).ok_or_else(|| {
        let reason = format!("this is part 1 of {count}, but not named …-00001-of-{count:05}.gguf");
        Error::file(first, reason)
    })?;
    Ok(first.with_file_name(format!("{prefix}-{:05}-of-{count:05}.gguf", part + 1)))
}
