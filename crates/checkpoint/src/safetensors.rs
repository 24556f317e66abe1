//! Memory-mapped safetensors files.
#![allow(unsafe_code)]

use std::path::PathBuf;

use crate::files;
use candle_core::safetensors::MmapedSafetensors;
use longctx_core::{Error, Result};

/// Maps the tensors of some files. The files must not be modified while the result exists: the
/// contents of its tensors would be undefined.
///
/// # Errors
/// [`Error::File`] naming a file that is not a regular file or cannot be read, or, for several
/// files, their folder if one of them is not valid.
pub fn map_safetensors(paths: &[PathBuf]) -> Result<MmapedSafetensors> {
    for path in paths {
        files::open(path)?;
    }
    // SAFETY: memory-mapping is sound as long as the files are not modified while they are mapped.
    // Checkpoints are written once. This function, and each loader that uses it, documents the
    // condition.
    let mapped = unsafe { MmapedSafetensors::multi(paths) };
    mapped.map_err(|error| {
        let path = match paths {
            [path] => Some(path.as_path()),
            paths => paths.first().and_then(|path| path.parent()),
        };
        Error::file(path.unwrap_or_else(|| "".as_ref()), error)
    })
}
