//! The packed heads behind longctx-core's traits, on candle tensors.

mod cache;
mod dequant;
#[cfg(feature = "save")]
mod file;
#[cfg(feature = "cuda")]
mod on_device;
mod store;

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
            E::NotFinite { value, row, column } => Self::NotFinite {
                what: "keys or values to quantize".into(),
                value,
                position: format!("token {row}, channel {column}"),
            },
            E::OutOfRange { value, row, column } => Self::Mismatch {
                what: format!("token {row}, channel {column} of keys or values to quantize"),
                expected: "a number within ±32752, half of f16's range".into(),
                got: value.to_string(),
            },
            #[cfg(feature = "save")]
            E::File { path, reason } => Self::File { path, reason },
        }
    }
}
