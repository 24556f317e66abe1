//! Stores for policies, by name.

use clap::{ValueEnum, builder::PossibleValue};
use kv_quant::{Bits, Float8, Format, TurboQuant};

/// A store's format. KIVI's formats have groups of 32 and keep the values of at least the newest
/// 128 tokens in full precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// Dense f16.
    F16,
    /// KIVI with 8 bits.
    Kivi8,
    /// KIVI with 4 bits.
    Kivi4,
    /// KIVI with 2 bits.
    Kivi2,
    /// KIVI with 4 bits, with the keys of the newest tokens in full precision too.
    Kivi4Rolling,
    /// The same with 2 bits.
    Kivi2Rolling,
    /// fp8 e4m3 with a scale per token.
    Fp8,
    /// 4-bit integers with a scale per token, rotated.
    Int4Rotated,
    /// TurboQuant's preset 4bit_nc of vLLM.
    TurboQuant4BitNc,
}

impl Store {
    /// Returns the name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Kivi8 => "kivi-8",
            Self::Kivi4 => "kivi-4",
            Self::Kivi2 => "kivi-2",
            Self::Kivi4Rolling => "kivi-4-rolling",
            Self::Kivi2Rolling => "kivi-2-rolling",
            Self::Fp8 => "fp8",
            Self::Int4Rotated => "int4-rotated",
            Self::TurboQuant4BitNc => "turboquant-4bit-nc",
        }
    }

    /// Returns the packed format; `None` for dense f16.
    ///
    /// # Errors
    /// Never for these sizes.
    pub fn format(self) -> kv_quant::Result<Option<Format>> {
        let kivi = |bits| Format::kivi(bits, bits, 32, 128).map(Some);
        let rolling = |bits| Format::kivi_rolling(bits, bits, 32, 128).map(Some);
        match self {
            Self::F16 => Ok(None),
            Self::Kivi8 => kivi(Bits::Eight),
            Self::Kivi4 => kivi(Bits::Four),
            Self::Kivi2 => kivi(Bits::Two),
            Self::Kivi4Rolling => rolling(Bits::Four),
            Self::Kivi2Rolling => rolling(Bits::Two),
            Self::Fp8 => Ok(Some(Format::float8(Float8::E4m3))),
            Self::Int4Rotated => Ok(Some(Format::rotated_symmetric(Bits::Four, Bits::Four))),
            Self::TurboQuant4BitNc => Ok(Some(Format::turboquant(TurboQuant::FourBitNc))),
        }
    }
}

impl ValueEnum for Store {
    fn value_variants<'a>() -> &'a [Self] {
        use Store::*;
        &[F16, Kivi8, Kivi4, Kivi2, Kivi4Rolling, Kivi2Rolling, Fp8, Int4Rotated, TurboQuant4BitNc]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}
