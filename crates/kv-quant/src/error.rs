//! The error type of the slice API, free of candle.

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
    /// A slice's length or a count does not fit.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// The argument.
        what: &'static str,
        /// What fits there.
        expected: String,
        /// What came.
        got: String,
    },
    /// NaN or infinity in what is to be quantized.
    #[error("{value} at row {row}, column {column}")]
    NotFinite {
        /// NaN or an infinity.
        value: f32,
        /// The token.
        row: usize,
        /// The channel.
        column: usize,
    },
    /// A finite number, or the difference of a group's largest and smallest, beyond f16's ±65504; a number beyond half of that, where
    /// tokens that share a group come one by one.
    #[error("{value} at row {row}, column {column} is too large for groups in f16")]
    OutOfRange {
        /// The number, or the difference.
        value: f32,
        /// The token.
        row: usize,
        /// The channel.
        column: usize,
    },
    /// A file that can't be read or written, or does not hold what it should.
    #[cfg(feature = "save")]
    #[error("{}: {reason}", path.display())]
    File {
        /// The file; empty for bytes.
        path: std::path::PathBuf,
        /// Why it can't be used.
        reason: String,
    },
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
}
