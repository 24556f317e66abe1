//! The one error type of the workspace's candle-facing crates.

use std::path::PathBuf;

use crate::SeqId;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong: what was expected, what came, and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value does not fit the place that it was given to: a shape, a dtype, a length.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// The place: an argument, a tensor's name.
        what: String,
        /// What fits there.
        expected: String,
        /// What came.
        got: String,
    },
    /// A setting that no cache, policy or model can work with.
    #[error("setting `{name}`: expected {expected}, got {got}")]
    Setting {
        /// The setting's name.
        name: String,
        /// The values that work.
        expected: String,
        /// The value given.
        got: String,
    },
    /// NaN or infinity where only finite numbers make sense.
    #[error("{what}: {value} at {position}")]
    NotFinite {
        /// The array that holds it.
        what: String,
        /// The value: NaN or an infinity.
        value: f32,
        /// Where in the array: "batch 0, kv head 1, token 5, channel 3".
        position: String,
    },
    /// A file that can't be read or written, or does not hold what its name promises.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why it can't be used.
        reason: String,
    },
    /// A pool of fixed capacity has no room. Nothing was appended.
    #[error("{what}: {asked} bytes are asked for and {free} are free")]
    PoolFull {
        /// The pool.
        what: String,
        /// Bytes that the call needs.
        asked: usize,
        /// Bytes that are free.
        free: usize,
    },
    /// A sequence that has not begun, or has been removed.
    #[error("sequence {0} is not known")]
    UnknownSequence(SeqId),
    /// A sequence whose layers saw different tokens, since a call failed midway. It answers nothing
    /// until it is removed.
    #[error("sequence {seq} can't go on since a call failed: {reason}")]
    Poisoned {
        /// The sequence.
        seq: SeqId,
        /// The error of that call.
        reason: String,
    },
    /// Something that this build or this model does not do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// An [`Error::Mismatch`] from anything printable.
    pub fn mismatch(
        what: impl Into<String>,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Mismatch { what: what.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// An [`Error::Setting`] from anything printable.
    pub fn setting(
        name: impl Into<String>,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Setting { name: name.into(), expected: expected.to_string(), got: got.to_string() }
    }

    /// An [`Error::File`] from a path and anything printable.
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

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}
