//! Tensors of a PyTorch file: a zip archive with a pickle that describes the tensors, and with
//! their storages.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use longctx_core::{Error, Result};
use zip::{CompressionMethod, ZipArchive};

use crate::files;
use crate::pickle::{Id, Pickle, Value};

/// A file of tensors by name, as written by `torch.save(model.state_dict(), path)` since PyTorch
/// 1.6.
pub struct Pth {
    path: PathBuf,
    file: Mutex<Box<dyn Source>>,
    tensors: BTreeMap<String, Info>,
}

/// A source of tensors' bytes.
trait Source: Read + Seek + Send {}

impl<T: Read + Seek + Send> Source for T {}

/// The location of a tensor's elements.
#[derive(Debug, PartialEq)]
struct Info {
    dtype: Result<DType, String>,
    /// Bytes per element.
    size: usize,
    shape: Vec<usize>,
    /// Stride of each dimension, in elements.
    stride: Vec<usize>,
    /// The byte range from the first element to the last.
    bytes: Range<u64>,
}

impl std::fmt::Debug for Pth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pth").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Pth {
    /// Reads the descriptions of all tensors. Their data are read on request.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read, is not a PyTorch archive, contains anything
    /// other than a dictionary of tensors, or has a storage that is too small for a tensor.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(files::open(path)?, path)
    }

    /// As [`open`](Self::open), from a reader. `path` is named in errors.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn read(
        source: impl Read + Seek + Send + 'static,
        path: impl Into<PathBuf>,
    ) -> Result<Self> {
        let path = path.into();
        let mut source: Box<dyn Source> = Box::new(source);
        let tensors = describe(&mut source).map_err(|reason| Error::file(&path, reason))?;
        Ok(Self { path, file: Mutex::new(source), tensors })
    }

    /// Returns the names of the tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the shape of a tensor; `None` if it does not exist.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|info| info.shape.as_slice())
    }

    /// Reads a tensor in its stored dtype, on the CPU.
    ///
    /// # Errors
    /// [`Error::File`] if there is no tensor with this name, or the file cannot be read.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let failed = |e: &dyn std::fmt::Display| Error::file(&self.path, format!("{name:?}: {e}"));
        let Some(info) = self.tensors.get(name) else {
            return Err(Error::file(&self.path, format!("there is no tensor {name:?}")));
        };
        let dtype = info.dtype.clone().map_err(|storage| {
            let what = format!("tensor {name:?} of type {storage}");
            Error::Unsupported(format!("{}: {what}", self.path.display()))
        })?;
        let mut bytes = vec![0; (info.bytes.end - info.bytes.start) as usize];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let read =
            file.seek(SeekFrom::Start(info.bytes.start)).and_then(|_| file.read_exact(&mut bytes));
        read.map_err(|e| failed(&e))?;
        let packed = info.packed(bytes);
        Tensor::from_raw_buffer(&packed, dtype, &info.shape, &Device::Cpu).map_err(|e| failed(&e))
    }
}

impl Info {
    /// Returns the elements contiguously, in row-major order.
    fn packed(&self, bytes: Vec<u8>) -> Vec<u8> {
        let (size, count) = (self.size, self.shape.iter().product::<usize>());
        if self.is_contiguous() || count == 0 {
            return bytes;
        }
        let mut packed = Vec::with_capacity(count * size);
        let mut index = vec![0; self.shape.len()];
        for _ in 0..count {
            let at: usize = index.iter().zip(&self.stride).map(|(i, step)| i * step).sum();
            packed.extend_from_slice(&bytes[at * size..][..size]);
            for (i, len) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *len {
                    break;
                }
                *i = 0;
            }
        }
        packed
    }

    fn is_contiguous(&self) -> bool {
        let mut step = 1;
        self.shape.iter().zip(&self.stride).rev().all(|(&len, &stride)| {
            let fits = len == 1 || stride == step;
            step *= len;
            fits
        })
    }
}

/// Returns the tensors that an archive describes.
fn describe(source: &mut Box<dyn Source>) -> Result<BTreeMap<String, Info>, String> {
    let size = source.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    let entries = entries(source, size)?;
    let mut pickles = entries.keys().filter(|name| name.ends_with("data.pkl"));
    let (Some(pickle), None) = (pickles.next(), pickles.next()) else {
        return Err("expected an archive of PyTorch's, with one data.pkl".into());
    };
    let folder = pickle.strip_suffix("data.pkl").unwrap_or_default();
    if let Some(order) = entries.get(&format!("{folder}byteorder")) {
        let order = load(source, order)?;
        if order != b"little" {
            let got = String::from_utf8_lossy(&order).chars().take(20).collect::<String>();
            return Err(format!("expected numbers in byte order little, got {got:?}"));
        }
    }
    let pickle = Pickle::read(&load(source, &entries[pickle])?)?;
    let mut tensors = BTreeMap::new();
    for &(name, value) in state(&pickle)? {
        // Other values, such as an epoch or a learning rate, are not tensors.
        let (Value::Text(name), Value::Call { .. }) = (pickle.get(name), pickle.get(value)) else {
            continue;
        };
        let storage = |key: &str| entries.get(&format!("{folder}data/{key}")).cloned();
        let info =
            info(&pickle, value, storage).map_err(|reason| format!("tensor {name:?}: {reason}"))?;
        tensors.insert(name.clone(), info);
    }
    Ok(tensors)
}

/// Returns the entries of the state dictionary: the pickle's root, or its entry "state_dict".
fn state(pickle: &Pickle) -> Result<&[(Id, Id)], String> {
    let Value::Dict(root) = pickle.root() else {
        return Err(format!("expected a dictionary of tensors, got {}", pickle.root().kind()));
    };
    let is_state = |name: Id| *pickle.get(name) == Value::Text("state_dict".into());
    let nested = root.iter().find_map(|&(name, value)| match pickle.get(value) {
        Value::Dict(items) if is_state(name) => Some(items),
        _ => None,
    });
    Ok(nested.unwrap_or(root))
}

/// Returns the byte range of each file in an archive of `size` bytes.
fn entries(source: &mut Box<dyn Source>, size: u64) -> Result<HashMap<String, Range<u64>>, String> {
    let mut archive =
        ZipArchive::new(source).map_err(|e| format!("no archive of PyTorch's: {e}"))?;
    let mut entries = HashMap::new();
    for i in 0..archive.len() {
        let entry = archive.by_index_raw(i).map_err(|e| e.to_string())?;
        let name = entry.name().map_err(|e| e.to_string())?.into_owned();
        if entry.compression() != CompressionMethod::Stored {
            return Err(format!("{name:?} is compressed, which PyTorch does not do"));
        }
        let end =
            entry.data_start().and_then(|start| Some(start..start.checked_add(entry.size())?));
        match end.filter(|range| range.end <= size) {
            Some(range) => entries.insert(name, range),
            None => return Err(format!("{name:?} ends after the file")),
        };
    }
    Ok(entries)
}

/// Reads a small file of the archive.
fn load(source: &mut Box<dyn Source>, range: &Range<u64>) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    let read =
        source.seek(SeekFrom::Start(range.start)).and_then(|_| source.read_exact(&mut bytes));
    read.map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// Returns the tensor that a value of the dictionary describes. `storage` returns the bytes of a
/// storage.
fn info(
    pickle: &Pickle,
    value: Id,
    storage: impl Fn(&str) -> Option<Range<u64>>,
) -> Result<Info, String> {
    let arguments = rebuild_arguments(pickle, value)?;
    let [description, offset, shape, stride, ..] = arguments else {
        return Err(format!(
            "expected storage, offset, shape and stride, got {} values",
            arguments.len()
        ));
    };
    let (offset, shape, stride) =
        (number(pickle, *offset)?, numbers(pickle, *shape)?, numbers(pickle, *stride)?);
    if shape.len() != stride.len() {
        return Err(format!("{} dimensions with {} strides", shape.len(), stride.len()));
    }
    let (dtype, size, key) = storage_type(pickle, *description)?;
    let range = storage(key).ok_or_else(|| format!("there is no storage {key:?}"))?;
    let held = ((range.end - range.start) / size as u64) as usize;
    let too_small = || format!("{shape:?} of stride {stride:?} from {offset}, of {held} numbers");
    // Views that repeat elements are refused, so that no more is read than the storage holds.
    // Checkpoints do not contain such views.
    let count = shape.iter().try_fold(1usize, |count, &len| count.checked_mul(len));
    let count = count.filter(|&count| count <= held).ok_or_else(too_small)?;
    let last = shape.iter().zip(&stride).try_fold(0usize, |last, (&len, &step)| {
        last.checked_add(len.saturating_sub(1).checked_mul(step)?)
    });
    let span = if count == 0 { Some(0) } else { last.and_then(|last| last.checked_add(1)) };
    let end = span.and_then(|span| span.checked_add(offset)).filter(|&end| end <= held);
    let end = end.ok_or_else(too_small)?;
    let at = |number: usize| range.start + (number * size) as u64;
    Ok(Info { dtype, size, bytes: at(offset)..at(end), shape, stride })
}

/// Returns the arguments of `torch._utils._rebuild_tensor_v2`, also inside a parameter or a tensor
/// subclass.
fn rebuild_arguments(pickle: &Pickle, mut value: Id) -> Result<&[Id], String> {
    const WRAPPERS: usize = 4;
    for _ in 0..WRAPPERS {
        let Value::Call { function, arguments } = pickle.get(value) else {
            return Err(format!("expected a tensor, got {}", pickle.get(value).kind()));
        };
        let (module, mut name) = global(pickle, *function)?;
        let mut arguments = tuple(pickle, *arguments)?;
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2") {
            let [function, _class, inner, ..] = arguments else {
                return Err(format!("expected 3 arguments of {name}, got {}", arguments.len()));
            };
            (_, name) = global(pickle, *function)?;
            arguments = tuple(pickle, *inner)?;
        }
        match name {
            "_rebuild_tensor_v2" => return Ok(arguments),
            "_rebuild_parameter" | "_rebuild_parameter_with_state" => {
                value = *arguments.first().ok_or("a parameter without a tensor")?;
            }
            other => return Err(format!("expected a tensor, got the result of {module}.{other}")),
        }
    }
    Err("a tensor in more than 4 wrappers".into())
}

/// Returns the dtype and the key of a storage: `("storage", class, key, device, count)`.
fn storage_type(
    pickle: &Pickle,
    description: Id,
) -> Result<(Result<DType, String>, usize, &str), String> {
    let Value::Persistent(id) = pickle.get(description) else {
        return Err(format!("expected a storage, got {}", pickle.get(description).kind()));
    };
    let &[_, class, key, ..] = tuple(pickle, *id)? else {
        return Err("a storage without class and key".into());
    };
    let class = global(pickle, class)?.1;
    let dtype = match class {
        "FloatStorage" => Ok(DType::F32),
        "DoubleStorage" => Ok(DType::F64),
        "HalfStorage" => Ok(DType::F16),
        "BFloat16Storage" => Ok(DType::BF16),
        "ByteStorage" => Ok(DType::U8),
        "ShortStorage" => Ok(DType::I16),
        "IntStorage" => Ok(DType::I32),
        "LongStorage" => Ok(DType::I64),
        "CharStorage" | "BoolStorage" => Err(class.to_owned()),
        other => return Err(format!("unsupported storage class {other}")),
    };
    let size = dtype.as_ref().map_or(1, |dtype| dtype.size_in_bytes());
    match pickle.get(key) {
        Value::Text(key) => Ok((dtype, size, key)),
        other => Err(format!("expected the key of a storage, got {}", other.kind())),
    }
}

fn global(pickle: &Pickle, id: Id) -> Result<(&str, &str), String> {
    match pickle.get(id) {
        Value::Global(global) => Ok((&global.0, &global.1)),
        other => Err(format!("expected a class or function, got {}", other.kind())),
    }
}

fn tuple(pickle: &Pickle, id: Id) -> Result<&[Id], String> {
    match pickle.get(id) {
        Value::Tuple(parts) => Ok(parts),
        other => Err(format!("expected a tuple, got {}", other.kind())),
    }
}

fn number(pickle: &Pickle, id: Id) -> Result<usize, String> {
    match pickle.get(id) {
        Value::Int(number) => {
            usize::try_from(*number).map_err(|_| format!("expected a size, got {number}"))
        }
        other => Err(format!("expected a size, got {}", other.kind())),
    }
}

fn numbers(pickle: &Pickle, id: Id) -> Result<Vec<usize>, String> {
    tuple(pickle, id)?.iter().map(|&part| number(pickle, part)).collect()
}
