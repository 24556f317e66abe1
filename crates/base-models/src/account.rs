//! Tracks which tensors of a checkpoint a model has read. An unread tensor could mean that the
//! model computes something else.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;

use longctx_core::{Error, Result};

/// The largest number of names in a message.
const NAMED: usize = 5;

/// The names of tensors that have been read.
#[derive(Debug, Default)]
pub(crate) struct Account {
    used: Mutex<BTreeSet<String>>,
}

impl Account {
    pub fn used(&self, name: &str) {
        self.lock().insert(name.to_owned());
    }

    /// Checks that every tensor has been read. Unread harmless ones are logged.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the unread tensors.
    pub fn close<'a>(
        &self,
        path: &Path,
        names: impl Iterator<Item = &'a str>,
        harmless: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let used = self.lock();
        let rest = names.filter(|name| !used.contains(*name));
        let (harmless, unknown): (Vec<_>, Vec<_>) = rest.partition(|name| harmless(name));
        if !harmless.is_empty() {
            log::info!("{}: tensors without effect: {}", path.display(), list(&harmless));
        }
        if unknown.is_empty() {
            return Ok(());
        }
        let what = format!("tensors that this architecture has no use for: {}", list(&unknown));
        Err(Error::Unsupported(format!("{}: {what}", path.display())))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.used.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn list(names: &[&str]) -> String {
    let mut text = names[..names.len().min(NAMED)].join(", ");
    if names.len() > NAMED {
        text += &format!(" and {} more", names.len() - NAMED);
    }
    text
}
