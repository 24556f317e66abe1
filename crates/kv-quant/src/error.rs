//! The error type of the slice API, independent of candle.

use std::fmt;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error, with the expected and the actual value and the location.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting with an invalid value.
    #[error("setting `{name}`: expected {expected}, got {got}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// The valid values.
        expected: String,
        /// The actual value.
        got: String,
    },
    /// A slice's length, a count or an identifier does not fit.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// The argument.
        what: &'static str,
        /// The expected value.
        expected: String,
        /// The actual value.
        got: String,
    },
    /// NaN or infinity where finite numbers are required.
    #[error("{value} at {at}")]
    NotFinite {
        /// The value.
        value: f32,
        /// Its position.
        at: Position,
    },
    /// A finite number beyond f16's ±65504, or a group whose range exceeds 65504. If the tokens of
    /// a group are appended one by one, also a number beyond half of that.
    #[error("{value} at {at} is too large for groups in f16")]
    OutOfRange {
        /// The number or the range.
        value: f32,
        /// Its position.
        at: Position,
    },
    /// A sequence that does not exist or has been removed.
    #[error("sequence {0} is not known")]
    UnknownSequence(u64),
    /// A pool of fixed capacity has no room. Nothing has changed.
    #[error("the pool is full: {needed} bytes are needed and {free} are free")]
    PoolFull {
        /// Bytes needed by the call.
        needed: usize,
        /// Free bytes.
        free: usize,
    },
    /// A file that cannot be read or written, or has unexpected contents.
    #[cfg(feature = "save")]
    #[error("{}: {reason}", path.display())]
    File {
        /// The file; empty for bytes in memory.
        path: std::path::PathBuf,
        /// The reason.
        reason: String,
    },
}

/// The position of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Position {
    /// In a matrix.
    Matrix {
        /// The row: a token.
        row: usize,
        /// The column: a channel.
        column: usize,
    },
    /// In the keys, values or queries of some sequences.
    Sequence {
        /// `keys`, `values` or `queries`.
        of: &'static str,
        /// The sequence.
        seq: u64,
        /// The token, relative to the sequence's first token in the call.
        token: usize,
        /// The kv head, or the query head.
        head: usize,
        /// The channel.
        channel: usize,
    },
}

impl Position {
    pub(crate) fn row(at: usize, columns: usize) -> Self {
        Self::Matrix { row: at / columns, column: at % columns }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Matrix { row, column } => write!(f, "row {row}, column {column}"),
            Self::Sequence { of, seq, token, head, channel } => {
                write!(f, "{of} of sequence {seq}: token {token}, head {head}, channel {channel}")
            }
        }
    }
}

impl Error {
    #[cfg(feature = "save")]
    pub(crate) fn file(path: impl Into<std::path::PathBuf>, reason: impl ToString) -> Self {
        Self::File { path: path.into(), reason: reason.to_string() }
    }

    pub(crate) fn setting(name: &'static str, expected: impl ToString, got: impl ToString) -> Self {
        Self::Setting { name, expected: expected.to_string(), got: got.to_string() }
    }

    pub(crate) fn mismatch(
        what: &'static str,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        Self::Mismatch { what, expected: expected.to_string(), got: got.to_string() }
    }

    /// Returns the error for a number that cannot be packed.
    pub(crate) fn number(value: f32, at: Position) -> Self {
        if value.is_finite() {
            Self::OutOfRange { value, at }
        } else {
            Self::NotFinite { value, at }
        }
    }
}
