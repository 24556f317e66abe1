//! Keys and values of all kv heads of a sequence in one tensor each, with spare capacity. Devices
//! other than the CPU use it.

use std::ops::Range;

use crate::{Error, Footprint, Result};
use candle_core::Tensor;

/// The smallest spare capacity, in entries, when a tensor grows. Growth copies everything.
const MIN_SPARE: usize = 256;

/// Keys and values `[1, kv_heads, capacity, channels]`. The first `len` entries are in use.
#[derive(Debug)]
pub struct GrowingTensors {
    k: Tensor,
    v: Tensor,
    len: usize,
}

impl GrowingTensors {
    /// Creates empty rows for tensors like `k` and `v`.
    pub fn new(k: &Tensor, v: &Tensor) -> Result<Self> {
        Ok(Self { k: k.narrow(2, 0, 0)?, v: v.narrow(2, 0, 0)?, len: 0 })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Appends `k` and `v`, contiguous and in the store's dtype.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let len = self.len + k.dim(2)?;
        if len == self.len {
            return Ok(());
        }
        if len > self.k.dim(2)? {
            // Grows by a sixteenth, so that all copies during a generation together cost as much as
            // reading the cache about 16 times.
            let capacity = len + MIN_SPARE.max(self.len / 16);
            let (k, v) = (self.grown(&self.k, capacity)?, self.grown(&self.v, capacity)?);
            (self.k, self.v) = (k, v);
        }
        self.k.slice_set(k, 2, self.len)?;
        self.v.slice_set(v, 2, self.len)?;
        self.len = len;
        Ok(())
    }

    fn grown(&self, x: &Tensor, capacity: usize) -> Result<Tensor> {
        let (batch, heads, _, d) = x.dims4()?;
        let more = Tensor::zeros((batch, heads, capacity, d), x.dtype(), x.device())?;
        if self.len > 0 {
            more.slice_set(&x.narrow(2, 0, self.len)?.contiguous()?, 2, 0)?;
        }
        Ok(more)
    }

    /// Keeps the selected entries. Every head must keep the same number.
    pub fn retain(&mut self, keep: &[Vec<u32>]) -> Result<()> {
        let (k, v) = self.held()?;
        let (k, v) = (gather(&k, keep)?, gather(&v, keep)?);
        self.len = k.dim(2)?;
        (self.k, self.v) = (k, v);
        Ok(())
    }

    pub fn truncate(&mut self, len: usize) {
        self.len = len.min(self.len);
    }

    /// Returns a copy without spare capacity.
    pub fn copy(&self) -> Result<Self> {
        let (k, v) = self.held()?;
        Ok(Self { k: k.force_contiguous()?, v: v.force_contiguous()?, len: self.len })
    }

    /// Returns a view of the entries, `[1, kv_heads, len, channels]`.
    pub fn held(&self) -> Result<(Tensor, Tensor)> {
        Ok((self.k.narrow(2, 0, self.len)?, self.v.narrow(2, 0, self.len)?))
    }

    /// Returns the entries within each head's ranges.
    pub fn selected(&self, ranges: &[Vec<Range<usize>>]) -> Result<(Tensor, Tensor)> {
        let entries = |ranges: &Vec<Range<usize>>| -> Vec<u32> {
            ranges.iter().cloned().flatten().map(|entry| entry as u32).collect()
        };
        let lists: Vec<_> = ranges.iter().map(entries).collect();
        let (k, v) = self.held()?;
        Ok((gather(&k, &lists)?, gather(&v, &lists)?))
    }

    pub fn footprint(&self) -> Footprint {
        let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
        let held = |x: &Tensor| bytes(x) / x.dims()[2].max(1) * self.len;
        let payload = held(&self.k) + held(&self.v);
        let slack = bytes(&self.k) + bytes(&self.v) - payload;
        Footprint { payload, slack, ..Default::default() }
    }
}

/// Gathers the listed entries of each head of `[1, kv_heads, entries, channels]`. The lists have
/// equal lengths.
pub fn gather(x: &Tensor, lists: &[Vec<u32>]) -> Result<Tensor> {
    let (_, kv_heads, len, d) = x.dims4()?;
    let count = lists[0].len();
    if lists.iter().any(|list| list.len() != count) {
        let what = "heads that keep different numbers of entries in a dense store off the CPU";
        return Err(Error::Unsupported(what.into()));
    }
    let rows: Vec<u32> = (0..)
        .zip(lists)
        .flat_map(|(head, list)| list.iter().map(move |entry| head * len as u32 + entry))
        .collect();
    let rows = Tensor::new(rows, x.device())?;
    let flat = x.contiguous()?.reshape((kv_heads * len, d))?;
    Ok(flat.index_select(&rows, 0)?.reshape((1, kv_heads, count, d))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn appended_entries_are_held() {
        let all = Tensor::randn(0f32, 1., (1, 3, 900, 8), &Device::Cpu).unwrap();
        let all = all.to_dtype(DType::F16).unwrap();
        let part = |from, len| all.narrow(2, from, len).unwrap().contiguous().unwrap();
        let mut rows = GrowingTensors::new(&all, &all).unwrap();
        for (from, len) in [(0, 300), (300, 0), (300, 1), (301, 256), (557, 343)] {
            rows.append(&part(from, len), &part(from, len)).unwrap();
            let expected = part(0, from + len);
            for held in [rows.held().unwrap().0, rows.held().unwrap().1] {
                let same = held.eq(&expected).unwrap().min_all().unwrap();
                assert_eq!(same.to_scalar::<u8>().unwrap(), 1);
            }
            assert_eq!(rows.footprint().payload, 2 * (from + len) * 3 * 8 * 2);
        }
    }
}
