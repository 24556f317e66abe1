//! What the families' configurations have in common.

use longctx_core::{Error, Result};
use serde_json::Value;

/// Refuses a size of zero.
pub fn positive(name: &str, value: usize) -> Result<()> {
    match value {
        0 => Err(Error::setting(name, "at least 1", value)),
        _ => Ok(()),
    }
}

/// One id or a list of them.
pub fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(one) => id(one).into_iter().collect(),
        None => Vec::new(),
    }
}
