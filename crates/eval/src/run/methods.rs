//! The registered methods.

use std::collections::BTreeMap;

use super::subject::{Fault, Subject};
use crate::{Error, Result, Setting};

type Open<'a> = Box<dyn Fn(&Setting) -> Result<Box<dyn Subject>, Fault> + 'a>;

/// Functions that open a setting's subject, by the name of the method.
#[derive(Default)]
pub struct Methods<'a> {
    open: BTreeMap<String, Open<'a>>,
}

impl<'a> Methods<'a> {
    /// Registers a function that opens settings of method `name`. It replaces an earlier one of
    /// this name.
    pub fn register(
        &mut self,
        name: impl Into<String>,
        open: impl Fn(&Setting) -> Result<Box<dyn Subject>, Fault> + 'a,
    ) {
        self.open.insert(name.into(), Box::new(open));
    }

    /// Returns the names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.open.keys().map(String::as_str)
    }

    /// Returns whether the setting's method is registered.
    pub fn has(&self, setting: &Setting) -> bool {
        self.open.contains_key(&setting.method)
    }

    /// # Errors
    /// [`Error::NotAvailable`] if the setting's method is not registered.
    pub fn check(&self, setting: &Setting) -> Result<()> {
        self.find(setting).map(drop)
    }

    /// Opens the setting's subject.
    ///
    /// # Errors
    /// As [`check`](Self::check); [`Error::Subject`] if it cannot be opened.
    pub fn open(&self, setting: &Setting) -> Result<Box<dyn Subject>> {
        let what = || format!("opening {}", setting.name);
        self.find(setting)?(setting).map_err(|reason| Error::Subject { what: what(), reason })
    }

    fn find(&self, setting: &Setting) -> Result<&Open<'a>> {
        self.open.get(&setting.method).ok_or_else(|| Error::NotAvailable {
            setting: setting.name.clone(),
            method: setting.method.clone(),
            count: self.open.len(),
            nearest: self.nearest(&setting.method),
        })
    }

    /// Returns the three names most similar to this one.
    fn nearest(&self, method: &str) -> String {
        let mut names: Vec<_> = self.names().collect();
        names.sort_by_cached_key(|name| strsim::damerau_levenshtein(name, method));
        names.truncate(3);
        names.join(", ")
    }
}
