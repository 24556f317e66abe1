//! Reads entries, for policies and tests.

use super::CudaPool;
use super::head::Truncation;
use super::tensors::{kind, tensor};
use crate::cuda::UnpackArgs;
use candle_core::{DType, Device, Tensor};
use longctx_core::{Error, Result, SeqId};
use longctx_cuda::cudarc::driver::{CudaSlice, DevicePtr};
use std::ops::Range;

/// The number of f32 in kernels/unpack.cuh.
const F32: i32 = 2;

impl CudaPool {
    /// Returns the keys and values of one kv head in f32.
    pub fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        let sequence = self.sequence(seq)?;
        self.check(seq)?;
        let Some(head) = sequence.heads.get(kv_head) else {
            let expected = format!("one of {}", self.shape.kv_heads);
            return Err(Error::mismatch("kv head", expected, kv_head));
        };
        let (stream, d, values) = (self.stream(), self.shape.head_dim, head.packed.values);
        // SAFETY: the kernel writes every element of both.
        let of = || unsafe { stream.alloc::<f32>((values * d).max(1)) };
        let (k, v) = (of()?, of()?);
        let args = UnpackArgs {
            table: sequence.addresses(&stream, self.ring_numbers()).of_head(kv_head).table,
            k: k.device_ptr(&stream).0,
            v: v.device_ptr(&stream).0,
            entries: values as i32,
            kind: F32,
            ..UnpackArgs::default()
        };
        // SAFETY: both have room for the entries, all of which are packed.
        unsafe { self.kernels.unpack(&stream, &args)? };
        let device = Device::Cuda(self.device.clone());
        let places = self.ring_places();
        let in_ring = (values..head.slots).map(|slot| ((slot + head.shift) % places) as u32);
        let in_ring = Tensor::from_iter(in_ring, &device)?;
        let slots = head.entry_slots().map(|slots| Tensor::new(slots, &device)).transpose()?;
        let entries = |packed: CudaSlice<f32>, ring: &CudaSlice<u16>| -> Result<Tensor> {
            let packed = tensor(&self.device, packed, &[(values * d).max(1)]);
            let packed = packed.narrow(0, 0, values * d)?.reshape((values, d))?;
            if in_ring.elem_count() == 0 {
                return Ok(packed);
            }
            let ring = self.rings_of(ring, kv_head..kv_head + 1)?.squeeze(0)?;
            let ring = ring.index_select(&in_ring, 0)?.to_dtype(DType::F32)?;
            if values == 0 {
                return Ok(ring);
            }
            Ok(Tensor::cat(&[packed, ring], 0)?)
        };
        let all = (entries(k, &sequence.ring_k)?, entries(v, &sequence.ring_v)?);
        match slots {
            Some(slots) => Ok((all.0.index_select(&slots, 0)?, all.1.index_select(&slots, 0)?)),
            None => Ok(all),
        }
    }

    /// Returns a copy of some kv heads' rings, `[heads, places, head_dim]`.
    pub(super) fn rings_of(&self, ring: &CudaSlice<u16>, heads: Range<usize>) -> Result<Tensor> {
        let (stream, of_head) = (self.stream(), self.ring_numbers());
        let dims = [heads.len(), self.ring_places(), self.shape.head_dim];
        let numbers = heads.len() * of_head;
        let own = ring.slice(heads.start * of_head..heads.end * of_head);
        // SAFETY: every pattern of 16 bits is valid in both formats.
        unsafe {
            Ok(match self.dtype {
                Some(DType::BF16) => {
                    let own = own.transmute::<half::bf16>(numbers).ok_or_else(misfit)?;
                    tensor(&self.device, stream.clone_dtod(&own)?, &dims)
                }
                _ => {
                    let own = own.transmute::<half::f16>(numbers).ok_or_else(misfit)?;
                    tensor(&self.device, stream.clone_dtod(&own)?, &dims)
                }
            })
        }
    }

    /// Writes the entries that a truncation unpacks from a record to the ring.
    pub(super) fn unpack_to_ring(
        &self,
        seq: SeqId,
        kv_head: usize,
        truncation: &Truncation,
    ) -> Result<()> {
        let sequence = self.sequence(seq)?;
        let (stream, ring) = (self.stream(), self.ring_numbers());
        let at = sequence.addresses(&stream, ring).of_head(kv_head);
        let args = UnpackArgs {
            table: at.table,
            k: at.ring_k,
            v: at.ring_v,
            first: truncation.unpacked.start as i32,
            entries: truncation.unpacked.len() as i32,
            ring: self.ring_places() as i32,
            shift: sequence.heads[kv_head].shift as i32,
            kind: kind(self.dtype.unwrap_or(DType::F16)),
            ..UnpackArgs::default()
        };
        // SAFETY: the entries are packed, and they fit in the ring.
        Ok(unsafe { self.kernels.unpack(&stream, &args) }?)
    }
}

fn misfit() -> Error {
    Error::mismatch("ring", "numbers of 16 bits", "others")
}
