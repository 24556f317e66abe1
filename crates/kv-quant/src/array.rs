//! Arrays of plain numbers.

use std::fmt;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;

/// A fixed number of plain values.
#[derive(Clone)]
pub(crate) struct Array<T>(Source<T>);

#[derive(Clone)]
enum Source<T> {
    Owned(Box<[T]>),
}

impl<T: Pod> Array<T> {
    pub fn zeroed(len: usize) -> Self {
        Self(Source::Owned(bytemuck::allocation::zeroed_slice_box(len)))
    }
}

impl<T: Pod> Deref for Array<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Source::Owned(values) => values,
        }
    }
}

impl<T: Pod> DerefMut for Array<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match &mut self.0 {
            Source::Owned(values) => values,
        }
    }
}

impl<T: Pod + PartialEq> PartialEq for Array<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for Array<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
