//! A run's folder: its manifest, and a file of results per process.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::record::Record;
use super::{Limits, Shard};
use crate::{Error, Result, Setting};

/// The manifest that all processes of a run share; `run.json` in its folder.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Manifest {
    /// Versions of `longctx-eval` that wrote results.
    pub versions: BTreeSet<String>,
    /// The random seed.
    pub seed: u64,
    /// Limits for every sample.
    pub limits: Limits,
    /// The settings, by name.
    pub settings: BTreeMap<String, Setting>,
    /// The tasks, by name.
    pub tasks: BTreeSet<String>,
    /// Other conditions that affect a question or an answer, as in
    /// [`Plan::conditions`](crate::Plan::conditions).
    #[serde(default)]
    pub conditions: BTreeMap<String, String>,
}

/// Returns the results of all processes that share a folder, file by file in the order of their
/// names. `run.json` is not read.
///
/// An incomplete last line, as a killed process leaves it, is skipped. A duplicate sample counts
/// once.
///
/// # Errors
/// If the folder or a file cannot be read; [`Error::Record`] for an invalid line before a file's
/// last, or one with an invalid number.
pub fn records(folder: &Path) -> Result<Vec<Record>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("results-") && name.ends_with(".jsonl") {
            paths.push(path);
        }
    }
    paths.sort();
    let mut all = Vec::new();
    for path in &paths {
        all.extend(read(path)?.0);
    }
    // Processes with different shards may have answered the same sample.
    let mut keys = HashSet::new();
    all.retain(|record: &Record| keys.insert(record.key()));
    Ok(all)
}

/// Adds this process's part to the folder's manifest, or creates it.
pub(super) fn join(folder: &Path, ours: &Manifest) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let path = folder.join("run.json");
    let lock = folder.join("run.lock");
    let guard = File::create(&lock).map_err(Error::io(&lock))?;
    guard.lock().map_err(Error::io(&lock))?;
    let mut merged = ours.clone();
    if let Some(theirs) = Manifest::of(folder)? {
        merged.merge(theirs)?;
    }
    let text = serde_json::to_string_pretty(&merged).map_err(|error| broken(&path, 1, &error))?;
    // Written to a new file and renamed: if the process is killed here, the old file stays intact.
    let new = folder.join("run.json.new");
    fs::write(&new, text + "\n").map_err(Error::io(&new))?;
    fs::rename(&new, &path).map_err(Error::io(&path))
}

impl Manifest {
    /// Reads the folder's manifest; `None` if there is none.
    ///
    /// # Errors
    /// If the manifest cannot be read.
    pub fn of(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("run.json");
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let manifest = serde_json::from_str(&text);
        Ok(Some(manifest.map_err(|error| broken(&path, error.line(), &error))?))
    }

    fn merge(&mut self, theirs: Self) -> Result<()> {
        if self.seed != theirs.seed {
            return Err(Error::setting("seed", format!("{}, the run's", theirs.seed), self.seed));
        }
        let (ours, run) = (self.limits.max_new_tokens, theirs.limits.max_new_tokens);
        if ours != run {
            let expected = format!("{}, as in the run's folder", most(run));
            return Err(Error::setting("max_new_tokens", expected, most(ours)));
        }
        // A run can grow: a task's first samples do not depend on their number.
        let samples = self.limits.samples.zip(theirs.limits.samples);
        self.limits.samples = samples.map(|(ours, run)| ours.max(run));
        for (name, setting) in theirs.settings {
            if let Some(ours) = self.settings.get(&name).filter(|ours| **ours != setting) {
                let expected = format!("as in the run's folder, {setting:?}");
                return Err(Error::setting(name, expected, format!("{ours:?}")));
            }
            self.settings.insert(name, setting);
        }
        for (name, value) in theirs.conditions {
            if let Some(ours) = self.conditions.get(&name).filter(|ours| **ours != value) {
                let expected = format!("{value}, as in the run's folder");
                return Err(Error::setting(name, expected, ours));
            }
            self.conditions.insert(name, value);
        }
        self.versions.extend(theirs.versions);
        self.tasks.extend(theirs.tasks);
        Ok(())
    }
}

fn most(limit: Option<usize>) -> String {
    limit.map_or_else(|| "no limit".into(), |limit| limit.to_string())
}

/// The results file of one process.
#[derive(Debug)]
pub(super) struct Results {
    path: PathBuf,
    file: File,
}

impl Results {
    /// Opens and locks the shard's file. Also returns an incomplete last line that was dropped.
    pub fn open(folder: &Path, shard: Shard) -> Result<(Self, Option<String>)> {
        let path = folder.join(format!("results-{}-of-{}.jsonl", shard.index, shard.count));
        let options = OpenOptions::new().create(true).append(true).read(true).clone();
        let file = options.open(&path).map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let name = path.display().to_string();
                return Err(Error::setting(name, "no other process writing", "one that does"));
            }
            Err(TryLockError::Error(error)) => return Err(Error::io(&path)(error)),
        }
        let (_, whole, torn) = read(&path)?;
        if torn.is_some() {
            file.set_len(whole).map_err(Error::io(&path))?;
        }
        Ok((Self { path, file }, torn))
    }

    /// Appends one line and flushes it to the disk.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let mut line =
            serde_json::to_string(record).map_err(|error| broken(&self.path, 0, &error))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path))?;
        self.file.sync_data().map_err(Error::io(&self.path))
    }
}

/// Returns the records of a file, the number of bytes of its complete lines, and the rest.
fn read(path: &Path) -> Result<(Vec<Record>, u64, Option<String>)> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let torn = (whole < bytes.len())
        .then(|| String::from_utf8_lossy(&bytes[whole..]).chars().take(60).collect());
    let mut records = Vec::new();
    for (i, line) in bytes[..whole].split(|&byte| byte == b'\n').enumerate() {
        if !line.is_empty() {
            let record: Record =
                serde_json::from_slice(line).map_err(|error| broken(path, i + 1, &error))?;
            record.check().map_err(|error| broken(path, i + 1, &error))?;
            records.push(record);
        }
    }
    Ok((records, whole as u64, torn))
}

fn broken(path: &Path, line: usize, error: &dyn std::fmt::Display) -> Error {
    Error::Record { path: path.into(), line, field: "(line)".into(), fault: error.to_string() }
}
