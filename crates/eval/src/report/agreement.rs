//! Agreements with the dense model, stored with a run's results.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use crate::{Agreement, Error, Result};

const FILE: &str = "agreement.jsonl";

/// The agreement of one setting.
#[derive(serde::Serialize, serde::Deserialize)]
pub(super) struct Line {
    pub setting: String,
    /// A short description of the text.
    pub text: String,
    /// What else affects the agreement. Empty in lines of earlier versions.
    #[serde(default)]
    pub conditions: BTreeMap<String, String>,
    #[serde(flatten)]
    pub agreement: Agreement,
}

/// Adds a setting's agreement over a text to the folder. The report uses the newest agreement of a
/// setting and text. `text` describes the text in a few words: "essay.txt, words 700 to 800".
/// `conditions`: what else affects the agreement, as [`Plan::conditions`](crate::Plan::conditions).
///
/// # Errors
/// If a number is not finite, or the file cannot be written.
pub fn add_agreement(
    folder: &Path,
    setting: &str,
    text: &str,
    conditions: &BTreeMap<String, String>,
    agreement: &Agreement,
) -> Result<()> {
    agreement.check()?;
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let path = folder.join(FILE);
    let line = Line {
        setting: setting.to_owned(),
        text: text.to_owned(),
        conditions: conditions.clone(),
        agreement: *agreement,
    };
    let mut line = serde_json::to_string(&line)
        .map_err(|error| Error::setting("agreement", "finite numbers", error))?;
    line.push('\n');
    let mut file =
        OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
    // In a single write: other processes append to the file too.
    file.write_all(line.as_bytes()).map_err(Error::io(&path))
}

/// Returns whether the folder contains the setting's agreement over the text.
///
/// # Errors
/// If the folder's file cannot be read; [`Error::Setting`] naming a condition that differs from that
/// of the agreement in the folder.
pub fn has_agreement(
    folder: &Path,
    setting: &str,
    text: &str,
    conditions: &BTreeMap<String, String>,
) -> Result<bool> {
    let lines = read(folder)?;
    let Some(line) = lines.iter().find(|line| line.is(setting, text)) else { return Ok(false) };
    for (name, theirs) in &line.conditions {
        if let Some(ours) = conditions.get(name).filter(|ours| *ours != theirs) {
            let expected = format!("{theirs}, as in {}", folder.join(FILE).display());
            return Err(Error::setting(format!("{setting}: {name}"), expected, ours));
        }
    }
    Ok(true)
}

impl Line {
    fn is(&self, setting: &str, text: &str) -> bool {
        self.setting == setting && self.text == text
    }
}

/// Returns the folder's agreements, one per setting and text, in the order in which they were
/// added.
pub(super) fn read(folder: &Path) -> Result<Vec<Line>> {
    let path = folder.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let mut all: Vec<Line> = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let broken = |fault: String| {
            let (path, line, field) = (path.clone(), i + 1, "(line)".to_owned());
            Error::Record { path, line, field, fault }
        };
        let line: Line = serde_json::from_str(line).map_err(|error| broken(error.to_string()))?;
        line.agreement.check().map_err(|error| broken(error.to_string()))?;
        match all.iter_mut().find(|other| other.is(&line.setting, &line.text)) {
            Some(other) => *other = line,
            None => all.push(line),
        }
    }
    Ok(all)
}
