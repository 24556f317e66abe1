//! Attention of many queries: their entries are unpacked once for the prefill kernel, which reuses
//! them for a tile of queries. The kernel over packed records unpacks them for every few queries.
//! Unpacked entries are f16, as in that kernel.

use super::CudaPool;
use super::head::Sequence;
use super::tensors::{address, kind};
use crate::cuda::{UnpackArgs, Work};
use candle_core::{DType, Device, Tensor};
use longctx_core::{AttentionState, Batch, Mask, Result, attention};
use longctx_cuda::cudarc::driver::CudaSlice;

/// Number of columns (query heads of a kv head times queries) from which on entries are unpacked.
const MIN_COLUMNS: usize = 128;

impl CudaPool {
    /// Computes attention of the sequences with many queries over all their entries, and removes
    /// the queries from their work items. All heads of these sequences hold the same tokens. The
    /// outputs of the other sequences are not defined. Returns `None` if there is no such sequence.
    pub(super) fn attend_unpacked(
        &self,
        batch: &Batch,
        q: &Tensor,
        heads: &mut [Work],
    ) -> Result<Option<AttentionState>> {
        let unpacked = batch.iter().map(|(seq, tokens)| {
            let many = self.shape.heads_per_kv() * tokens.len() >= MIN_COLUMNS;
            let fits = |of: &&Sequence| many && of.is_uniform() && of.heads[0].slots > 0;
            self.seqs.get(&seq).filter(fits)
        });
        let unpacked: Vec<_> = unpacked.collect();
        if unpacked.iter().all(Option::is_none) {
            return Ok(None);
        }
        let (k, v, ends) = self.unpack(&unpacked)?;
        let (k, v) = (k.transpose(0, 1)?, v.transpose(0, 1)?);
        let state = attention::attend_past(batch, q, (&k, &v), &ends, &self.shape, Mask::Full)?;
        if state.is_some() {
            let of_seqs = heads.chunks_mut(self.shape.kv_heads).zip(&unpacked);
            let done = of_seqs.filter(|(_, sequence)| sequence.is_some());
            done.flat_map(|(heads, _)| heads).for_each(|work| work.queries = 0);
        }
        Ok(state)
    }

    /// As [`unpack`](Self::unpack), of all sequences of a batch.
    pub(super) fn unpack_batch(&self, batch: &Batch) -> Result<(Tensor, Tensor, Vec<u32>)> {
        let sequences = batch.seqs().iter().map(|seq| self.seqs.get(seq));
        self.unpack(&sequences.collect::<Vec<_>>())
    }

    /// Returns keys and values of sequences without holes, `[kv_heads, total, head_dim]` in f16. Also
    /// returns the ends: sequence i has the entries `ends[i]..ends[i + 1]`.
    fn unpack(&self, sequences: &[Option<&Sequence>]) -> Result<(Tensor, Tensor, Vec<u32>)> {
        let mut ends = vec![0u32];
        for sequence in sequences {
            let len = sequence.map_or(0, |of| of.heads[0].slots as u32);
            ends.push(ends[ends.len() - 1] + len);
        }
        let total = ends[sequences.len()] as usize;
        let device = Device::Cuda(self.device.clone());
        let dims = (self.shape.kv_heads, total, self.shape.head_dim);
        // SAFETY: all elements are written: the packed entries by the kernel, the others below.
        let empty = || unsafe { Tensor::empty(dims, DType::F16, &device) };
        let (k, v) = (empty()?, empty()?);
        for (sequence, &first) in sequences.iter().zip(&ends) {
            let Some(sequence) = sequence else { continue };
            self.unpack_records(sequence, (&k, &v), first as usize)?;
            let head = &sequence.heads[0];
            let (packed, places) = (head.packed.values, self.ring_places());
            let in_ring = (packed..head.slots).map(|slot| ((slot + head.shift) % places) as u32);
            let in_ring = Tensor::from_iter(in_ring, &device)?;
            let copy = |to: &Tensor, ring: &CudaSlice<u16>| -> Result<()> {
                let entries = self.rings_of(ring, 0..dims.0)?.index_select(&in_ring, 1)?;
                let entries = entries.to_dtype(DType::F16)?;
                Ok(to.slice_set(&entries, 1, first as usize + packed)?)
            };
            if in_ring.elem_count() > 0 {
                copy(&k, &sequence.ring_k)?;
                copy(&v, &sequence.ring_v)?;
            }
        }
        Ok((k, v, ends))
    }

    /// Unpacks the records of all heads of a sequence to rows from `first` on.
    fn unpack_records(
        &self,
        sequence: &Sequence,
        (k, v): (&Tensor, &Tensor),
        first: usize,
    ) -> Result<()> {
        let (stream, total, d) = (self.stream(), k.dim(1)?, k.dim(2)?);
        let all = sequence.addresses(&stream, self.ring_numbers());
        for kv_head in 0..self.shape.kv_heads {
            let offset = 2 * ((kv_head * total + first) * d) as u64;
            let args = UnpackArgs {
                table: all.of_head(kv_head).table,
                k: address(k)? + offset,
                v: address(v)? + offset,
                entries: sequence.heads[kv_head].packed.values as i32,
                kind: kind(DType::F16),
                ..UnpackArgs::default()
            };
            // SAFETY: the entries are packed, and the tensors have room for them.
            unsafe { self.kernels.unpack(&stream, &args)? };
        }
        Ok(())
    }
}
