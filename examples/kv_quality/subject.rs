//! What a row of the tables measures.

use anyhow::Result;
use longctx_core::{KvCache, LayerSpec};
use longctx_examples::methods::Method;

use crate::turboquant_keys::Keys;

/// A cache method, or keys that only this program measures.
#[derive(Debug, Clone)]
pub enum Subject {
    Method(Method),
    Keys(Keys),
}

impl Subject {
    /// Returns the subject with a name.
    ///
    /// # Errors
    /// As [`Method::named`].
    pub fn named(name: &str) -> Result<Self> {
        match Keys::all().find(|keys| keys.name == name) {
            Some(keys) => Ok(Self::Keys(keys)),
            None => Ok(Self::Method(Method::named(name)?)),
        }
    }

    pub fn name(&self) -> &str {
        match self {
            Self::Method(method) => method.name(),
            Self::Keys(keys) => keys.name,
        }
    }

    /// Creates a layer's cache.
    ///
    /// # Errors
    /// If the subject does not support the layer.
    pub fn cache(&self, spec: &LayerSpec) -> longctx_core::Result<Box<dyn KvCache>> {
        match self {
            Self::Method(method) => method.cache(spec),
            Self::Keys(keys) => keys.cache(spec),
        }
    }
}
