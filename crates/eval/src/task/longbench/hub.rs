//! LongBench's records from the Hugging Face Hub.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use flate2::read::DeflateDecoder;
use longctx_checkpoint::HubRepo;
use zip::{CompressionMethod, ZipArchive};

use crate::{Error, Result};

/// The authors' dataset. Its archive contains `data/qasper.jsonl` and so on.
const DATASET: &str = "THUDM/LongBench";
const ARCHIVE: &str = "data.zip";

/// Downloads the missing files of the tasks `names` to `folder`, from the Hub's `THUDM/LongBench`
/// (114 MB, also kept in the Hub's cache).
///
/// # Errors
/// If the Hub cannot be reached, a task is missing in the archive, the archive is damaged, or a
/// file cannot be written.
pub fn download(folder: impl AsRef<Path>, names: &[&str]) -> Result<()> {
    if names.iter().all(|name| file(folder.as_ref(), name).exists()) {
        return Ok(());
    }
    let archive = HubRepo::dataset(DATASET).and_then(|repo| repo.get(ARCHIVE));
    unpack(&archive.map_err(Error::Download)?, folder.as_ref(), names)
}

fn file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.jsonl"))
}

/// Extracts the tasks' files from LongBench's archive.
fn unpack(archive: &Path, folder: &Path, names: &[&str]) -> Result<()> {
    let broken = |error: zip::result::ZipError| Error::io(archive)(error.into());
    let opened = File::open(archive).map_err(Error::io(archive))?;
    let mut zip = ZipArchive::new(opened).map_err(broken)?;
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    for name in names {
        let path = file(folder, name);
        if path.exists() {
            continue;
        }
        // Read without decompression: zip's own inflate would add compressors as dependencies.
        let entry = zip.by_name_raw(format!("data/{name}.jsonl").as_bytes()).map_err(broken)?;
        // Written to a new file and renamed: an interrupted download leaves no partial file.
        let new = folder.join(format!("{name}.jsonl.new"));
        let mut out = File::create(&new).map_err(Error::io(&new))?;
        let copied = match entry.compression() {
            CompressionMethod::Stored => io::copy(&mut { entry }, &mut out),
            _ => io::copy(&mut DeflateDecoder::new(entry), &mut out),
        };
        copied.map_err(Error::io(&new))?;
        fs::rename(&new, &path).map_err(Error::io(&path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `fixtures/make_archive.py`: each task's name, in an archive like LongBench's.
    const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/longbench.zip");

    #[test]
    fn files_are_extracted_from_the_archive_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<_> = super::super::names().collect();
        fs::write(folder.path().join("trec.jsonl"), "mine").unwrap();
        unpack(Path::new(FIXTURE), folder.path(), &names).unwrap();
        for name in &names {
            let text = fs::read_to_string(file(folder.path(), name)).unwrap();
            let whole = format!("{{\"dataset\": \"{name}\"}}\n").repeat(50);
            assert_eq!(text, if *name == "trec" { "mine".to_owned() } else { whole });
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 16);
        // Nothing is left to download.
        download(folder.path(), &names).unwrap();
    }

    #[test]
    fn a_file_that_is_no_archive_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = unpack(
            Path::new(&FIXTURE.replace("longbench.zip", "prompts.json")),
            folder.path(),
            &["trec"],
        );
        assert!(matches!(error, Err(Error::Io { .. })), "{error:?}");
    }
}
