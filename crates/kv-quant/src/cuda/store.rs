//! Packed keys and values of one layer on a CUDA device.

use super::args::{AttendArgs, MoveArgs, QuantizeArgs, UnpackArgs};
use super::kernels::{Kernels, Layout, TILE};
use super::status::Status;
use super::wrap;
use crate::{Flush, Format};
use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Storage, Tensor, op::BackpropOp};
use half::{bf16, f16};
use longctx_core::{
    AttentionShape, Error, Footprint, KvStore, Partial, Result, Selection, Visible, attention,
};
use std::sync::Arc;

/// Tokens that a source which is no ring may hold.
const NO_RING: i32 = 1 << 30;

/// Packed keys and values of one layer on a CUDA device, every kv head as long as the others.
///
/// Tokens go into a ring in the dtype they come in (f16 or bf16; f32 becomes f16) and are packed from there when the
/// [`Format`] says so. Attention reads packed tokens and ring in one launch. Neither waits for the device, and only outputs and
/// the packed part, as it grows, are allocated. So an infinity or NaN among the tokens is reported by a later call, once the kernel that
/// packs it has met it; after a call that appends many tokens, by this call.
#[derive(Debug, Clone)]
pub struct CudaStore {
    shape: AttentionShape,
    format: Format,
    layout: Layout,
    device: CudaDevice,
    kernels: Kernels,
    status: Arc<Status>,
    held: Option<Held>,
}

/// What a store holds once it knows its batch and dtype.
#[derive(Debug, Clone)]
struct Held {
    batch: usize,
    /// Batch entries times kv heads.
    rows: usize,
    dtype: DType,
    /// `[rows][capacity]` records.
    packed: CudaSlice<u8>,
    capacity: usize,
    /// `[rows][ring][head_dim]`: token i lies at place `i % ring`.
    ring_k: CudaSlice<u16>,
    ring_v: CudaSlice<u16>,
    ring: usize,
    len: usize,
    /// Tokens whose keys are packed.
    keys: usize,
    /// Tokens that are read from records; those after them are read from the ring.
    values: usize,
    /// Tiles whose values are packed: the last may go beyond `values`.
    tiles: usize,
    scratch: Scratch,
}

/// Partial results of a launch's blocks.
#[derive(Debug, Clone)]
struct Scratch {
    out: CudaSlice<f32>,
    lse: CudaSlice<f32>,
    arrived: CudaSlice<u32>,
}

/// Two sources or targets of tokens, and how they lie there.
#[derive(Clone, Copy)]
struct Place {
    k: u64,
    v: u64,
    pitch: usize,
    start: usize,
    ring: i32,
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

    /// Puts tokens that [fit](Self::fits) into the ring, and packs nothing yet: [`pack`](Self::pack) does.
    ///
    /// # Errors
    /// As [`KvStore::append`].
    pub fn extend(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let (k, v) = self.prepare(k, v)?;
        let tokens = k.dim(2)?;
        if !self.fits(tokens) {
            return Err(Error::mismatch("tokens for the residual", "fewer", tokens));
        }
        let stream = self.device.cuda_stream();
        let (kernels, pieces) = (self.kernels.clone(), self.shape.head_dim / 8);
        let held = self.held_mut(&k)?;
        with_address(&k, &v, &stream, |k, v| {
            let from = Place { k, v, pitch: tokens, start: 0, ring: NO_RING };
            let to = held.in_ring(&stream, held.len);
            // SAFETY: both sides have room for `tokens` tokens of each row.
            unsafe { move_tokens(&kernels, &stream, from, to, tokens, held.rows, pieces) }
        })?;
        held.len += tokens;
        Ok(())
    }

    /// Packs what the format no longer keeps in full precision.
    ///
    /// # Errors
    /// If the device runs out of memory.
    pub fn pack(&mut self) -> Result<()> {
        let stream = self.device.cuda_stream();
        let Some(held) = &self.held else { return Ok(()) };
        let from = held.in_ring(&stream, held.values);
        let rounded = (held.ring_k.device_ptr(&stream).0, held.keys_ahead(self.format));
        self.pack_from(from, if rounded.1 { rounded.0 } else { 0 })
    }

    /// Packs from a source that begins with the first token not read from records.
    fn pack_from(&mut self, from: Place, rounded: u64) -> Result<()> {
        let (layout, stream) = (self.layout, self.device.cuda_stream());
        let (group, format) = (layout.group, self.format);
        let held = self.held.as_mut().ok_or_else(|| Error::mismatch("store", "tokens", "none"))?;
        let (keys, values) = held.goal(format);
        let tiles = values.div_ceil(TILE);
        if keys == held.keys && tiles <= held.tiles {
            held.values = values;
            return Ok(());
        }
        held.reserve(&self.device, layout, keys.max(tiles * TILE).div_ceil(group))?;
        let args = QuantizeArgs {
            k: from.k,
            v: from.v,
            packed: held.packed.device_ptr(&stream).0,
            rounded,
            status: self.status.address(),
            packed_stride: (held.capacity * layout.record()) as i64,
            pitch: from.pitch as i64,
            start: from.start as i32,
            ring: from.ring,
            key_offset: (held.keys - held.values) as i32,
            key_record: (held.keys / group) as i32,
            key_records: ((keys - held.keys) / group) as i32,
            value_offset: (held.tiles * TILE - held.values) as i32,
            value_tile: held.tiles as i32,
            value_tiles: (tiles - held.tiles) as i32,
            kind: kind(held.dtype),
        };
        // SAFETY: the source holds the tokens from `values` up to `len`, and there are records for all that is packed.
        unsafe { self.kernels.quantize(&stream, &args, held.rows)? };
        (held.keys, held.values, held.tiles) = (keys, values, tiles);
        Ok(())
    }

    /// Takes in more tokens than the ring holds.
    fn append_many(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let tokens = k.dim(2)?;
        let stream = self.device.cuda_stream();
        let (kernels, d, format) = (self.kernels.clone(), self.shape.head_dim, self.format);
        let group = self.layout.group;
        let held = self.held_mut(k)?;
        let (rows, residual, before) = (held.rows, held.len - held.values, held.values);
        if residual > 0 {
            // What the ring holds and what is new, in one piece.
            let total = residual + tokens;
            // SAFETY: all of both is written below, before it is read.
            let both = unsafe {
                [stream.alloc::<u16>(rows * total * d), stream.alloc::<u16>(rows * total * d)]
            };
            let [whole_k, whole_v] = both;
            let (whole_k, whole_v) = (whole_k.map_err(wrap)?, whole_v.map_err(wrap)?);
            let (wk, wv) = (whole_k.device_ptr(&stream), whole_v.device_ptr(&stream));
            let whole = Place { k: wk.0, v: wv.0, pitch: total, start: 0, ring: NO_RING };
            let old = held.in_ring(&stream, held.values);
            with_address(k, v, &stream, |k, v| {
                let new = Place { k, v, pitch: tokens, start: 0, ring: NO_RING };
                let after = Place { start: residual, ..whole };
                // SAFETY: `whole` has room for both.
                unsafe {
                    move_tokens(&kernels, &stream, old, whole, residual, rows, d / 8)?;
                    move_tokens(&kernels, &stream, new, after, tokens, rows, d / 8)
                }
            })?;
            held.len += tokens;
            let rounded = if held.keys_ahead(format) { whole.k } else { 0 };
            self.pack_from(whole, rounded)?;
            let held = self.held_mut(k)?;
            let tail = Place { start: held.values - before, ..whole };
            let to = held.in_ring(&stream, held.values);
            // SAFETY: fewer tokens are left than the ring has places.
            return unsafe {
                move_tokens(&kernels, &stream, tail, to, held.len - held.values, rows, d / 8)
            };
        }
        held.len += tokens;
        with_address(k, v, &stream, |k, v| {
            let new = Place { k, v, pitch: tokens, start: 0, ring: NO_RING };
            self.pack_from(new, 0)?;
            let held = self.held_mut_known()?;
            // Keys packed ahead of their values lie in the ring too, as their codes have them: from whole groups.
            let first = (held.values / group * group).max(before);
            let tail = Place { start: first - before, ..new };
            let ring = held.in_ring(&stream, first);
            let args = QuantizeArgs {
                k: ring.k,
                v: ring.v,
                packed: held.packed.device_ptr(&stream).0,
                rounded: ring.k,
                status: self.status.address(),
                packed_stride: (held.capacity * self.layout.record()) as i64,
                pitch: ring.pitch as i64,
                start: ring.start as i32,
                ring: ring.ring,
                key_record: (first / group) as i32,
                key_records: ((held.keys - first) / group) as i32,
                kind: kind(held.dtype),
                ..Default::default()
            };
            // SAFETY: the ring has places for the tokens from `first` on, and there are records for all packed keys.
            unsafe {
                move_tokens(&kernels, &stream, tail, ring, held.len - first, rows, d / 8)?;
                self.kernels.quantize(&stream, &args, rows)
            }
        })
    }

    /// Places of the ring: what the format keeps, and a group more.
    fn ring(&self) -> usize {
        self.layout.group
            + match self.format.flush() {
                Flush::Staggered(residual) => residual,
                _ => self.layout.group,
            }
    }

    /// Keys or values in the store's dtype, checked.
    fn prepare(&self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
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

    fn check_device(&self, x: &Tensor) -> Result<()> {
        if x.device().same_device(&Device::Cuda(self.device.clone())) {
            return Ok(());
        }
        let got = format!("one on {:?}", x.device().location());
        Err(Error::mismatch("tensor", "one on the store's device", got))
    }

    /// What is held, begun for tensors like `k` if nothing is.
    fn held_mut(&mut self, k: &Tensor) -> Result<&mut Held> {
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

    fn held_mut_known(&mut self) -> Result<&mut Held> {
        self.held.as_mut().ok_or_else(|| Error::mismatch("store", "entries", "none"))
    }

    fn known(&self) -> Result<&Held> {
        self.held.as_ref().ok_or_else(|| Error::mismatch("store", "entries to attend over", "none"))
    }

    fn launch_attend(&self, held: &Held, q: &Tensor, visible: Visible) -> Result<Partial> {
        let AttentionShape { heads, kv_heads, head_dim, scale, window, soft_cap } = self.shape;
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
        let ring = held.in_ring(&stream, held.values);
        with_address(q, q, &stream, |q, _| {
            let args = AttendArgs {
                q,
                packed: held.packed.device_ptr(&stream).0,
                residual_k: ring.k,
                residual_v: ring.v,
                out: out.device_ptr(&stream).0,
                lse: lse.device_ptr(&stream).0,
                part_out: scratch.out.device_ptr(&stream).0,
                part_lse: scratch.lse.device_ptr(&stream).0,
                arrived: scratch.arrived.device_ptr(&stream).0,
                lens: 0,
                packed_stride: (held.capacity * self.layout.record()) as i64,
                packed_len: held.values as i32,
                residual_len: (held.len - held.values) as i32,
                ring_start: ring.start as i32,
                ring: ring.ring,
                kv_heads: kv_heads as i32,
                heads_per_kv: (heads / kv_heads) as i32,
                queries: queries as i32,
                splits: splits as i32,
                causal: (visible == Visible::Causal) as i32,
                window: window.unwrap_or(0) as i32,
                kind: kind(held.dtype),
                out_kind: 2,
                scale,
                soft_cap: soft_cap.unwrap_or(0.0),
            };
            // SAFETY: the sizes above are those that the kernel counts with; calls of one stream follow each other.
            unsafe { kernel.launch(&stream, &args, held.rows, blocks) }
        })?;
        Ok(Partial {
            out: self.tensor(out, &[held.batch, heads, queries, head_dim]),
            lse: self.tensor(lse, &[held.batch, heads, queries]),
        })
    }

    fn tensor<T: candle_core::cuda_backend::CudaDType>(
        &self,
        x: CudaSlice<T>,
        shape: &[usize],
    ) -> Tensor {
        let storage = CudaStorage::wrap_cuda_slice(x, self.device.clone());
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    }

    /// All keys and values in f32, `[batch, kv_heads, len, head_dim]`.
    fn dense(&self) -> Result<(Tensor, Tensor)> {
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

    fn check_causal(&self, q: &Tensor, visible: Visible) -> Result<()> {
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

impl Held {
    /// Of how many tokens keys and values should be packed.
    fn goal(&self, format: Format) -> (usize, usize) {
        let (keys, values) = format.ready(self.len - self.keys, self.len - self.values);
        (self.keys + keys, self.values + values)
    }

    /// Whether keys are packed, or to be packed, whose values are not.
    fn keys_ahead(&self, format: Format) -> bool {
        let (keys, values) = self.goal(format);
        keys > values
    }

    fn in_ring(&self, stream: &CudaStream, token: usize) -> Place {
        let (k, v) = (self.ring_k.device_ptr(stream).0, self.ring_v.device_ptr(stream).0);
        Place { k, v, pitch: self.ring, start: token % self.ring, ring: self.ring as i32 }
    }

    /// Makes room for so many records of each row.
    fn reserve(&mut self, device: &CudaDevice, layout: Layout, records: usize) -> Result<()> {
        if records <= self.capacity {
            return Ok(());
        }
        // A quarter more, so that growth is rare; new records are zero, since attention multiplies unseen ones by zero.
        let capacity = records.max(self.capacity + self.capacity / 4) + 1024 / layout.group;
        let (record, stream) = (layout.record(), device.cuda_stream());
        let mut grown = stream.alloc_zeros::<u8>(self.rows * capacity * record).map_err(wrap)?;
        let old = self.capacity * record;
        for row in 0..if old > 0 { self.rows } else { 0 } {
            let to = row * capacity * record;
            let mut to = grown.slice_mut(to..to + old);
            stream
                .memcpy_dtod(&self.packed.slice(row * old..(row + 1) * old), &mut to)
                .map_err(wrap)?;
        }
        (self.packed, self.capacity) = (grown, capacity);
        Ok(())
    }
}

impl Scratch {
    fn new(stream: &Arc<CudaStream>, parts: usize, head_dim: usize, blocks: usize) -> Result<Self> {
        // SAFETY: kernels write parts before they read them.
        let (out, lse) = unsafe { (stream.alloc(parts * head_dim), stream.alloc(parts)) };
        let arrived = stream.alloc_zeros(blocks).map_err(wrap)?;
        Ok(Self { out: out.map_err(wrap)?, lse: lse.map_err(wrap)?, arrived })
    }
}

fn kind(dtype: DType) -> i32 {
    (dtype == DType::BF16) as i32
}

/// Calls `f` with the device addresses of two contiguous f16 or bf16 tensors.
fn with_address<R>(
    k: &Tensor,
    v: &Tensor,
    stream: &CudaStream,
    f: impl FnOnce(u64, u64) -> Result<R>,
) -> Result<R> {
    let ((k, k_layout), (v, v_layout)) = (k.storage_and_layout(), v.storage_and_layout());
    let (Storage::Cuda(k), Storage::Cuda(v)) = (&*k, &*v) else {
        return Err(Error::mismatch("tensor", "one on a CUDA device", "one elsewhere"));
    };
    let (k_at, v_at) = (2 * k_layout.start_offset() as u64, 2 * v_layout.start_offset() as u64);
    if k.dtype() == DType::BF16 {
        let k = k.as_cuda_slice::<bf16>()?.device_ptr(stream);
        let v = v.as_cuda_slice::<bf16>()?.device_ptr(stream);
        f(k.0 + k_at, v.0 + v_at)
    } else {
        let k = k.as_cuda_slice::<f16>()?.device_ptr(stream);
        let v = v.as_cuda_slice::<f16>()?.device_ptr(stream);
        f(k.0 + k_at, v.0 + v_at)
    }
}

/// # Safety
/// Both places must hold `tokens` tokens of `rows` rows, and not overlap.
unsafe fn move_tokens(
    kernels: &Kernels,
    stream: &CudaStream,
    from: Place,
    to: Place,
    tokens: usize,
    rows: usize,
    pieces: usize,
) -> Result<()> {
    let args = MoveArgs {
        from_k: from.k,
        from_v: from.v,
        to_k: to.k,
        to_v: to.v,
        from_pitch: from.pitch as i64,
        to_pitch: to.pitch as i64,
        from_start: from.start as i32,
        from_ring: from.ring,
        to_start: to.start as i32,
        to_ring: to.ring,
        pieces: pieces as i32,
    };
    // SAFETY: the caller's.
    unsafe { kernels.move_tokens(stream, &args, tokens, rows) }
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
        self.check_causal(q, visible)?;
        let (k, _) = self.dense()?;
        attention::mass(&q.to_dtype(DType::F32)?, &k, lse, &self.shape, visible)
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
