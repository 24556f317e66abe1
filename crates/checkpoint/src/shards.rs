//! The files of a checkpoint: one, or several with an index.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::files;
use longctx_core::{Error, Result};

/// The end of the name of an index.
pub(crate) const INDEX: &str = ".index.json";

/// Returns the files of weights in a folder: the first of `names` that exists or, if it is an index
/// (`*.index.json`), the files that it lists. `None` if there is none of `names`.
///
/// # Errors
/// As [`shard_names`].
pub fn weight_files(folder: &Path, names: &[&str]) -> Result<Option<Vec<PathBuf>>> {
    let paths = names.iter().map(|name| folder.join(name));
    let Some(path) = paths.into_iter().find(|path| path.exists()) else { return Ok(None) };
    if !path.as_os_str().to_string_lossy().ends_with(INDEX) {
        return Ok(Some(vec![path]));
    }
    Ok(Some(shard_names(&path)?.iter().map(|name| folder.join(name)).collect()))
}

/// Returns the file names in the `weight_map` of a `model.safetensors.index.json` or
/// `pytorch_model.bin.index.json`.
///
/// # Errors
/// [`Error::File`] if the index cannot be read, has no `weight_map`, or names a file outside its
/// folder.
pub fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    let json = files::read_json(index)?;
    let map = json["weight_map"]
        .as_object()
        .ok_or_else(|| Error::file(index, "there is no object \"weight_map\""))?;
    map.iter()
        .map(|(tensor, file)| match file.as_str() {
            Some(file) if is_inside(file) => Ok(file.to_owned()),
            Some(file) => {
                let what = format!("the file of {tensor:?}, {file:?}, is not in the same folder");
                Err(Error::file(index, what))
            }
            None => Err(Error::file(index, format!("the file of {tensor:?} is no string"))),
        })
        .collect()
}

/// Returns whether a name stays inside its folder.
fn is_inside(name: &str) -> bool {
    let plain = |part| matches!(part, Component::Normal(_));
    !name.is_empty() && !name.contains('\\') && Path::new(name).components().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_name_that_exists_gives_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let files = || weight_files(folder.path(), &["a", "a.index.json", "b"]).unwrap();
        assert_eq!(files(), None);
        for (name, text, expected) in [
            ("b", "", ["b"].as_slice()),
            ("a.index.json", r#"{"weight_map": {"x": "2", "y": "1", "z": "2"}}"#, &["1", "2"]),
            ("a", "", &["a"]),
        ] {
            write(name, text);
            let expected = expected.iter().map(|name| folder.path().join(name)).collect();
            assert_eq!(files(), Some(expected));
        }
    }

    #[test]
    fn files_outside_the_folder_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let index = folder.path().join("model.safetensors.index.json");
        let names = |file: &str| {
            std::fs::write(&index, format!(r#"{{"weight_map": {{"a": {file}}}}}"#)).unwrap();
            shard_names(&index)
        };
        assert!(names("\"model-00001-of-00002.safetensors\"").is_ok());
        for file in
            ["\"../secret\"", "\"/etc/passwd\"", "\"a/../../b\"", "\"\"", "\"..\\\\b\"", "3"]
        {
            let error = names(file).unwrap_err().to_string();
            assert!(error.contains("\"a\""), "{file}: {error}");
        }
    }
}
