//! What can go wrong in an evaluation.

use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong: what was expected, what came, and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that no evaluation can work with.
    #[error("setting `{name}`: expected {expected}, got {got}")]
    Setting {
        /// The setting's name.
        name: String,
        /// The values that work.
        expected: String,
        /// The value given.
        got: String,
    },
    /// A file that can't be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        reason: std::io::Error,
    },
    /// A record of a task's data that no question can be made of.
    #[error("{}, line {line}, field `{field}`: {fault}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The field.
        field: String,
        /// What was expected and what came.
        fault: String,
    },
    /// A setting whose method nobody has registered.
    #[error(
        "setting `{setting}`: expected one of the {count} registered methods, got `{method}`; the nearest are {nearest}"
    )]
    NotAvailable {
        /// The setting's name.
        setting: String,
        /// Its method.
        method: String,
        /// How many methods are registered.
        count: usize,
        /// Those whose names are most like it.
        nearest: String,
    },
    /// A subject that could not be opened or could not answer.
    #[error("{what}: {reason}")]
    Subject {
        /// The setting, and the task and sample if there is one.
        what: String,
        /// What it says itself.
        reason: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Data that could not be fetched.
    #[error("fetching {what}: {reason}")]
    Download {
        /// What was asked for.
        what: String,
        /// What went wrong.
        reason: String,
    },
    /// A picture of a report that could not be drawn.
    #[error("drawing {what}: {reason}")]
    Drawing {
        /// Which picture.
        what: String,
        /// Why.
        reason: String,
    },
}

impl Error {
    /// An [`Error::Setting`] from anything printable.
    pub fn setting(
        name: impl Into<String>,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Setting { name: name.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// For `map_err` after an operation on `path`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        move |reason| Self::Io { path: path.into(), reason }
    }
}
