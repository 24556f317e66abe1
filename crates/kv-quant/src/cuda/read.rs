//! Entries on their way out, for policies and tests.

use super::CudaPool;
use super::args::UnpackArgs;
use super::head::Cut;
use super::tensors::kind;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use longctx_core::{Error, Result, SeqId};
use longctx_cuda::cudarc::driver::{CudaSlice, DevicePtr};

/// As in kernels/unpack.cuh.
const F32: i32 = 2;

impl CudaPool {
    /// The keys and values of one kv head in f32 on the CPU.
    pub fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        let sequence = self.sequence(seq)?;
        self.check(seq)?;
        let Some(head) = sequence.heads.get(kv_head) else {
            let expected = format!("one of {}", self.shape.kv_heads);
            return Err(Error::mismatch("kv head", expected, kv_head));
        };
        let (stream, d, values) = (self.stream(), self.shape.head_dim, head.packed.values);
        let (mut k, mut v) = (Vec::new(), Vec::new());
        if values > 0 {
            // SAFETY: the kernel writes all of both.
            let of = || unsafe { stream.alloc::<f32>(values * d) };
            let (on_k, on_v) = (of()?, of()?);
            let args = UnpackArgs {
                table: sequence.addresses(&stream, kv_head, self.ring_numbers()).table,
                k: on_k.device_ptr(&stream).0,
                v: on_v.device_ptr(&stream).0,
                entries: values as i32,
                kind: F32,
                ..UnpackArgs::default()
            };
            // SAFETY: both have room for so many entries, all of which are packed.
            unsafe { self.kernels.unpack(&stream, &args)? };
            k = stream.clone_dtoh(&on_k)?;
            v = stream.clone_dtoh(&on_v)?;
        }
        let places = self.ring_places();
        let ring = |ring: &CudaSlice<u16>, to: &mut Vec<f32>| -> Result<()> {
            let (from, numbers) = (kv_head * self.ring_numbers(), self.ring_numbers());
            let bits = stream.clone_dtoh(&ring.slice(from..from + numbers))?;
            for entry in values..head.len {
                let at = (entry + head.shift) % places * d;
                to.extend(bits[at..at + d].iter().map(|&bits| match self.dtype {
                    Some(DType::BF16) => bf16::from_bits(bits).to_f32(),
                    _ => f16::from_bits(bits).to_f32(),
                }));
            }
            Ok(())
        };
        ring(&sequence.ring_k, &mut k)?;
        ring(&sequence.ring_v, &mut v)?;
        let tensor = |x| Tensor::from_vec(x, (head.len, d), &Device::Cpu);
        Ok((tensor(k)?, tensor(v)?))
    }

    /// Writes the entries that a cut takes out of a record to the ring.
    pub(super) fn unpack_to_ring(&self, seq: SeqId, kv_head: usize, cut: &Cut) -> Result<()> {
        let sequence = self.sequence(seq)?;
        let (stream, ring) = (self.stream(), self.ring_numbers());
        let at = sequence.addresses(&stream, kv_head, ring);
        let args = UnpackArgs {
            table: at.table,
            k: at.ring_k,
            v: at.ring_v,
            first: cut.unpacked.start as i32,
            entries: cut.unpacked.len() as i32,
            ring: self.ring_places() as i32,
            shift: sequence.heads[kv_head].shift as i32,
            kind: kind(self.dtype.unwrap_or(DType::F16)),
            unused: 0,
        };
        // SAFETY: the entries are packed, and fewer than the ring has places.
        unsafe { self.kernels.unpack(&stream, &args) }
    }
}
