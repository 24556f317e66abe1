//! Packed pools on candle tensors, with longctx-core's traits.

mod cache;
#[cfg(feature = "cuda")]
mod cuda;
mod dequant;
#[cfg(feature = "save")]
mod file;
mod store;
mod sub_batch;

pub use cache::{Order, QuantCache};
pub use dequant::DequantCache;
#[cfg(feature = "save")]
pub use file::{load_caches, save_caches};
pub use store::QuantStore;

impl From<crate::Error> for longctx_core::Error {
    fn from(error: crate::Error) -> Self {
        use crate::Error as E;
        match error {
            E::Setting { name, expected, got } => {
                Self::Setting { name: name.into(), expected, got }
            }
            E::Mismatch { what, expected, got } => {
                Self::Mismatch { what: what.into(), expected, got }
            }
            E::NotFinite { value, at } => Self::NotFinite {
                what: "numbers to quantize".into(),
                value,
                position: at.to_string(),
            },
            E::OutOfRange { value, at } => Self::Mismatch {
                what: format!("number to quantize at {at}"),
                expected: "one within ±32752, half of f16's range".into(),
                got: value.to_string(),
            },
            E::UnknownSequence(seq) => Self::UnknownSequence(seq),
            E::PoolFull { needed, free } => {
                Self::PoolFull { what: "pool of packed blocks".into(), needed, free }
            }
            #[cfg(feature = "save")]
            E::File { path, reason } => Self::File { path, reason },
        }
    }
}

impl From<crate::Error> for candle_core::Error {
    fn from(error: crate::Error) -> Self {
        longctx_core::Error::from(error).into()
    }
}
