//! Arrays of plain numbers that lie in memory of their own or in a mapped file.

use std::fmt;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
#[cfg(feature = "save")]
use bytes::Bytes;

/// A fixed number of plain values. Writing to those of a file copies them first.
#[derive(Clone)]
pub(crate) struct Array<T>(Source<T>);

#[derive(Clone)]
enum Source<T> {
    Owned(Box<[T]>),
    /// Bytes that [`Array::shared`] has found to be whole, aligned values.
    #[cfg(feature = "save")]
    Shared(Bytes),
}

impl<T: Pod> Array<T> {
    pub fn zeroed(len: usize) -> Self {
        Self(Source::Owned(bytemuck::allocation::zeroed_slice_box(len)))
    }

    /// The values in these bytes; `None` if they are no whole, aligned values.
    #[cfg(feature = "save")]
    pub fn shared(bytes: Bytes) -> Option<Self> {
        bytemuck::try_cast_slice::<u8, T>(&bytes).ok()?;
        Some(Self(Source::Shared(bytes)))
    }
}

impl<T: Pod> Deref for Array<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Source::Owned(values) => values,
            #[cfg(feature = "save")]
            Source::Shared(bytes) => bytemuck::cast_slice(bytes),
        }
    }
}

impl<T: Pod> DerefMut for Array<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        #[cfg(feature = "save")]
        if let Source::Shared(_) = self.0 {
            self.0 = Source::Owned((**self).into());
        }
        match &mut self.0 {
            Source::Owned(values) => values,
            #[cfg(feature = "save")]
            Source::Shared(_) => &mut [],
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
