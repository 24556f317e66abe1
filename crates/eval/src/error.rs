//! Errors of an evaluation.

use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of an evaluation, with the expected and the actual value and the location.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An invalid setting.
    #[error("setting `{name}`: expected {expected}, got {got}")]
    Setting {
        /// The setting's name.
        name: String,
        /// The valid values.
        expected: String,
        /// The actual value.
        got: String,
    },
    /// A file that cannot be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        reason: std::io::Error,
    },
    /// A mistake in a settings file.
    #[error("{file}, line {line}: {fault}")]
    SettingsFile {
        /// The file; "settings" for a text that is not from a file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// The expected and the actual value.
        fault: String,
    },
    /// A record of a task's data that cannot be read as a question.
    #[error("{}, line {line}, field `{field}`: {fault}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The field.
        field: String,
        /// The expected and the actual value.
        fault: String,
    },
    /// A setting whose method is not registered.
    #[error(
        "setting `{setting}`: expected one of the {count} registered methods, got `{method}`; the nearest are {nearest}"
    )]
    NotAvailable {
        /// The setting's name.
        setting: String,
        /// Its method.
        method: String,
        /// The number of registered methods.
        count: usize,
        /// The registered methods with the most similar names.
        nearest: String,
    },
    /// A subject that could not be opened or could not answer.
    #[error("{what}: {reason}")]
    Subject {
        /// The setting, and the task and sample if known.
        what: String,
        /// The subject's error.
        reason: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Data that could not be downloaded.
    #[error(transparent)]
    Download(longctx_core::Error),
    /// A figure of a report that could not be drawn.
    #[error("drawing {what}: {reason}")]
    Drawing {
        /// The figure.
        what: String,
        /// The cause.
        reason: String,
    },
}

impl Error {
    /// Creates an [`Error::Setting`] from printable values.
    pub fn setting(
        name: impl Into<String>,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Setting { name: name.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// Returns a function for `map_err` after an operation on `path`.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        move |reason| Self::Io { path: path.into(), reason }
    }
}
