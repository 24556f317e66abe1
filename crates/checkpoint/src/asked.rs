//! The tensors that a loader has read.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use longctx_core::{Error, Result};

/// The largest number of names in an error.
const LISTED: usize = 8;

/// The names of the tensors that a loader has read.
///
/// An unread tensor is a part of the model that is not computed, such as a bias, an adapter or a
/// scale of quantized weights. A checkpoint with unread tensors is an error, unless they are known
/// to have no effect.
#[derive(Debug, Default)]
pub struct Asked(Mutex<BTreeSet<String>>);

impl Asked {
    /// Records that `name` has been read.
    pub fn note(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    /// Compares with `all`, the tensors of the file at `path`. Returns the unread ones, all of
    /// which are harmless.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the unread tensors that are not harmless.
    pub fn account<'a>(
        &self,
        path: &Path,
        all: impl IntoIterator<Item = &'a str>,
        harmless: impl Fn(&str) -> bool,
    ) -> Result<Vec<String>> {
        let asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let unread: BTreeSet<&str> =
            all.into_iter().filter(|name| !asked.contains(*name)).collect();
        let (known, unknown): (Vec<&str>, Vec<&str>) =
            unread.into_iter().partition(|name| harmless(name));
        if unknown.is_empty() {
            return Ok(known.into_iter().map(str::to_owned).collect());
        }
        let listed = unknown.iter().take(LISTED).map(|name| format!("{name:?}"));
        let mut names = listed.collect::<Vec<_>>().join(", ");
        if unknown.len() > LISTED {
            names += &format!(" and {} more", unknown.len() - LISTED);
        }
        let path = path.display();
        Err(Error::Unsupported(format!("{path}: tensors that this model does not read: {names}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_nobody_asked_for_are_named() {
        let asked = Asked::default();
        asked.note("a.weight");
        let all = ["a.weight", "a.bias", "rotary.inv_freq"];
        let account = |harmless: &str| {
            let harmless = harmless.to_owned();
            asked.account(Path::new("model"), all, move |name| name.ends_with(&harmless))
        };
        let error = account("inv_freq").unwrap_err().to_string();
        assert!(error.contains("\"a.bias\"") && !error.contains("inv_freq"), "{error}");
        asked.note("a.bias");
        assert_eq!(account("inv_freq").unwrap(), ["rotary.inv_freq"]);
    }
}
