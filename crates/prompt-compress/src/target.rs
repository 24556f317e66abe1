//! How much of a prompt stays.

use longctx_core::Rate;

/// How much stays, in the tokens that the compressor counts in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// A share of the tokens.
    Rate(Rate),
    /// So many tokens of all contexts together.
    Tokens(usize),
}
