//! Mamba-2's recurrence on the device: kernels/ssd.cu.
#![allow(unsafe_code)]

use super::args;
use super::device_context::{ChunkKernel, DeviceContext};
use super::kernels::{
    Kernel, Rows, SSD_GROUP_TILES_64, SSD_GROUP_TILES_128, SSD_SHARED_64, SSD_SHARED_128,
    SSD_WGMMA_SHARED_64, SSD_WGMMA_SHARED_128, address, uninit,
};
use crate::mamba2::{Mamba2Shape, Ssd as Host};
use candle_core::Tensor;
use longctx_core::{Error, Result};

// Must equal the constant in kernels/args.cuh, like the grids.
const MAX_STATES: usize = 256;
const CHUNK: usize = 64;
/// Thread blocks per cluster of `ssd_wgmma`, each for one head.
const CLUSTER: usize = 2;

#[derive(Debug)]
pub struct Ssd {
    shape: Mamba2Shape,
    a: Tensor,
    skip: Tensor,
    time_bias: Tensor,
    chunk_kernel: Option<ChunkKernel>,
    /// The kernel that runs before `chunk_kernel`, if that is the kernel for compute capability
    /// 9.0.
    group_tiles: Option<GroupTiles>,
    generic: Kernel,
}

/// Values that the heads of a group share in each chunk, computed by a separate kernel.
#[derive(Debug)]
struct GroupTiles {
    kernel: Kernel,
    bytes: u32,
}

impl Ssd {
    pub fn new(host: &Host, to: &DeviceContext) -> Result<Self> {
        let Mamba2Shape { head_dim, states, .. } = host.shape;
        if states > MAX_STATES {
            let what = format!("Mamba-2 with {states} states on a CUDA device");
            return Err(Error::Unsupported(format!("{what}: kernels have up to {MAX_STATES}")));
        }
        let (chunk_kernel, group_tiles) = match (head_dim, states) {
            (64, 64) => chunk_kernel(to, SSD_SHARED_64, SSD_WGMMA_SHARED_64, SSD_GROUP_TILES_64)?,
            (64, 128) => {
                chunk_kernel(to, SSD_SHARED_128, SSD_WGMMA_SHARED_128, SSD_GROUP_TILES_128)?
            }
            _ => (None, None),
        };
        Ok(Self {
            shape: host.shape,
            a: to.vector(&host.a)?,
            skip: to.vector(&host.skip)?,
            time_bias: to.vector(&host.time_bias)?,
            chunk_kernel,
            group_tiles,
            generic: to.kernel("ssd_generic", 128)?,
        })
    }

    /// Runs the recurrence. `mixed`: rows of x, B and C; `steps`: time steps before bias and
    /// softplus, per head. Returns `[batch * tokens, heads * head_dim]`. The state is `[batch,
    /// heads, states, head_dim]`.
    pub fn apply(
        &self,
        mixed: &Tensor,
        steps: &Tensor,
        batch: usize,
        state: &Tensor,
    ) -> Result<Tensor> {
        let Mamba2Shape { heads, head_dim, groups, states, time_step_limit, .. } = self.shape;
        let (rows, inner) = (mixed.dim(0)?, heads * head_dim);
        let tokens = rows / batch;
        // SAFETY: the launch below writes every element.
        let y = unsafe { uninit((rows, inner), mixed)? };
        let part = |start: usize, width: usize| Rows::of(&mixed.narrow(1, start, width)?);
        let (x, b) = (part(0, inner)?, part(inner, groups * states)?);
        let c = part(inner + groups * states, groups * states)?;
        let (of_steps, to_y) = (Rows::of(steps)?, Rows::of(&y)?);
        let chunk_kernel = ChunkKernel::select(&self.chunk_kernel, tokens, &[x, b, c, to_y]);
        let group_tiles = self.group_tiles.as_ref().filter(|_| chunk_kernel.is_some());
        let chunks = tokens.div_ceil(CHUNK);
        // SAFETY: `group_tiles` writes every element that is read.
        let scratch = group_tiles
            .map(|group_tiles| unsafe {
                uninit((batch * groups * (chunks + 1), group_tiles.bytes as usize / 2), mixed)
            })
            .transpose()?;
        let args = args::Ssd {
            x: x.address,
            b: b.address,
            c: c.address,
            steps: of_steps.address,
            a: address(&self.a)?,
            d: address(&self.skip)?,
            bias: address(&self.time_bias)?,
            state: address(state)?,
            y: to_y.address,
            scratch: scratch.as_ref().map_or(Ok(0), address)?,
            tokens: tokens as i32,
            heads: heads as i32,
            head_dim: head_dim as i32,
            groups: groups as i32,
            states: states as i32,
            x_row: x.row,
            b_row: b.row,
            c_row: c.row,
            steps_row: of_steps.row,
            y_row: to_y.row,
            step_min: time_step_limit.0,
            step_max: time_step_limit.1,
        };
        // SAFETY: the sizes are those of the tensors, which live until the end of this function.
        unsafe {
            match (chunk_kernel, group_tiles) {
                (Some(kernel), Some(group_tiles)) => {
                    group_tiles.kernel.launch((chunks, groups, batch), &args)?;
                    let blocks = groups * (heads / groups).next_multiple_of(CLUSTER);
                    kernel.launch((blocks, batch, 1), &args)?;
                }
                (Some(kernel), None) => kernel.launch((2, heads, batch), &args)?,
                (None, _) => self.generic.launch((head_dim.div_ceil(32), heads, batch), &args)?,
            }
        }
        Ok(y)
    }
}

/// Returns the kernel for prompts, and the kernel that runs before it.
fn chunk_kernel(
    to: &DeviceContext,
    shared: u32,
    wgmma_shared: u32,
    tiles_bytes: u32,
) -> Result<(Option<ChunkKernel>, Option<GroupTiles>)> {
    if !to.hopper() {
        return Ok((to.chunk_kernel("ssd", 256, shared)?, None));
    }
    let chunk_kernel = to.chunk_kernel("ssd_wgmma", 384, wgmma_shared)?;
    let group_tiles =
        chunk_kernel.is_some().then(|| to.kernel("ssd_group_tiles", 128)).transpose()?;
    Ok((chunk_kernel, group_tiles.map(|kernel| GroupTiles { kernel, bytes: tiles_bytes })))
}
