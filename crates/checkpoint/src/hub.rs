//! Repositories of the Hugging Face Hub.

use std::path::PathBuf;

use crate::shards::{INDEX, shard_names};
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Repo, RepoType};
use longctx_core::{Error, Result};

/// A repository of the Hugging Face Hub.
///
/// Files are downloaded to the Hub's cache, and read from there afterwards. The variables `HF_HOME`
/// and `HF_ENDPOINT` set the cache and the server, as in Python's `huggingface_hub`.
#[derive(Debug)]
pub struct HubRepo {
    name: String,
    repo: ApiRepo,
}

impl HubRepo {
    /// Names a model, such as `state-spaces/mamba-130m-hf`, without a request.
    ///
    /// # Errors
    /// [`Error::File`] if the client cannot be created.
    pub fn model(name: &str) -> Result<Self> {
        Self::new(name, RepoType::Model)
    }

    /// Names a dataset, such as `THUDM/LongBench`, without a request.
    ///
    /// # Errors
    /// As [`model`](Self::model).
    pub fn dataset(name: &str) -> Result<Self> {
        Self::new(name, RepoType::Dataset)
    }

    fn new(name: &str, kind: RepoType) -> Result<Self> {
        let api = ApiBuilder::from_env().build().map_err(|e| Error::file(name, e))?;
        Ok(Self { name: name.to_owned(), repo: api.repo(Repo::new(name.to_owned(), kind)) })
    }

    /// Downloads `config.json` and returns its folder, which contains all downloaded files.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn folder(&self) -> Result<PathBuf> {
        let config = self.get("config.json")?;
        let folder = config.parent().map(PathBuf::from);
        folder.ok_or_else(|| Error::file(config, "this path has no folder"))
    }

    /// Downloads a file unless it is cached.
    ///
    /// # Errors
    /// [`Error::File`] if the Hub cannot be reached or has no such file, or if the file cannot be
    /// written.
    pub fn get(&self, file: &str) -> Result<PathBuf> {
        self.repo.get(file).map_err(|e| self.failed(file, e))
    }

    /// Downloads a file that the repository may lack. A file that is not cached counts as absent if
    /// the Hub cannot be reached, so that a cached model can be opened offline; this logs a
    /// warning.
    ///
    /// # Errors
    /// Those of [`get`](Self::get), except for absent files and an unreachable Hub.
    pub fn get_optional(&self, file: &str) -> Result<Option<PathBuf>> {
        match self.repo.get(file) {
            Ok(path) => Ok(Some(path)),
            Err(ApiError::RequestError(error)) => match *error {
                ureq::Error::StatusCode(404) => Ok(None),
                error @ ureq::Error::StatusCode(_) => Err(self.failed(file, error)),
                unreachable => {
                    log::warn!("{}/{file} counts as absent: {unreachable}", self.name);
                    Ok(None)
                }
            },
            Err(error) => Err(self.failed(file, error)),
        }
    }

    /// Downloads the first of `files` that the repository has. For an index (`*.index.json`), this
    /// includes the files that it lists.
    ///
    /// # Errors
    /// Those of [`get_optional`](Self::get_optional) and [`shard_names`]; [`Error::File`] if the
    /// repository has none of the files.
    pub fn get_first(&self, files: &[&str]) -> Result<()> {
        for file in files {
            let Some(path) = self.get_optional(file)? else { continue };
            if file.ends_with(INDEX) {
                for shard in shard_names(&path)? {
                    self.get(&shard)?;
                }
            }
            return Ok(());
        }
        Err(Error::file(&self.name, format!("there is none of {}", files.join(", "))))
    }

    fn failed(&self, file: &str, error: impl std::fmt::Display) -> Error {
        let reason = format!("not in the Hub's cache, and the download failed: {error}");
        Error::file(format!("{}/{file}", self.name), reason)
    }
}
