//! The tensors of a checkpoint that a loader has read.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use longctx_core::{Error, Result};

/// The largest number of names in a message.
const MAX_NAMES: usize = 8;

/// The names of the tensors that a loader has read.
///
/// An unread tensor may be a part of the model that is not computed: biases, adapters, scales of
/// quantized weights. A checkpoint that has one is refused, unless the name is known to have no
/// effect.
#[derive(Debug, Default)]
pub struct ReadTensors(Mutex<BTreeSet<String>>);

impl ReadTensors {
    /// Adds a name.
    pub fn insert(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    /// Checks that all tensors of the file at `path` have been read. Unread ones without effect are
    /// logged.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming unread tensors that may have an effect.
    pub fn check_all_read<'a>(
        &self,
        path: &Path,
        all: impl IntoIterator<Item = &'a str>,
        without_effect: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let read = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let unread: BTreeSet<&str> = all.into_iter().filter(|name| !read.contains(*name)).collect();
        let (known, unknown): (Vec<&str>, Vec<&str>) =
            unread.into_iter().partition(|name| without_effect(name));
        if !known.is_empty() {
            log::info!("{}: tensors without effect: {}", path.display(), list(&known));
        }
        match unknown.is_empty() {
            true => Ok(()),
            false => {
                let what = format!("tensors that this model does not read: {}", list(&unknown));
                Err(Error::Unsupported(format!("{}: {what}", path.display())))
            }
        }
    }
}

fn list(names: &[&str]) -> String {
    let listed = names.iter().take(MAX_NAMES).map(|name| format!("{name:?}"));
    let mut text = listed.collect::<Vec<_>>().join(", ");
    if names.len() > MAX_NAMES {
        text += &format!(" and {} more", names.len() - MAX_NAMES);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unread_tensors_are_named() {
        let read = ReadTensors::default();
        read.insert("a.weight");
        let all = ["a.weight", "a.bias", "rotary.inv_freq"];
        let check = || {
            let without_effect = |name: &str| name.ends_with("inv_freq");
            read.check_all_read(Path::new("model"), all, without_effect)
        };
        let error = check().unwrap_err().to_string();
        assert!(error.contains("\"a.bias\"") && !error.contains("inv_freq"), "{error}");
        read.insert("a.bias");
        assert!(check().is_ok());
    }
}
