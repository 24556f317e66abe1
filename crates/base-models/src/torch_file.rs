//! PyTorch's `.bin` and `.pth` files: a zip archive with a pickle that describes tensors, and their
//! storages.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::files;
use crate::pickle::{Id, Object, Pickle};
use candle_core::{DType, Device, Tensor};
use longctx_core::{Error, Result};
use zip::{CompressionMethod, ZipArchive};

/// The tensors of a file. Their data are read on request.
#[derive(Debug)]
pub(crate) struct TorchFile {
    path: PathBuf,
    tensors: BTreeMap<String, TensorInfo>,
    file: Mutex<File>,
}

#[derive(Debug)]
struct TensorInfo {
    /// The type of the storage: "torch.FloatStorage".
    storage: String,
    dims: Vec<usize>,
    /// Offset of the first byte in the file.
    start: u64,
    bytes: usize,
}

impl TorchFile {
    /// # Errors
    /// [`Error::File`] if the file is damaged, or a tensor is not contiguous.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |e: &dyn std::fmt::Display| Error::file(path, e);
        let file = files::open(path)?;
        let size = file.metadata().map_err(|e| failed(&e))?.len();
        let reader = file.try_clone().map_err(|e| failed(&e))?;
        let mut archive = ZipArchive::new(BufReader::new(reader)).map_err(|e| {
            failed(&format!("{e} (files that PyTorch wrote before its version 1.6 are not read)"))
        })?;
        let (root, bytes) = description(&mut archive).map_err(|e| failed(&e))?;
        let pickle = Pickle::read(&bytes).map_err(|e| failed(&e))?;
        let mut tensors = BTreeMap::new();
        for (name, value) in state(&pickle).map_err(|e| failed(&e))? {
            let named = |e: String| failed(&format!("tensor {name:?}: {e}"));
            let Some(view) = view(&pickle, value).map_err(named)? else { continue };
            let info = locate(&mut archive, &root, size, view).map_err(named)?;
            tensors.insert(name.to_owned(), info);
        }
        Ok(Self { path: path.into(), tensors, file: Mutex::new(file) })
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn dims(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|info| info.dims.as_slice())
    }

    /// Reads a tensor in its stored dtype.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless that is a float dtype.
    pub fn load(&self, name: &str) -> Result<Tensor> {
        let failed =
            |e: &dyn std::fmt::Display| Error::file(&self.path, format!("tensor {name:?}: {e}"));
        let info = self.tensors.get(name).ok_or_else(|| failed(&"it is not there"))?;
        let (dtype, _) = format(&info.storage).map_err(|e| failed(&e))?;
        let dtype = dtype.ok_or_else(|| {
            let what = format!("tensor {name:?} of type {}", info.storage);
            Error::Unsupported(format!("{}: {what}", self.path.display()))
        })?;
        let mut data = vec![0; info.bytes];
        let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        file.seek(SeekFrom::Start(info.start)).map_err(|e| failed(&e))?;
        file.read_exact(&mut data).map_err(|e| failed(&e))?;
        Ok(Tensor::from_raw_buffer(&data, dtype, &info.dims, &Device::Cpu)?)
    }
}

/// Returns the folder inside the archive and the pickle in it.
fn description(archive: &mut ZipArchive<BufReader<File>>) -> Result<(String, Vec<u8>), String> {
    let root = |name: std::borrow::Cow<str>| name.strip_suffix("data.pkl").map(str::to_owned);
    let root = archive.file_names().filter_map(|name| name.ok()).find_map(root);
    let root = root.ok_or("there is no data.pkl in the archive")?;
    let order = entry(archive, &format!("{root}byteorder"));
    if order.is_ok_and(|order| order == b"big") {
        return Err("big-endian numbers".into());
    }
    let bytes = entry(archive, &format!("{root}data.pkl"))?;
    Ok((root, bytes))
}

fn entry(archive: &mut ZipArchive<BufReader<File>>, name: &str) -> Result<Vec<u8>, String> {
    let entry = archive.by_name(name).map_err(|e| format!("{name}: {e}"))?;
    if entry.compression() != CompressionMethod::Stored {
        return Err(format!("{name} is compressed, which PyTorch never does"));
    }
    let mut bytes = Vec::new();
    let size = entry.size();
    entry.take(size).read_to_end(&mut bytes).map_err(|e| format!("{name}: {e}"))?;
    Ok(bytes)
}

/// Returns the entries of the state dictionary: the pickle's root, or its entry "state_dict".
fn state(pickle: &Pickle) -> Result<Vec<(&str, Id)>, String> {
    let dict = |id| match pickle.get(id) {
        Object::Dict(items) => Some(items),
        _ => None,
    };
    let root = dict(pickle.root()).ok_or("this is no dictionary of tensors")?;
    let nested = root.iter().find(|(key, _)| pickle.text(*key) == Some("state_dict"));
    let items = nested.and_then(|(_, value)| dict(*value)).unwrap_or(root);
    Ok(items.iter().filter_map(|(key, value)| Some((pickle.text(*key)?, *value))).collect())
}

/// A tensor as described by the pickle: a range of a storage.
struct View {
    storage: String,
    key: String,
    /// Number of elements in the storage.
    count: usize,
    offset: usize,
    dims: Vec<usize>,
}

/// Returns the view of a tensor; `None` for other values, such as an epoch or a learning rate.
fn view(pickle: &Pickle, value: Id) -> Result<Option<View>, String> {
    let Some((function, arguments)) = pickle.call(value) else { return Ok(None) };
    match (function, arguments) {
        ("torch._utils._rebuild_parameter", [inner, ..]) => view_of(pickle, *inner).map(Some),
        ("torch._tensor._rebuild_from_type_v2", [function, _, inner, ..])
            if pickle.global(*function) == Some("torch._utils._rebuild_tensor_v2") =>
        {
            let arguments = pickle.tuple(*inner).ok_or("a tensor without arguments")?;
            rebuilt(pickle, arguments).map(Some)
        }
        _ => view_of(pickle, value).map(Some),
    }
}

fn view_of(pickle: &Pickle, value: Id) -> Result<View, String> {
    match pickle.call(value) {
        Some(("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", arguments)) => {
            rebuilt(pickle, arguments)
        }
        Some((function, _)) => Err(format!("made by {function}, which is not read")),
        None => Err("this is no tensor".into()),
    }
}

fn rebuilt(pickle: &Pickle, arguments: &[Id]) -> Result<View, String> {
    let [storage, offset, dims, strides, ..] = arguments else {
        return Err("a tensor with less than four arguments".into());
    };
    let numbers = |id| -> Option<Vec<usize>> {
        pickle.tuple(id)?.iter().map(|&id| pickle.number(id)).collect()
    };
    let (dims, strides) =
        (numbers(*dims).ok_or("no shape")?, numbers(*strides).ok_or("no strides")?);
    let offset = pickle.number(*offset).ok_or("no offset")?;
    let Object::Persistent(storage) = pickle.get(*storage) else { return Err("no storage".into()) };
    let Some([_, storage, key, _, count, ..]) = pickle.tuple(*storage) else {
        return Err("a storage with less than five parts".into());
    };
    let mut stride = 1usize;
    for (&dim, &got) in dims.iter().zip(&strides).rev() {
        if dim != 1 && got != stride {
            return Err(format!(
                "numbers that are not in order: shape {dims:?}, strides {strides:?}"
            ));
        }
        stride = stride.checked_mul(dim).ok_or_else(|| format!("a shape of {dims:?}"))?;
    }
    if dims.len() != strides.len() {
        return Err("shape and strides of different lengths".into());
    }
    Ok(View {
        storage: pickle.global(*storage).ok_or("a storage without a type")?.to_owned(),
        key: pickle.text(*key).ok_or("a storage without a key")?.to_owned(),
        count: pickle.number(*count).ok_or("a storage without a size")?,
        offset,
        dims,
    })
}

/// Returns the location of the data in the file, with all sizes checked against it.
fn locate(
    archive: &mut ZipArchive<BufReader<File>>,
    root: &str,
    file_size: u64,
    view: View,
) -> Result<TensorInfo, String> {
    let View { storage, key, count, offset, dims } = view;
    let (_, size) = format(&storage)?;
    let entry = archive.by_name(&format!("{root}data/{key}")).map_err(|e| e.to_string())?;
    if entry.compression() != CompressionMethod::Stored {
        return Err("its storage is compressed, which PyTorch never does".into());
    }
    let start = entry.data_start().ok_or("its storage is nowhere")?;
    // An archive may declare more data than the file has.
    let held = entry.size().min(file_size.saturating_sub(start)) as usize / size;
    let numbers: usize = dims.iter().product();
    let end = offset.checked_add(numbers).filter(|&end| end <= count && count <= held);
    if end.is_none() {
        let wanted = format!("{numbers} numbers from {offset} on");
        return Err(format!("{wanted}, of a storage said to have {count} and holding {held}"));
    }
    let start = start + (offset * size) as u64;
    Ok(TensorInfo { storage, dims, start, bytes: numbers * size })
}

/// Returns candle's dtype of a storage if it is a float, and the bytes per element.
fn format(storage: &str) -> Result<(Option<DType>, usize), String> {
    match storage.strip_prefix("torch.").unwrap_or(storage) {
        "FloatStorage" => Ok((Some(DType::F32), 4)),
        "DoubleStorage" => Ok((Some(DType::F64), 8)),
        "HalfStorage" => Ok((Some(DType::F16), 2)),
        "BFloat16Storage" => Ok((Some(DType::BF16), 2)),
        "LongStorage" => Ok((None, 8)),
        "IntStorage" => Ok((None, 4)),
        "ShortStorage" => Ok((None, 2)),
        "CharStorage" | "ByteStorage" | "BoolStorage" => Ok((None, 1)),
        other => Err(format!("storage of type {other:?}")),
    }
}
