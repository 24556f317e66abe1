//! Agreements with the dense model, kept beside a run's results.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use crate::{Agreement, Error, Result};

const FILE: &str = "agreement.jsonl";

/// One setting's.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Line {
    pub setting: String,
    #[serde(flatten)]
    pub agreement: Agreement,
}

/// Adds a setting's agreement to the folder; the newest of a setting is the one reported.
///
/// # Errors
/// If the file can't be written.
pub fn add_agreement(folder: &Path, setting: &str, agreement: &Agreement) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let path = folder.join(FILE);
    let line = Line { setting: setting.to_owned(), agreement: *agreement };
    let text = serde_json::to_string(&line)
        .map_err(|error| Error::setting("agreement", "finite numbers", error))?;
    let mut file =
        OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
    writeln!(file, "{text}").map_err(Error::io(&path))
}

/// The folder's, one a setting, in the order in which settings came.
pub(super) fn read(folder: &Path) -> Result<Vec<Line>> {
    let path = folder.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let mut all: Vec<Line> = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line: Line = serde_json::from_str(line).map_err(|error| Error::Record {
            path: path.clone(),
            line: i + 1,
            field: "(line)".into(),
            fault: error.to_string(),
        })?;
        match all.iter_mut().find(|other| other.setting == line.setting) {
            Some(other) => *other = line,
            None => all.push(line),
        }
    }
    Ok(all)
}
