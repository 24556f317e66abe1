//! Helpers for the configurations of all families.

use longctx_core::{Error, Result};
use serde_json::Value;

/// The largest size of a model's dimension: the product of two sizes fits in 64 bits.
const LARGEST: usize = 1 << 24;

/// Refuses a size of zero or above [`LARGEST`].
pub fn size(name: &str, value: usize) -> Result<()> {
    match value {
        1..=LARGEST => Ok(()),
        _ => Err(Error::setting(name, format!("1 to {LARGEST}"), value)),
    }
}

/// Returns one id or a list of ids.
pub fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}
