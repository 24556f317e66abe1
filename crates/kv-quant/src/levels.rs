//! Quantization levels: the numbers that codes represent, before scaling.

mod lloyd_max;

use crate::{Bits, Codes, Float8, Scheme};

/// The numbers that codes represent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Levels {
    /// Integers from `first` on.
    Integers { first: f32 },
    /// A table of 16 numbers indexed by code. For fewer bits, it repeats.
    Table(&'static [f32; 16]),
    /// 8-bit floating-point numbers.
    Float8(Float8),
}

impl Levels {
    pub fn of(scheme: Scheme) -> Self {
        match scheme.codes {
            Codes::Asymmetric | Codes::Uniform | Codes::VarianceNormalized { .. } => {
                Self::Integers { first: 0.0 }
            }
            Codes::Symmetric => {
                Self::Integers { first: -((1 << (scheme.bits.count() - 1)) as f32) }
            }
            Codes::LloydMax { .. } => Self::Table(match scheme.bits {
                Bits::Two => &TABLE_2,
                Bits::Three => &TABLE_3,
                _ => &lloyd_max::LEVELS_4,
            }),
            Codes::Float8 { kind, .. } => Self::Float8(kind),
        }
    }

    pub fn value(&self, code: u8) -> f32 {
        match self {
            Self::Integers { first } => f32::from(code) + first,
            Self::Table(levels) => levels[usize::from(code) % 16],
            Self::Float8(kind) => float8(*kind, code),
        }
    }
}

/// Returns the bits to keep after a code has been shifted to the upper byte of a word and then
/// arithmetically to the right: its sign, exponent and mantissa at their positions in a 32-bit
/// float.
pub const fn float8_bits(kind: Float8) -> (u32, u32) {
    match kind {
        Float8::E4m3 => (4, 0x87f0_0000),
        Float8::E5m2 => (3, 0x8fe0_0000),
    }
}

/// Returns the factor that corrects the difference of the exponents' biases, also for subnormal
/// numbers.
pub const fn float8_unit(kind: Float8) -> f32 {
    let exponent = match kind {
        Float8::E4m3 => 127 + 120,
        Float8::E5m2 => 127 + 112,
    };
    f32::from_bits(exponent << 23)
}

#[inline(always)]
pub fn float8(kind: Float8, code: u8) -> f32 {
    let (shift, mask) = float8_bits(kind);
    let moved = (u32::from(code) << 24) as i32 >> shift;
    f32::from_bits(moved as u32 & mask) * float8_unit(kind)
}

const TABLE_2: [f32; 16] = repeated(&lloyd_max::LEVELS_2);
const TABLE_3: [f32; 16] = repeated(&lloyd_max::LEVELS_3);

const fn repeated(levels: &[f32]) -> [f32; 16] {
    let mut table = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = levels[i % levels.len()];
        i += 1;
    }
    table
}

/// Returns the Lloyd-Max levels of the standard normal distribution; empty for 8 bits.
pub const fn lloyd_max(bits: Bits) -> &'static [f32] {
    match bits {
        Bits::Two => &lloyd_max::LEVELS_2,
        Bits::Three => &lloyd_max::LEVELS_3,
        Bits::Four => &lloyd_max::LEVELS_4,
        Bits::Eight => &[0.0],
    }
}
