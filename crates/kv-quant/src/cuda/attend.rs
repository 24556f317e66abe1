//! One launch of attention over records and ring.

use super::CudaStore;
use super::args::AttendArgs;
use super::held::{Held, Scratch, kind, with_address};
use super::wrap;
use candle_core::Tensor;
use candle_core::cuda::cudarc::driver::DevicePtr;
use longctx_core::{AttentionShape, Error, Partial, Result, Visible};

impl CudaStore {
    pub(super) fn launch_attend(
        &self,
        held: &Held,
        q: &Tensor,
        visible: Visible,
    ) -> Result<Partial> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (queries, stream) = (q.dim(2)?, self.device.cuda_stream());
        let columns = heads / kv_heads * queries;
        let kernels = &self.kernels.attend;
        let kernel = if columns > kernels[0].columns { kernels.last() } else { kernels.first() };
        let kernel = kernel.ok_or_else(|| Error::Unsupported("no attention kernel".into()))?;
        let blocks = columns.div_ceil(kernel.columns);
        let records = held.values.div_ceil(self.layout.group);
        let splits = kernel.splits(held.rows, blocks, records);
        let parts = held.rows * blocks * (splits + 1) * kernel.columns;
        // A block of queries may need more room than a single one.
        let more = (parts > held.scratch.lse.len()
            || held.rows * blocks > held.scratch.arrived.len())
        .then(|| Scratch::new(&stream, parts, head_dim, held.rows * blocks));
        let more = more.transpose()?;
        let scratch = more.as_ref().unwrap_or(&held.scratch);
        let rows = held.batch * heads * queries;
        // SAFETY: the kernel writes all of both.
        let (out, lse) =
            unsafe { (stream.alloc::<f32>(rows * head_dim), stream.alloc::<f32>(rows)) };
        let (out, lse) = (out.map_err(wrap)?, lse.map_err(wrap)?);
        with_address(q, q, &stream, |q, _| {
            let args = AttendArgs {
                q,
                out: out.device_ptr(&stream).0,
                lse: lse.device_ptr(&stream).0,
                part_out: scratch.out.device_ptr(&stream).0,
                part_lse: scratch.lse.device_ptr(&stream).0,
                arrived: scratch.arrived.device_ptr(&stream).0,
                splits: splits as i32,
                ..self.over(held, queries, visible)
            };
            // SAFETY: the sizes above are those that the kernel counts with; calls of one stream follow each other.
            unsafe { kernel.launch(&stream, &args, held.rows, blocks) }
        })?;
        Ok(Partial {
            out: self.tensor(out, &[held.batch, heads, queries, head_dim]),
            lse: self.tensor(lse, &[held.batch, heads, queries]),
        })
    }
    /// What all kernels that compute scores are told: what is held, the heads, who sees what.
    pub(super) fn over(&self, held: &Held, queries: usize, visible: Visible) -> AttendArgs {
        let AttentionShape { heads, kv_heads, scale, window, soft_cap, .. } = self.shape;
        let stream = self.device.cuda_stream();
        let ring = held.in_ring(&stream, held.values);
        AttendArgs {
            packed: held.packed.device_ptr(&stream).0,
            residual_k: ring.k,
            residual_v: ring.v,
            packed_stride: (held.capacity * self.layout.record()) as i64,
            packed_len: held.values as i32,
            residual_len: (held.len - held.values) as i32,
            ring_start: ring.start as i32,
            ring: ring.ring,
            kv_heads: kv_heads as i32,
            heads_per_kv: (heads / kv_heads) as i32,
            queries: queries as i32,
            causal: (visible == Visible::Causal) as i32,
            window: window.unwrap_or(0) as i32,
            kind: kind(held.dtype),
            out_kind: 2,
            scale,
            soft_cap: soft_cap.unwrap_or(0.0),
            ..AttendArgs::default()
        }
    }
}
