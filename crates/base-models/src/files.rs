//! Safe access to the files of a checkpoint: only regular files, only inside the given folder.

use std::fs::File;
use std::path::{Component, Path, PathBuf};

use longctx_core::{Error, Result};

/// Opens a regular file. Reading a pipe or a device may never end.
pub(crate) fn open(path: &Path) -> Result<File> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::file(path, e))?;
    if !metadata.is_file() {
        return Err(Error::file(path, "this is no regular file"));
    }
    File::open(path).map_err(|e| Error::file(path, e))
}

/// Reads a regular file as text.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    std::io::read_to_string(open(path)?).map_err(|e| Error::file(path, e))
}

/// Reads a regular file as text; `None` if it does not exist.
pub(crate) fn read_text_if_present(path: &Path) -> Result<Option<String>> {
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        _ => read_text(path).map(Some),
    }
}

/// Returns the path of a file that an index names. The name must stay inside the folder.
///
/// # Errors
/// [`Error::File`] with the index and the name if the name is absolute or contains `..`.
pub(crate) fn inside(folder: &Path, index: &Path, name: &str) -> Result<PathBuf> {
    let plain = |c: Component| matches!(c, Component::Normal(_));
    if name.is_empty() || !Path::new(name).components().all(plain) {
        return Err(Error::file(index, format!("{name:?} is no name of a file in this folder")));
    }
    Ok(folder.join(name))
}

/// Reads a regular file as JSON.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value> {
    serde_json::from_str(&read_text(path)?).map_err(|e| Error::file(path, e))
}
