//! Tokens on their way out: unpacked, for those who ask for keys and values themselves.

use super::CudaStore;
use super::args::UnpackArgs;
use super::held::{Held, NO_RING, Place, move_tokens};
use super::wrap;
use candle_core::cuda::cudarc::driver::{DevicePtr, DeviceRepr};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use longctx_core::Result;

impl CudaStore {
    /// All keys and values in f32, `[batch, kv_heads, len, head_dim]`.
    pub(super) fn dense(&self) -> Result<(Tensor, Tensor)> {
        let held = self.known()?;
        let (stream, d) = (self.device.cuda_stream(), self.shape.head_dim);
        let shape = |tokens| [held.batch, self.shape.kv_heads, tokens, d];
        let (k, v) = match held.dtype {
            DType::BF16 => self.residual::<bf16>(held)?,
            _ => self.residual::<f16>(held)?,
        };
        if held.values == 0 {
            return Ok((k, v));
        }
        let count = held.rows * held.values * d;
        let (pk, pv) = (stream.alloc_zeros::<f32>(count), stream.alloc_zeros::<f32>(count));
        let (pk, pv) = (pk.map_err(wrap)?, pv.map_err(wrap)?);
        let args = UnpackArgs {
            packed: held.packed.device_ptr(&stream).0,
            k: pk.device_ptr(&stream).0,
            v: pv.device_ptr(&stream).0,
            packed_stride: (held.capacity * self.layout.record()) as i64,
            rows: held.rows as i32,
            tokens: held.values as i32,
            keys: held.values as i32,
            values: held.values as i32,
        };
        // SAFETY: `pk` and `pv` have room for `values` tokens of each row, all of which are packed.
        unsafe { self.kernels.unpack(&stream, &args)? };
        let join = |packed, rest: &Tensor| -> Result<Tensor> {
            Ok(Tensor::cat(&[&self.tensor(packed, &shape(held.values)), rest], 2)?)
        };
        Ok((join(pk, &k)?, join(pv, &v)?))
    }

    /// The ring's tokens in f32.
    fn residual<T>(&self, held: &Held) -> Result<(Tensor, Tensor)>
    where
        T: candle_core::cuda_backend::CudaDType + DeviceRepr,
    {
        let (stream, d, tokens) =
            (self.device.cuda_stream(), self.shape.head_dim, held.len - held.values);
        let count = held.rows * tokens.max(1) * d;
        // SAFETY: all that is read is written by the copy below.
        let (k, v) = unsafe { (stream.alloc::<T>(count), stream.alloc::<T>(count)) };
        let (k, v) = (k.map_err(wrap)?, v.map_err(wrap)?);
        let to = Place {
            k: k.device_ptr(&stream).0,
            v: v.device_ptr(&stream).0,
            pitch: tokens,
            start: 0,
            ring: NO_RING,
        };
        let from = held.in_ring(&stream, held.values);
        // SAFETY: both sides hold `tokens` tokens of each row.
        unsafe { move_tokens(&self.kernels, &stream, from, to, tokens, held.rows, d / 8)? };
        let shape = [held.batch, self.shape.kv_heads, tokens.max(1), d];
        let f32 = |x| -> Result<Tensor> {
            Ok(self.tensor(x, &shape).narrow(2, 0, tokens)?.to_dtype(DType::F32)?)
        };
        Ok((f32(k)?, f32(v)?))
    }
}
