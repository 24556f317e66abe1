//! Bytes held, by purpose.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

/// The bytes that a cache, a store or a recurrent state holds, counted and not estimated.
///
/// Every compression ratio in the project is a ratio of two [`Footprint::total`]s.
///
/// ```
/// use longctx_core::Footprint;
///
/// let dense = Footprint { payload: 4096, ..Default::default() };
/// let packed = Footprint { payload: 1024, scales: 256, residual: 256, ..Default::default() };
/// assert_eq!(packed.total(), 1536);
/// assert!((dense.total() as f64 / packed.total() as f64 - 2.667).abs() < 1e-3);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Keys and values in the store's own format, full precision or packed codes; the state of a
    /// recurrent model.
    pub payload: usize,
    /// Scales and zero points of packed codes.
    pub scales: usize,
    /// The newest tokens, kept in full precision beside packed ones (the residual).
    pub residual: usize,
    /// A policy's metadata: scores, positions, masks, representative tokens.
    pub bookkeeping: usize,
    /// Memory allocated for future tokens.
    pub slack: usize,
}

impl Footprint {
    /// Returns the sum of all fields.
    pub fn total(&self) -> usize {
        self.payload + self.scales + self.residual + self.bookkeeping + self.slack
    }
}

impl Add for Footprint {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            payload: self.payload + other.payload,
            scales: self.scales + other.scales,
            residual: self.residual + other.residual,
            bookkeeping: self.bookkeeping + other.bookkeeping,
            slack: self.slack + other.slack,
        }
    }
}

impl AddAssign for Footprint {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Footprint {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} B (payload {}, scales {}, residual {}, bookkeeping {}, slack {})",
            self.total(),
            self.payload,
            self.scales,
            self.residual,
            self.bookkeeping,
            self.slack
        )
    }
}
