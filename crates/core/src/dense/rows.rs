//! Keys and values of all kv heads in one tensor each, with room to grow: how devices other than the CPU hold them.

use crate::Result;
use candle_core::Tensor;

/// Room for so many entries more than are needed, at least, whenever there has to be more: growing copies everything.
const ROOM: usize = 256;

/// Keys and values `[batch, kv_heads, capacity, head_dim]`, of which the first `len` entries are held.
#[derive(Debug)]
pub struct Rows {
    k: Tensor,
    v: Tensor,
    len: usize,
}

impl Rows {
    /// Nothing, for tensors like `k`.
    pub fn new(k: &Tensor) -> Result<Self> {
        let none = k.narrow(2, 0, 0)?;
        Ok(Self { k: none.clone(), v: none, len: 0 })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// `k` and `v` are contiguous and of the dtype that is held.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let len = self.len + k.dim(2)?;
        if len == self.len {
            return Ok(());
        }
        if len > self.k.dim(2)? {
            // A sixteenth more: the copies of a whole generation cost as much as reading the cache some sixteen times.
            let capacity = len + ROOM.max(self.len / 16);
            self.k = self.grown(&self.k, capacity)?;
            self.v = self.grown(&self.v, capacity)?;
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

    /// Puts others in the place of all that is held.
    pub fn replace(&mut self, k: Tensor, v: Tensor) -> Result<()> {
        self.len = k.dim(2)?;
        (self.k, self.v) = (k, v);
        Ok(())
    }

    /// What is held, `[batch, kv_heads, len, head_dim]`, as a view.
    pub fn held(&self) -> Result<(Tensor, Tensor)> {
        Ok((self.k.narrow(2, 0, self.len)?, self.v.narrow(2, 0, self.len)?))
    }

    /// Bytes that hold entries, and bytes allocated beyond them.
    pub fn bytes(&self) -> (usize, usize) {
        let bytes = 2 * self.k.elem_count() * self.k.dtype().size_in_bytes();
        let held = bytes / self.k.dims()[2].max(1) * self.len;
        (held, bytes - held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn what_was_appended_is_held() {
        let all = Tensor::randn(0f32, 1., (2, 3, 900, 8), &Device::Cpu).unwrap();
        let all = all.to_dtype(DType::F16).unwrap();
        let part = |from, len| all.narrow(2, from, len).unwrap().contiguous().unwrap();
        let mut rows = Rows::new(&all).unwrap();
        for (from, len) in [(0, 300), (300, 0), (300, 1), (301, 256), (557, 343)] {
            rows.append(&part(from, len), &part(from, len)).unwrap();
            let expected = part(0, from + len);
            for held in [rows.held().unwrap().0, rows.held().unwrap().1] {
                let same = held.eq(&expected).unwrap().min_all().unwrap();
                assert_eq!(same.to_scalar::<u8>().unwrap(), 1);
            }
            assert_eq!(rows.bytes().0, 2 * (from + len) * 6 * 8 * 2);
        }
    }
}
