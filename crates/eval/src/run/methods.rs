//! The registered methods.

use std::collections::BTreeMap;
use std::ops::Range;

use super::subject::{Subject, SubjectError};
use crate::{Error, Result, Setting};

type Open<'a> = Box<dyn Fn(&Setting) -> Result<Box<dyn Subject>, SubjectError> + 'a>;

type OpenShared<'a> = Box<dyn Fn(&[Setting]) -> Result<Box<dyn Subject>, SubjectError> + 'a>;

/// How to open one subject for several settings.
struct Shared<'a> {
    fits: Box<dyn Fn(&Setting) -> bool + 'a>,
    open: OpenShared<'a>,
}

/// Functions that open a setting's subject, by the name of the method.
#[derive(Default)]
pub struct Methods<'a> {
    open: BTreeMap<String, Open<'a>>,
    shared: Option<Shared<'a>>,
}

impl<'a> Methods<'a> {
    /// Registers a function that opens settings of method `name`. It replaces an earlier one of
    /// this name.
    pub fn register(
        &mut self,
        name: impl Into<String>,
        open: impl Fn(&Setting) -> Result<Box<dyn Subject>, SubjectError> + 'a,
    ) {
        self.open.insert(name.into(), Box::new(open));
    }

    /// Registers a function that opens one subject for several settings, which computes the prefill
    /// of each prompt once. A run uses it for consecutive settings that `fits` accepts and that
    /// have the same model, context and template.
    ///
    /// The subject must give the same answers as those of the single settings. It gets the setting
    /// of each sample as [`Question::setting`](super::Question::setting).
    pub fn share_prefill(
        &mut self,
        fits: impl Fn(&Setting) -> bool + 'a,
        open: impl Fn(&[Setting]) -> Result<Box<dyn Subject>, SubjectError> + 'a,
    ) {
        self.shared = Some(Shared { fits: Box::new(fits), open: Box::new(open) });
    }

    /// Returns the ranges of settings that are opened together.
    pub(super) fn groups(&self, settings: &[Setting]) -> Vec<Range<usize>> {
        let mut start = 0;
        let group = |group: &[Setting]| {
            start += group.len();
            start - group.len()..start
        };
        settings.chunk_by(|a, b| self.share(a, b)).map(group).collect()
    }

    fn share(&self, a: &Setting, b: &Setting) -> bool {
        let context = |setting: &Setting| (setting.model.clone(), setting.context);
        let Some(shared) = &self.shared else { return false };
        let same = context(a) == context(b) && a.template == b.template;
        same && (shared.fits)(a) && (shared.fits)(b)
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
        self.open_group(std::slice::from_ref(setting))
    }

    /// Opens the subject of a group of settings.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub(super) fn open_group(&self, group: &[Setting]) -> Result<Box<dyn Subject>> {
        let opened = match (group, &self.shared) {
            ([setting], _) => self.find(setting)?(setting),
            (_, Some(shared)) => (shared.open)(group),
            (_, None) => Err("no function that opens several settings together".into()),
        };
        let names: Vec<_> = group.iter().map(|setting| setting.name.as_str()).collect();
        let what = || format!("opening {}", names.join(", "));
        opened.map_err(|reason| Error::Subject { what: what(), reason })
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
