//! The error type of all crates of the workspace that use candle.

use std::path::PathBuf;

use crate::SeqId;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error, with the expected and the actual value and the location.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value does not fit: a shape, a dtype, a length.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// The argument or tensor.
        what: String,
        /// The expected value.
        expected: String,
        /// The actual value.
        got: String,
    },
    /// A setting with an invalid value.
    #[error("setting `{name}`: expected {expected}, got {got}")]
    Setting {
        /// The setting's name.
        name: String,
        /// The valid values.
        expected: String,
        /// The actual value.
        got: String,
    },
    /// NaN or infinity where finite numbers are required.
    #[error("{what}: {value} at {position}")]
    NotFinite {
        /// The array that contains it.
        what: String,
        /// The value: NaN or an infinity.
        value: f32,
        /// The index in the array: "batch 0, kv head 1, token 5, channel 3".
        position: String,
    },
    /// A file that cannot be read or written, or has unexpected contents.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// A pool of fixed capacity has no room. Nothing was appended.
    #[error("{what}: {needed} bytes are needed and {free} are free")]
    PoolFull {
        /// The pool.
        what: String,
        /// Bytes needed by the call.
        needed: usize,
        /// Free bytes.
        free: usize,
    },
    /// A sequence that does not exist or has been removed.
    #[error("sequence {0} is not known")]
    UnknownSequence(SeqId),
    /// A call failed midway and the sequence could not be restored: its layers hold different
    /// tokens, or a layer has lost entries. Every call with the sequence returns this error until
    /// the sequence is removed.
    #[error("sequence {seq} cannot be used after a failed call: {reason}")]
    Poisoned {
        /// The sequence.
        seq: SeqId,
        /// The error of the failed call.
        reason: String,
    },
    /// Something that this build or model does not support.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A tokenizer failed on a text or on token ids.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template cannot be compiled or rendered.
    #[error("chat template: {0}")]
    Template(String),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// Creates an [`Error::Mismatch`] from printable values.
    pub fn mismatch(
        what: impl Into<String>,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Mismatch { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// Creates an [`Error::Setting`] from printable values.
    pub fn setting(
        name: impl Into<String>,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Setting { name: name.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// Creates an [`Error::Tokenizer`] from a printable reason.
    pub fn tokenizer(reason: impl std::fmt::Display) -> Self {
        Self::Tokenizer(reason.to_string())
    }

    /// Creates an [`Error::Template`] from a printable reason.
    pub fn template(reason: impl std::fmt::Display) -> Self {
        Self::Template(reason.to_string())
    }

    /// Creates an [`Error::File`] from a path and a printable reason.
    pub fn file(path: impl Into<PathBuf>, reason: impl std::fmt::Display) -> Self {
        Self::File { path: path.into(), reason: reason.to_string() }
    }
}

#[cfg(feature = "cuda")]
impl From<longctx_cuda::cudarc::driver::DriverError> for Error {
    fn from(error: longctx_cuda::cudarc::driver::DriverError) -> Self {
        Self::Candle(candle_core::Error::wrap(error))
    }
}

#[cfg(feature = "cuda")]
impl From<longctx_cuda::Error> for Error {
    fn from(error: longctx_cuda::Error) -> Self {
        use longctx_cuda::Error as E;
        match error {
            E::Mismatch { what, expected, got } => Self::Mismatch { what, expected, got },
            E::Unsupported(what) => Self::Unsupported(what),
            E::Driver(error) => error.into(),
            other => Self::Candle(candle_core::Error::wrap(other)),
        }
    }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}
