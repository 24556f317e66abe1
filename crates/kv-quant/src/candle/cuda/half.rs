//! Keys and values in f16 that are never packed, for sinks.

use crate::Format;
use candle_core::backend::BackendDevice;
use candle_core::{CudaDevice, DType, Device, Tensor};
use longctx_core::{AttentionShape, Batch, DenseStore, Error, KvStore, Result, Selection, SeqId};
use std::ops::{Deref, DerefMut};

/// A dense store on a CUDA device.
#[derive(Debug)]
pub struct CudaHalf {
    store: DenseStore,
    shape: AttentionShape,
    device: CudaDevice,
    capacity: Option<usize>,
}

impl CudaHalf {
    /// Creates an empty store of at most `capacity` bytes.
    pub fn new(
        shape: AttentionShape,
        device: &CudaDevice,
        capacity: Option<usize>,
    ) -> Result<Self> {
        let store = DenseStore::with_capacity(shape, DType::F16, capacity.unwrap_or(usize::MAX))?;
        Ok(Self { store, shape, device: device.clone(), capacity })
    }

    pub fn format(&self) -> Format {
        Format::f16()
    }

    pub fn capacity(&self) -> Option<usize> {
        self.capacity
    }

    /// Limits the capacity of an empty store.
    pub fn with_capacity(self, bytes: usize) -> Self {
        match DenseStore::with_capacity(self.shape, DType::F16, bytes) {
            Ok(store) => Self { store, capacity: Some(bytes), ..self },
            Err(_) => unreachable!("f16 is a format of dense stores"),
        }
    }

    pub fn is_on(&self, device: &Device) -> bool {
        matches!(device, Device::Cuda(device) if device.same_device(&self.device))
    }

    /// Nothing is packed.
    pub fn packed(&self, _: SeqId) -> Vec<[usize; 2]> {
        Vec::new()
    }

    /// Nothing is packed.
    pub fn packed_after(&self, _: SeqId, _: &[usize]) -> Option<Vec<[usize; 2]>> {
        Some(Vec::new())
    }

    pub fn check_append(&self, batch: &Batch) -> Result<()> {
        if self.store.can_append(batch) {
            return Ok(());
        }
        let row = 2 * self.shape.kv_heads * (self.shape.head_dim + self.shape.value_dim);
        let free = self.capacity.unwrap_or(0).saturating_sub(self.store.footprint().payload);
        let what = "pool of entries in f16".into();
        Err(Error::PoolFull { what, needed: batch.tokens() * row, free })
    }
}

impl CudaHalf {
    fn copy(&self) -> Result<Self> {
        let mut copy = Self::new(self.shape, &self.device, self.capacity)?;
        self.store.seqs().into_iter().try_for_each(|seq| self.copy_to(&mut copy, seq))?;
        Ok(copy)
    }

    fn copy_to(&self, copy: &mut Self, seq: SeqId) -> Result<()> {
        let (lens, longest) = (self.store.lens(seq), self.store.len(seq));
        if longest == 0 {
            return Ok(());
        }
        let (mut k, mut v) = (Vec::new(), Vec::new());
        for (head, len) in lens.iter().enumerate() {
            let (keys, values) = self.store.read(seq, head)?;
            let whole = |x: Tensor| x.pad_with_zeros(0, 0, longest - len)?.unsqueeze(1);
            k.push(whole(keys)?);
            v.push(whole(values)?);
        }
        let held = Selection::new(lens.iter().map(|&len| (0..len as u32).collect()).collect());
        let (k, v) = (Tensor::cat(&k, 1)?, Tensor::cat(&v, 1)?);
        copy.store.append_selected(&Batch::single(seq, longest)?, &k, &v, &[held])
    }
}

impl Clone for CudaHalf {
    /// Panics if the device has no memory for the copy, like the `clone` of cudarc's arrays.
    fn clone(&self) -> Self {
        self.copy().expect("the device has memory for a copy")
    }
}

impl Deref for CudaHalf {
    type Target = DenseStore;

    fn deref(&self) -> &DenseStore {
        &self.store
    }
}

impl DerefMut for CudaHalf {
    fn deref_mut(&mut self) -> &mut DenseStore {
        &mut self.store
    }
}
