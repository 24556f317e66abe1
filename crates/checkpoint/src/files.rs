//! Reading of regular files.

use std::fs::File;
use std::path::Path;

use longctx_core::{Error, Result};

/// Opens a regular file. Reading a pipe or a device may never end.
///
/// # Errors
/// [`Error::File`] if it is not a regular file or cannot be read.
pub fn open(path: &Path) -> Result<File> {
    let metadata = std::fs::metadata(path).map_err(|e| Error::file(path, e))?;
    if !metadata.is_file() {
        return Err(Error::file(path, "this is no regular file"));
    }
    File::open(path).map_err(|e| Error::file(path, e))
}

/// Reads a regular file as text.
///
/// # Errors
/// [`Error::File`] if it is not a regular file or cannot be read as UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    std::io::read_to_string(open(path)?).map_err(|e| Error::file(path, e))
}

/// Reads a regular file as text; `None` if it does not exist.
///
/// # Errors
/// [`Error::File`] if it is not a regular file or cannot be read as UTF-8.
pub fn read_text_if_present(path: &Path) -> Result<Option<String>> {
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        _ => read_text(path).map(Some),
    }
}

/// Reads a regular file as JSON.
///
/// # Errors
/// [`Error::File`] if it is not a regular file or cannot be read as JSON.
pub fn read_json(path: &Path) -> Result<serde_json::Value> {
    serde_json::from_str(&read_text(path)?).map_err(|e| Error::file(path, e))
}
