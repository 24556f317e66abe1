//! Fields of a JSON object with Python's leniency: null means absent, and 2048.0 is an integer.

use std::path::Path;

use longctx_core::{Error, Result};
use serde_json::{Map, Value};

/// A JSON object in a file.
pub(crate) struct Fields<'a> {
    path: &'a Path,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub fn new(path: &'a Path, value: &'a Value) -> Result<Self> {
        let object = value.as_object();
        let object = object.ok_or_else(|| Error::file(path, "this is no JSON object"))?;
        Ok(Self { path, object })
    }

    pub fn is_empty(&self) -> bool {
        self.object.is_empty()
    }

    /// Returns whether the field exists, even if it is null.
    pub fn has(&self, name: &str) -> bool {
        self.object.contains_key(name)
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn expect<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let bad = || Error::file(self.path, format!("{name:?}: expected {expected}, got {value}"));
        read(value).map(Some).ok_or_else(bad)
    }

    /// Returns a non-negative integer.
    pub fn number(&self, name: &str) -> Result<Option<usize>> {
        self.expect(name, "a whole number", |value| {
            let whole = |x: &f64| x.fract() == 0.0 && (0.0..9e15).contains(x);
            let number = value.as_u64().or_else(|| value.as_f64().filter(whole).map(|x| x as u64));
            usize::try_from(number?).ok()
        })
    }

    /// Returns a non-negative integer under either of two names.
    pub fn either_number(&self, name: &str, other: &str) -> Result<Option<usize>> {
        Ok(match self.number(name)? {
            Some(number) => Some(number),
            None => self.number(other)?,
        })
    }

    /// Returns non-negative integers.
    pub fn numbers(&self, name: &str) -> Result<Option<Vec<usize>>> {
        self.expect(name, "a list of whole numbers", |value| {
            let number = |value: &Value| usize::try_from(value.as_u64()?).ok();
            value.as_array()?.iter().map(number).collect()
        })
    }

    pub fn floats(&self, name: &str) -> Result<Option<Vec<f64>>> {
        self.expect(name, "a list of numbers", |value| {
            value.as_array()?.iter().map(Value::as_f64).collect()
        })
    }

    pub fn float(&self, name: &str) -> Result<Option<f64>> {
        self.expect(name, "a number", Value::as_f64)
    }

    pub fn switch(&self, name: &str) -> Result<Option<bool>> {
        self.expect(name, "true or false", Value::as_bool)
    }

    pub fn text(&self, name: &str) -> Result<Option<&'a str>> {
        self.expect(name, "a text", Value::as_str)
    }

    pub fn texts(&self, name: &str) -> Result<Option<Vec<&'a str>>> {
        self.expect(name, "a list of texts", |value| {
            value.as_array()?.iter().map(Value::as_str).collect()
        })
    }

    pub fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>> {
        self.expect(name, "an object", Value::as_object)
    }

    pub fn fields(&self, name: &str) -> Result<Option<Fields<'a>>> {
        Ok(self.object(name)?.map(|object| Fields { path: self.path, object }))
    }

    /// Returns one token id or a list of them. Values that are not ids, such as -1, are skipped.
    pub fn ids(&self, name: &str) -> Vec<u32> {
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        match self.get(name) {
            Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
            Some(one) => id(one).into_iter().collect(),
            None => Vec::new(),
        }
    }

    /// Returns a token, given as a string or as an object with its content.
    pub fn token(&self, name: &str) -> Option<String> {
        let value = self.get(name)?;
        value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
    }

    pub fn error(&self, name: &str, reason: impl std::fmt::Display) -> Error {
        Error::file(self.path, format!("{name:?}: {reason}"))
    }

    pub fn missing(&self, name: &str) -> Error {
        Error::file(self.path, format!("missing field `{name}`"))
    }
}
