//! The error type of the slice API, free of candle.

use std::fmt;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong: what was expected, what came, and where.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting that no format can work with.
    #[error("setting `{name}`: expected {expected}, got {got}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// The values that work.
        expected: String,
        /// The value given.
        got: String,
    },
    /// A slice's length, a count or an identifier does not fit.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// The argument.
        what: &'static str,
        /// What fits there.
        expected: String,
        /// What came.
        got: String,
    },
    /// NaN or infinity among numbers that should be finite.
    #[error("{value} at {at}")]
    NotFinite {
        /// NaN or an infinity.
        value: f32,
        /// Where it is.
        at: Position,
    },
    /// A finite number, or the difference of a group's largest and smallest, beyond f16's ±65504; a
    /// number beyond half of that, where tokens that share a group come one by one.
    #[error("{value} at {at} is too large for groups in f16")]
    OutOfRange {
        /// The number, or the difference.
        value: f32,
        /// Where it is.
        at: Position,
    },
    /// A sequence that has not begun, or has been removed.
    #[error("sequence {0} is not known")]
    UnknownSequence(u64),
    /// A pool of fixed capacity has no room. Nothing has changed.
    #[error("the pool is full: {asked} bytes are asked for and {free} are free")]
    PoolFull {
        /// Bytes that the call needs.
        asked: usize,
        /// Bytes that are free.
        free: usize,
    },
    /// A file that cannot be read or written, or does not hold what it should.
    #[cfg(feature = "save")]
    #[error("{}: {reason}", path.display())]
    File {
        /// The file; empty for bytes.
        path: std::path::PathBuf,
        /// Why it cannot be used.
        reason: String,
    },
}

/// Where a number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// In a matrix.
    Matrix {
        /// The row: a token.
        row: usize,
        /// The column: a channel.
        column: usize,
    },
    /// Among the keys, values or queries of some sequences.
    Sequence {
        /// `keys`, `values` or `queries`.
        of: &'static str,
        /// The sequence.
        seq: u64,
        /// The token, counted from the sequence's first one in the call.
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

    /// The error for a number that cannot be packed.
    pub(crate) fn number(value: f32, at: Position) -> Self {
        if value.is_finite() {
            Self::OutOfRange { value, at }
        } else {
            Self::NotFinite { value, at }
        }
    }
}
