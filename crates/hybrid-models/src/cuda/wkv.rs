//! The recurrences of RWKV-5, 6 and 7 on the device: kernels/wkv.cu.
#![allow(unsafe_code)]

use super::args;
use super::device_context::{ChunkKernel, DeviceContext};
use super::kernels::{
    Kernel, Rows, WKV_PRODUCER_SHARED, WKV_SHARED, WKV7_HALF_SHARED, WKV7_SHARED, address, uninit,
};
use crate::rwkv::V7;
use candle_core::{DType, Tensor};
use longctx_core::{Error, Result};

/// The largest number of channels per head. It and the grids must equal those in kernels/args.cuh.
const MAX_CHANNELS: usize = 128;
/// Channels per head in published models, which have their own kernels.
const COMMON_CHANNELS: usize = 64;

/// The kernels of one version.
#[derive(Debug)]
struct Version {
    heads: usize,
    dim: usize,
    chunk_kernel: Option<ChunkKernel>,
    /// The largest total number of thread blocks for which `chunk_kernel` uses two per head; above
    /// it uses one.
    max_split_blocks: usize,
    generic: Kernel,
}

impl Version {
    fn new(name: &str, heads: usize, dim: usize, to: &DeviceContext) -> Result<Self> {
        if dim > MAX_CHANNELS {
            let what = format!("RWKV with heads of {dim} channels on a CUDA device");
            return Err(Error::Unsupported(format!("{what}: kernels have up to {MAX_CHANNELS}")));
        }
        let (chunk_kernel, whole) = match (name, dim) {
            ("wkv5" | "wkv6", COMMON_CHANNELS) => Self::with_producers(name, to)?,
            ("wkv7", COMMON_CHANNELS) => match to.in_f32(name, 128)? {
                None => match to.chunk_kernel(name, 384, WKV7_SHARED)? {
                    None => (to.chunk_kernel(name, 384, WKV7_HALF_SHARED)?, false),
                    whole => (whole, true),
                },
                in_f32 => (in_f32, false),
            },
            _ => (None, false),
        };
        let max_split_blocks = if whole { to.processors() } else { usize::MAX };
        let generic = to.kernel(&format!("{name}_generic"), 128)?;
        Ok(Self { heads, dim, chunk_kernel, max_split_blocks, generic })
    }

    /// Returns the chunk kernel of version 5 or 6 with as many producer warps as fit in shared
    /// memory, and whether one thread block may process a whole head.
    fn with_producers(name: &str, to: &DeviceContext) -> Result<(Option<ChunkKernel>, bool)> {
        for producers in [6, 4, 2] {
            let shared = WKV_SHARED + producers * WKV_PRODUCER_SHARED;
            let kernel = to.chunk_kernel(name, 32 * (2 + producers), shared)?;
            if kernel.is_some() {
                return Ok((kernel, producers > 2));
            }
        }
        Ok((None, false))
    }

    /// # Safety
    /// As [`Kernel::launch`]. `rows` are all matrices in `args` with the dtype of the weights.
    unsafe fn launch<A: longctx_cuda::cudarc::driver::DeviceRepr>(
        &self,
        rows: &[Rows],
        (batch, tokens): (usize, usize),
        args: &A,
    ) -> Result<()> {
        // SAFETY: the caller guarantees the addresses.
        unsafe {
            match ChunkKernel::select(&self.chunk_kernel, tokens, rows) {
                Some(kernel) => {
                    let blocks =
                        if 2 * self.heads * batch <= self.max_split_blocks { 2 } else { 1 };
                    kernel.launch((blocks, self.heads, batch), args)
                }
                None => self.generic.launch((self.dim.div_ceil(32), self.heads, batch), args),
            }
        }
    }
}

/// The recurrence of versions 5 and 6.
#[derive(Debug)]
pub struct Wkv {
    version: Version,
    /// In version 5, the decay of each token. In version 6, a bias added to the token's own decay
    /// before e^−e^.
    decay: Tensor,
    bonus: Tensor,
}

impl Wkv {
    /// Copies weights to the device. `name`: "wkv5" or "wkv6".
    pub fn new(
        name: &str,
        decay: &[f32],
        bonus: &[f32],
        dim: usize,
        to: &DeviceContext,
    ) -> Result<Self> {
        let version = Version::new(name, bonus.len() / dim, dim, to)?;
        Ok(Self { version, decay: to.vector(decay)?, bonus: to.vector(bonus)? })
    }

    /// Takes receptance, key, value and, in version 6, the tokens' decays, each `[batch * tokens,
    /// channels]`. The state is `[batch, heads, keys, values]`.
    pub fn apply(
        &self,
        [r, k, v]: [&Tensor; 3],
        w: Option<&Tensor>,
        batch: usize,
        state: &Tensor,
    ) -> Result<Tensor> {
        let (rows, channels) = r.dims2()?;
        let tokens = rows / batch;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, channels), r)? };
        let [r, k, v, to_y] = [Rows::of(r)?, Rows::of(k)?, Rows::of(v)?, Rows::of(&y)?];
        let w = w.map_or(Ok(Rows { address: 0, row: 0 }), Rows::of)?;
        let args = args::Wkv {
            r: r.address,
            k: k.address,
            v: v.address,
            w: w.address,
            decay: address(&self.decay)?,
            u: address(&self.bonus)?,
            state: address(state)?,
            y: to_y.address,
            tokens: tokens as i32,
            heads: self.version.heads as i32,
            dim: self.version.dim as i32,
            r_row: r.row,
            k_row: k.row,
            v_row: v.row,
            w_row: w.row,
            y_row: to_y.row,
        };
        // SAFETY: the sizes are those of the tensors, which live until the end of this function.
        unsafe { self.version.launch(&[r, k, v, w, to_y], (batch, tokens), &args)? };
        Ok(y)
    }
}

/// The delta rule of version 7, including the preparation of its keys.
#[derive(Debug)]
pub struct Wkv7 {
    version: Version,
    decay: Tensor,
    rate_bias: Tensor,
    removal_scale: Tensor,
    key_rate: Tensor,
    bonus_weight: Tensor,
}

impl Wkv7 {
    pub fn new(host: &V7, to: &DeviceContext) -> Result<Self> {
        Ok(Self {
            version: Version::new("wkv7", host.heads, host.head_dim, to)?,
            decay: to.vector(&host.decay.bias)?,
            rate_bias: to.vector(&host.rate.bias)?,
            removal_scale: to.vector(&host.removal_scale)?,
            key_rate: to.vector(&host.key_rate)?,
            bonus_weight: to.vector(&host.bonus)?,
        })
    }

    /// Takes receptance, key, value, and decay and rate before their biases, each `[batch * tokens,
    /// channels]`. The state is `[batch, heads, keys, values]`. Returns the output and, in f32
    /// `[batch * tokens, heads]`, the factor of the value that is added to each head after the
    /// norm.
    pub fn apply(
        &self,
        [r, key, v, w, a]: [&Tensor; 5],
        batch: usize,
        state: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let (rows, channels) = r.dims2()?;
        let (tokens, heads) = (rows / batch, self.version.heads);
        // SAFETY: the launch below writes every element of both.
        let (y, bonus) = unsafe {
            let bonus = Tensor::empty((rows, heads), DType::F32, r.device())?;
            (uninit((rows, channels), r)?, bonus)
        };
        let [r, key, v] = [Rows::of(r)?, Rows::of(key)?, Rows::of(v)?];
        let [w, a, to_y] = [Rows::of(w)?, Rows::of(a)?, Rows::of(&y)?];
        let args = args::Wkv7 {
            r: r.address,
            key: key.address,
            v: v.address,
            w: w.address,
            a: a.address,
            decay: address(&self.decay)?,
            rate_bias: address(&self.rate_bias)?,
            removal_scale: address(&self.removal_scale)?,
            key_rate: address(&self.key_rate)?,
            bonus_weight: address(&self.bonus_weight)?,
            state: address(state)?,
            y: to_y.address,
            bonus: address(&bonus)?,
            tokens: tokens as i32,
            heads: heads as i32,
            dim: self.version.dim as i32,
            r_row: r.row,
            key_row: key.row,
            v_row: v.row,
            w_row: w.row,
            a_row: a.row,
            y_row: to_y.row,
        };
        // SAFETY: the sizes are those of the tensors, which live until the end of this function.
        unsafe { self.version.launch(&[r, key, v, w, a, to_y], (batch, tokens), &args)? };
        Ok((y, bonus))
    }
}
