//! Digests of the inputs of a run's answers.

use std::fs::{self, File};
use std::path::Path;
use std::{fmt, io};

use sha2::{Digest, Sha256};

use crate::{Error, Result, Sample};

/// Returns the SHA-256 of a file, or of the names and contents of the files in a folder, without
/// subfolders.
///
/// For a run's [`conditions`](crate::Plan::conditions): two files of the same name may differ.
///
/// # Errors
/// If a file cannot be read or is not a regular file.
pub fn content_hash(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    if !path.is_dir() {
        add(&mut hasher, path)?;
        return Ok(hex(&hasher.finalize()));
    }
    let entries = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.map_err(Error::io(path))?;
    let mut files: Vec<_> =
        entries.iter().map(fs::DirEntry::path).filter(|p| p.is_file()).collect();
    files.sort();
    for file in files {
        let name = file.file_name().unwrap_or_default().as_encoded_bytes();
        let length = fs::metadata(&file).map_err(Error::io(&file))?.len();
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update(length.to_le_bytes());
        add(&mut hasher, &file)?;
    }
    Ok(hex(&hasher.finalize()))
}

fn add(hasher: &mut Sha256, path: &Path) -> Result<()> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    if !file.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Error::setting(path.display().to_string(), "a regular file", "another kind"));
    }
    io::copy(&mut file, hasher).map(drop).map_err(Error::io(path))
}

/// Returns the SHA-256 of everything that determines the right answer of a sample.
pub(super) fn question_hash(
    sample: &Sample,
    max_new_tokens: usize,
    stops_at_newline: bool,
) -> Result<String> {
    let text = serde_json::to_vec(&(sample, max_new_tokens, stops_at_newline));
    let text = text.map_err(|e| Error::setting("sample", "one that can be written as JSON", e))?;
    Ok(hex(&Sha256::digest(&text)))
}

fn hex(digest: &[u8]) -> String {
    let write = |mut text: String, byte: &u8| {
        let _ = fmt::Write::write_fmt(&mut text, format_args!("{byte:02x}"));
        text
    };
    digest.iter().fold(String::new(), write)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_folders_are_distinguished_by_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        fs::write(&path, "abc").unwrap();
        // The value was computed by sha256sum.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(content_hash(&path).unwrap(), abc);
        let first = content_hash(folder.path()).unwrap();
        fs::write(&path, "abd").unwrap();
        let second = content_hash(folder.path()).unwrap();
        fs::rename(&path, folder.path().join("b.txt")).unwrap();
        let third = content_hash(folder.path()).unwrap();
        assert!(first != second && second != third);
        assert!(content_hash(&path).unwrap_err().to_string().contains("a.txt"));
    }
}
