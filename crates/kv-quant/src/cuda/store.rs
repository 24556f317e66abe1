//! Packed keys and values of one layer on a CUDA device.

use super::held::{Held, Scratch};
use super::kernels::{Kernels, Layout, TILE};
use super::status::Status;
use super::wrap;
use crate::{Flush, Format};
use candle_core::cuda::cudarc::driver::CudaSlice;
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor, op::BackpropOp};
use longctx_core::{
    AttentionShape, Error, Footprint, KvStore, Partial, Result, Selection, Visible,
};
use std::sync::Arc;

/// Packed keys and values of one layer on a CUDA device, every kv head as long as the others.
///
/// Tokens go into a ring in the dtype they come in (f16 or bf16; f32 becomes f16) and are packed from there when the
/// [`Format`] says so. Attention reads packed tokens and ring in one launch. Neither waits for the device, and only outputs and
/// the packed part, as it grows, are allocated. So an infinity or NaN among the tokens is reported by a later call, once the kernel that
/// packs it has met it; after a call that appends many tokens, by this call.
#[derive(Debug, Clone)]
pub struct CudaStore {
    pub(super) shape: AttentionShape,
    pub(super) format: Format,
    pub(super) layout: Layout,
    pub(super) device: CudaDevice,
    pub(super) kernels: Kernels,
    pub(super) status: Arc<Status>,
    pub(super) held: Option<Held>,
}

impl CudaStore {
    /// An empty store.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there are no kernels for the format, the heads or the device, saying what they need.
    pub fn new(shape: AttentionShape, format: Format, device: &CudaDevice) -> Result<Self> {
        let lacks = |what: &str| Error::Unsupported(format!("CUDA kernels need {what}"));
        let layout = Layout::of(format, shape.head_dim).map_err(lacks)?;
        let kernels = Kernels::load(device, layout)?
            .ok_or_else(|| lacks("more shared memory than this device has"))?;
        let status = Arc::new(Status::new(device.cuda_stream().context())?);
        Ok(Self { shape, format, layout, device: device.clone(), kernels, status, held: None })
    }

    /// Whether so many tokens go into the ring beside those that are there: then they can be attended to before they are packed.
    pub fn fits(&self, tokens: usize) -> bool {
        let (held, ring) = match &self.held {
            Some(held) => (held.len - held.values, held.ring),
            None => (0, self.ring()),
        };
        held + tokens <= ring
    }

    /// Places of the ring: what the format keeps, and a group more.
    pub(super) fn ring(&self) -> usize {
        self.layout.group
            + match self.format.flush() {
                Flush::Staggered(residual) => residual,
                _ => self.layout.group,
            }
    }

    /// Keys or values in the store's dtype, checked.
    pub(super) fn prepare(&self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.status.check(self.layout.group)?;
        let (batch, _) = self.shape.check_kv(k, v)?;
        let dtype = match &self.held {
            Some(held) if held.batch != batch => {
                return Err(Error::mismatch("batch", held.batch, batch));
            }
            Some(held) => held.dtype,
            None if k.dtype() == DType::BF16 => DType::BF16,
            None => DType::F16,
        };
        let fit = |x: &Tensor| -> Result<Tensor> {
            self.check_device(x)?;
            Ok(x.to_dtype(dtype)?.contiguous()?)
        };
        Ok((fit(k)?, fit(v)?))
    }

    pub(super) fn check_device(&self, x: &Tensor) -> Result<()> {
        if x.device().same_device(&Device::Cuda(self.device.clone())) {
            return Ok(());
        }
        let got = format!("one on {:?}", x.device().location());
        Err(Error::mismatch("tensor", "one on the store's device", got))
    }

    /// What is held, begun for tensors like `k` if nothing is.
    pub(super) fn held_mut(&mut self, k: &Tensor) -> Result<&mut Held> {
        if self.held.is_none() {
            let batch = k.dim(0)?;
            let (rows, ring, stream) =
                (batch * self.shape.kv_heads, self.ring(), self.device.cuda_stream());
            let places = rows * ring * self.shape.head_dim;
            let kernel = &self.kernels.attend[0];
            let blocks = (self.shape.heads / self.shape.kv_heads).div_ceil(kernel.columns);
            let parts = rows * blocks * (kernel.max_splits(rows, blocks) + 1) * kernel.columns;
            self.held = Some(Held {
                batch,
                rows,
                dtype: k.dtype(),
                packed: stream.null().map_err(wrap)?,
                capacity: 0,
                ring_k: stream.alloc_zeros(places).map_err(wrap)?,
                ring_v: stream.alloc_zeros(places).map_err(wrap)?,
                ring,
                len: 0,
                keys: 0,
                values: 0,
                tiles: 0,
                scratch: Scratch::new(&stream, parts, self.shape.head_dim, rows * blocks)?,
            });
        }
        self.held_mut_known()
    }

    pub(super) fn held_mut_known(&mut self) -> Result<&mut Held> {
        self.held.as_mut().ok_or_else(|| Error::mismatch("store", "entries", "none"))
    }

    pub(super) fn known(&self) -> Result<&Held> {
        self.held.as_ref().ok_or_else(|| Error::mismatch("store", "entries to attend over", "none"))
    }

    pub(super) fn tensor<T: candle_core::cuda_backend::CudaDType>(
        &self,
        x: CudaSlice<T>,
        shape: &[usize],
    ) -> Tensor {
        let storage = CudaStorage::wrap_cuda_slice(x, self.device.clone());
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    }

    pub(super) fn check_causal(&self, q: &Tensor, visible: Visible) -> Result<()> {
        let (batch, tokens) = self.shape.check_q(q)?;
        let held = self.known()?;
        if batch != held.batch {
            return Err(Error::mismatch("batch", held.batch, batch));
        }
        if visible == Visible::Causal && held.len < tokens {
            let expected = format!("at least the {tokens} of the queries' own tokens");
            return Err(Error::mismatch("entries of a kv head", expected, held.len));
        }
        Ok(())
    }
}

impl KvStore for CudaStore {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let tokens = k.dim(2)?;
        if self.fits(tokens) {
            self.extend(k, v)?;
            self.pack()?;
        } else {
            let (k, v) = self.prepare(k, v)?;
            self.append_many(&k, &v)?;
        }
        if tokens > 1 {
            self.device.cuda_stream().synchronize().map_err(wrap)?;
        }
        self.status.check(self.layout.group)
    }

    fn attend(&self, q: &Tensor, visible: Visible) -> Result<Partial> {
        self.status.check(self.layout.group)?;
        self.check_causal(q, visible)?;
        self.check_device(q)?;
        let held = self.known()?;
        self.launch_attend(held, &q.to_dtype(held.dtype)?.contiguous()?, visible)
    }

    fn mass(&self, q: &Tensor, lse: &Tensor, visible: Visible) -> Result<Vec<Vec<f32>>> {
        self.status.check(self.layout.group)?;
        self.check_causal(q, visible)?;
        self.check_device(q)?;
        self.check_device(lse)?;
        let held = self.known()?;
        self.launch_mass(held, &q.to_dtype(held.dtype)?.contiguous()?, lse, visible)
    }

    fn retain(&mut self, keep: &Selection) -> Result<()> {
        keep.check(&self.lens())?;
        let whole = |(keep, len): (&Vec<u32>, usize)| keep.len() == len;
        if keep.heads().iter().zip(self.lens()).all(whole) {
            return Ok(());
        }
        Err(Error::Unsupported("dropping entries of a packed cache on a CUDA device".into()))
    }

    fn read(&self, batch: usize, kv_head: usize) -> Result<(Tensor, Tensor)> {
        let held_batch = self.held.as_ref().map_or(0, |held| held.batch);
        if batch >= held_batch || kv_head >= self.shape.kv_heads {
            let expected = format!("one of {held_batch} x {}", self.shape.kv_heads);
            return Err(Error::mismatch("kv head", expected, format!("{batch}, {kv_head}")));
        }
        let (k, v) = self.dense()?;
        let one = |x: Tensor| -> Result<Tensor> { Ok(x.get(batch)?.get(kv_head)?) };
        Ok((one(k)?, one(v)?))
    }

    fn lens(&self) -> Vec<usize> {
        self.held.as_ref().map_or(Vec::new(), |held| vec![held.len; held.rows])
    }

    fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    fn footprint(&self) -> Footprint {
        let Some(held) = &self.held else { return Footprint::default() };
        let (layout, d) = (self.layout, self.shape.head_dim);
        let tiles = held.keys / TILE + held.tiles;
        let payload = held.rows * tiles * layout.codes();
        let values = 4 * TILE * layout.value_groups();
        let scales = held.rows * (held.keys / layout.group * 4 * d + held.tiles * values);
        let residual = held.rows * (held.len - held.values) * d * 4;
        let Scratch { out, lse, arrived } = &held.scratch;
        let allocated = held.packed.len()
            + 2 * (held.ring_k.len() + held.ring_v.len())
            + 4 * (out.len() + lse.len() + arrived.len());
        let slack = allocated - payload - scales - residual;
        Footprint { payload, scales, residual, bookkeeping: 0, slack }
    }

    fn reset(&mut self) {
        self.held = None;
    }
}
