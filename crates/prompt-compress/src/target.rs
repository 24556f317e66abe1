//! Compression targets.

use longctx_core::Rate;

/// A compression target, in the tokens that the compressor counts.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Target {
    /// A share of the tokens.
    Rate(Rate),
    /// This number of tokens of all contexts together.
    Tokens(usize),
}
