//! Errors of the functions that launch kernels.

use cudarc::driver::DriverError;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a launch, with the expected and the actual value.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument does not fit.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// The argument.
        what: String,
        /// The expected value.
        expected: String,
        /// The actual value.
        got: String,
    },
    /// A shape, format or device that the kernels do not support.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// An error of the CUDA driver.
    #[error("CUDA: {0}")]
    Driver(#[from] DriverError),
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
}
