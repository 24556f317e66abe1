//! Sequences on a device other than the CPU, each in its own tensors.

use std::collections::BTreeMap;

use super::DenseStore;
use super::growing::{GrowingTensors, gather};
use crate::attention;
use crate::{
    AttentionShape, AttentionState, AttentionSums, Batch, Error, Footprint, KvStore, Mask, Result,
    Selection, SeqId,
};
use candle_core::{DType, Device, Tensor};

/// Keys and values of all sequences.
#[derive(Debug)]
pub struct DeviceTensors {
    device: Device,
    shape: AttentionShape,
    dtype: DType,
    seqs: BTreeMap<SeqId, GrowingTensors>,
}

impl DeviceTensors {
    pub fn new(device: &Device, shape: &AttentionShape, dtype: DType) -> Self {
        Self { device: device.clone(), shape: *shape, dtype, seqs: BTreeMap::new() }
    }

    /// Appends `[tokens, kv_heads, channels]` in the store's dtype.
    pub fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        for (seq, tokens) in batch.iter() {
            let of = |x: &Tensor| {
                x.narrow(0, tokens.start, tokens.len())?.transpose(0, 1)?.unsqueeze(0)?.contiguous()
            };
            self.append_one(seq, &of(k)?, &of(v)?)?;
        }
        Ok(())
    }

    pub fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        let of = |x: &Tensor| -> Result<Vec<Tensor>> {
            let parts = batch.iter().zip(tokens).map(|((_, own), selection)| {
                let x = x.narrow(0, own.start, own.len())?.transpose(0, 1)?.unsqueeze(0)?;
                gather(&x, selection.check(&vec![own.len(); self.shape.kv_heads])?)
            });
            parts.collect()
        };
        let (k, v) = (of(k)?, of(v)?);
        for ((seq, _), (k, v)) in batch.iter().zip(k.iter().zip(&v)) {
            self.append_one(seq, k, v)?;
        }
        Ok(())
    }

    fn append_one(&mut self, seq: SeqId, k: &Tensor, v: &Tensor) -> Result<()> {
        match self.seqs.get_mut(&seq) {
            Some(tensors) => tensors.append(k, v),
            None => {
                let mut tensors = GrowingTensors::new(k, v)?;
                tensors.append(k, v)?;
                self.seqs.insert(seq, tensors);
                Ok(())
            }
        }
    }

    /// Computes attention one sequence at a time.
    pub fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        let kv_heads = self.shape.kv_heads;
        if let Mask::Entries(ranges) = mask {
            let len = |seq| self.seqs.get(seq).map_or(0, GrowingTensors::len);
            let lens: Vec<_> =
                batch.seqs().iter().flat_map(|seq| vec![len(seq); kv_heads]).collect();
            ranges.check(&lens)?;
        }
        let none = |d| Tensor::zeros((1, kv_heads, 0, d), self.dtype, q.device());
        attention::attend_each(batch, q, &self.shape, mask, |i| {
            match (self.seqs.get(&batch.seqs()[i]), mask) {
                (Some(tensors), Mask::Entries(ranges)) => {
                    tensors.selected(&ranges.heads()[i * kv_heads..(i + 1) * kv_heads])
                }
                (Some(tensors), _) => tensors.held(),
                (None, _) => Ok((none(self.shape.head_dim)?, none(self.shape.value_dim)?)),
            }
        })
    }

    /// Copies keys and queries to the CPU, and the sums back.
    pub fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        let cpu = |x: &Tensor| x.to_device(&Device::Cpu);
        let mut host = DenseStore::new(self.shape, DType::F32)?;
        for &seq in batch.seqs() {
            if let Some(tensors) = self.seqs.get(&seq).filter(|tensors| tensors.len() > 0) {
                let (k, v) = tensors.held()?;
                let flat = |x: &Tensor| cpu(&x.squeeze(0)?.transpose(0, 1)?.contiguous()?);
                host.append(&Batch::single(seq, tensors.len())?, &flat(&k)?, &flat(&v)?)?;
            }
        }
        let sums = host.attention_sums(batch, &cpu(q)?, &cpu(lse)?, mask)?;
        sums.iter().map(|sums| sums.to_device(&self.device)).collect()
    }

    pub fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        let lens = self.lens(seq);
        self.seqs.get_mut(&seq).ok_or(Error::UnknownSequence(seq))?.retain(keep.check(&lens)?)
    }

    /// Returns one head's keys and values in f32.
    pub fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        let (k, v) = self.seqs.get(&seq).ok_or(Error::UnknownSequence(seq))?.held()?;
        let of =
            |x: Tensor| -> Result<Tensor> { Ok(x.get(0)?.get(kv_head)?.to_dtype(DType::F32)?) };
        Ok((of(k)?, of(v)?))
    }

    pub fn can_append(&self, _: &Batch) -> bool {
        true
    }

    pub fn contains(&self, seq: SeqId) -> bool {
        self.seqs.contains_key(&seq)
    }

    pub fn lens(&self, seq: SeqId) -> Vec<usize> {
        self.seqs.get(&seq).map_or(Vec::new(), |tensors| vec![tensors.len(); self.shape.kv_heads])
    }

    pub fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        let copy = self.seqs.get(&from).ok_or(Error::UnknownSequence(from))?.copy()?;
        self.seqs.insert(to, copy);
        Ok(())
    }

    /// Drops the entries after the first ones, as many in every head.
    pub fn truncate(&mut self, seq: SeqId, lens: &[usize]) {
        self.seqs.entry(seq).and_modify(|tensors| tensors.truncate(lens[0]));
    }

    pub fn remove(&mut self, seq: SeqId) -> bool {
        self.seqs.remove(&seq).is_some()
    }

    pub fn seqs(&self) -> Vec<SeqId> {
        self.seqs.keys().copied().collect()
    }

    pub fn footprint(&self) -> Footprint {
        self.seqs.values().map(GrowingTensors::footprint).sum()
    }

    pub fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.seqs.get(&seq).map_or(Footprint::default(), GrowingTensors::footprint)
    }

    pub fn clear(&mut self) {
        self.seqs.clear();
    }
}
