//! Keys and values of each kv head in a row, of which any part can be attended to.

use candle_core::Tensor;
use longctx_core::attention::{Element, Page, with_slice};
use longctx_core::{Footprint, Result};
use std::ops::Range;

/// Keys and values of `[batch * kv_heads]` heads, `[entries, head_dim]` each; all heads hold equally many.
#[derive(Debug, Clone)]
pub struct Rows<T> {
    head_dim: usize,
    keys: Vec<Vec<T>>,
    values: Vec<Vec<T>>,
}

impl<T: Element> Rows<T> {
    pub fn new(heads: usize, head_dim: usize) -> Self {
        Self { head_dim, keys: vec![Vec::new(); heads], values: vec![Vec::new(); heads] }
    }

    pub fn heads(&self) -> usize {
        self.keys.len()
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    pub fn len(&self) -> usize {
        self.keys.first().map_or(0, |keys| keys.len() / self.head_dim)
    }

    /// Appends `[batch, kv_heads, tokens, head_dim]`.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        extend(&mut self.keys, k)?;
        extend(&mut self.values, v)
    }

    /// Moves the first `count` entries out.
    pub fn take_front(&mut self, count: usize) -> Self {
        let numbers = count * self.head_dim;
        let front = |heads: &mut [Vec<T>]| -> Vec<Vec<T>> {
            heads.iter_mut().map(|head| head.drain(..numbers).collect()).collect()
        };
        Self {
            head_dim: self.head_dim,
            keys: front(&mut self.keys),
            values: front(&mut self.values),
        }
    }

    /// Gives back what is allocated beyond the entries.
    pub fn shrink(&mut self) {
        self.keys.iter_mut().chain(&mut self.values).for_each(Vec::shrink_to_fit);
    }

    /// Moves the first `count` heads out.
    pub fn take_heads(&mut self, count: usize) -> Self {
        Self {
            head_dim: self.head_dim,
            keys: self.keys.drain(..count).collect(),
            values: self.values.drain(..count).collect(),
        }
    }

    /// Moves all entries of `other` to the end.
    pub fn join(&mut self, other: Self) {
        let join = |to: &mut [Vec<T>], from: Vec<Vec<T>>| {
            to.iter_mut().zip(from).for_each(|(to, from)| to.extend(from));
        };
        join(&mut self.keys, other.keys);
        join(&mut self.values, other.values);
    }

    /// A range of one head's entries.
    pub fn page(&self, head: usize, entries: Range<usize>) -> Page<'_, T> {
        let numbers = entries.start * self.head_dim..entries.end * self.head_dim;
        Page { keys: &self.keys[head][numbers.clone()], values: &self.values[head][numbers] }
    }

    /// All entries of one head.
    pub fn whole(&self, head: usize) -> Page<'_, T> {
        self.page(head, 0..self.len())
    }

    pub fn footprint(&self) -> Footprint {
        let all = || self.keys.iter().chain(&self.values);
        let payload = all().map(Vec::len).sum::<usize>() * size_of::<T>();
        let allocated = all().map(Vec::capacity).sum::<usize>() * size_of::<T>();
        Footprint { payload, slack: allocated - payload, ..Default::default() }
    }
}

fn extend<T: Element>(heads: &mut [Vec<T>], x: &Tensor) -> Result<()> {
    let x = x.to_dtype(T::DTYPE)?.contiguous()?;
    let size = (x.elem_count() / heads.len()).max(1);
    with_slice::<T, _>(&x, |x| {
        heads.iter_mut().zip(x.chunks(size)).for_each(|(head, x)| head.extend_from_slice(x));
        Ok(())
    })
}
