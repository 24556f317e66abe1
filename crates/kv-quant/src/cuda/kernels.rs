//! Which kernels there are, and how they are launched.

use super::args::{AttendArgs, FillArgs, KeepRow, UnpackArgs};
use crate::{Axis, Bits, Flush, Format, KeyBasis};
use longctx_core::Result;
use longctx_cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use longctx_cuda::{Image, Kernel, most_shared_bytes, multiprocessors};
use std::sync::Arc;

static ATTEND_2: Image = longctx_cuda::image!("attend2");
static ATTEND_4: Image = longctx_cuda::image!("attend4");
static ATTEND_8: Image = longctx_cuda::image!("attend8");
static PACK: Image = longctx_cuda::image!("pack");

/// Tokens of a tile, as in kernels/layout.cuh.
pub const TILE: usize = 32;
/// As in kernels/sums.cuh.
const SUM_WARPS: usize = 4;
const UNPACK_THREADS: usize = 256;
/// As in kernels/fill.cuh.
const KEEP_THREADS: u32 = 256;

/// Sizes in bytes of the packed layout: kernels/layout.cuh.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    pub bits: usize,
    pub group: usize,
    pub head_dim: usize,
}

impl Layout {
    /// The layout of a format, if there are kernels for it; otherwise what they lack.
    pub fn of(format: Format, head_dim: usize) -> Result<Self, &'static str> {
        let (keys, values) = (format.keys(), format.values());
        let bits = keys.bits.count();
        if !matches!(keys.bits, Bits::Two | Bits::Four | Bits::Eight) || keys.bits != values.bits {
            return Err("keys and values of the same 2, 4 or 8 bits");
        }
        if keys.along != Axis::Tokens || keys.group != values.group {
            return Err("keys quantized along tokens in groups as large as the values'");
        }
        if !matches!(format.flush(), Flush::Rolling(_) | Flush::Staggered(_)) {
            return Err("a full-precision residual");
        }
        if format.basis() != KeyBasis::Given {
            return Err("keys packed as they come");
        }
        if !matches!(head_dim, 64 | 128 | 256) {
            return Err("heads of 64, 128 or 256 channels");
        }
        Ok(Self { bits, group: keys.group, head_dim })
    }

    /// The kernels of attention over it.
    fn image(self) -> &'static Image {
        match self.bits {
            2 => &ATTEND_2,
            4 => &ATTEND_4,
            _ => &ATTEND_8,
        }
    }

    /// Groups of a token's values.
    pub fn value_groups(self) -> usize {
        self.head_dim.div_ceil(self.group)
    }

    /// Codes of 32 tokens' keys, or values.
    pub fn codes(self) -> usize {
        TILE * self.head_dim * self.bits / 8
    }

    fn header(self) -> usize {
        4 * self.head_dim
    }

    fn tile(self) -> usize {
        2 * self.codes() + 4 * TILE * self.value_groups()
    }

    /// `group` tokens' keys and values.
    pub fn record(self) -> usize {
        self.header() + self.group / TILE * self.tile()
    }

    /// Channels of a block of the kernel that packs keys.
    fn key_parts(self) -> usize {
        self.head_dim / self.head_dim.min(8192 / self.group)
    }

    fn quantize_shared(self) -> usize {
        let channels = self.head_dim / self.key_parts();
        let source = 2 * (self.group * channels).max(TILE * self.head_dim);
        let keys = self.group * channels * self.bits / 8 + 4 * channels;
        source + keys.max(self.tile() - self.codes())
    }
}

/// An attention kernel for blocks of so many columns: query heads of a kv head times queries.
#[derive(Debug, Clone)]
pub struct Attend {
    kernel: Kernel,
    pub columns: usize,
    pub warps: usize,
    /// Blocks that the device runs at a time.
    pub blocks: usize,
}

impl Attend {
    fn load(context: &Arc<CudaContext>, layout: Layout, n: usize) -> Result<Option<Self>> {
        let Layout { bits, group, head_dim } = layout;
        // As in kernels/attend*.cu.
        let (warps, stages) = match (bits, head_dim, n) {
            (8, ..) | (_, 256, _) => (4, 3),
            (_, 128, 2) => (4, 4),
            _ => (8, 3),
        };
        let ring = n * 16 * head_dim + warps * stages * (layout.header() + layout.tile());
        let outs = warps * 8 * n * (head_dim + 4) * 4;
        let shared = ring.max(outs) as u32;
        if most_shared_bytes(context)? < shared + 4096 {
            return Ok(None);
        }
        let name = format!("attend_b{bits}_g{group}_d{head_dim}_n{n}");
        let kernel = layout.image().kernel(context, &name, 32 * warps as u32, shared)?;
        let blocks = kernel.blocks_per_multiprocessor()? * multiprocessors(context)?;
        Ok(Some(Self { kernel, columns: 8 * n, warps, blocks }))
    }

    /// # Safety
    /// The arguments' pointers must be valid on the stream's device for the sizes that
    /// kernels/attend.cuh gives.
    pub unsafe fn launch(
        &self,
        stream: &Arc<CudaStream>,
        args: &AttendArgs,
        blocks: usize,
    ) -> Result<()> {
        // SAFETY: the caller's.
        Ok(unsafe { self.kernel.launch(stream, [blocks, 1, 1], args) }?)
    }
}

/// The kernels of one layout.
#[derive(Debug, Clone)]
pub struct Kernels {
    /// For 8 columns, and for 16 where there is one.
    pub attend: Vec<Attend>,
    sums: Kernel,
    quantize: Kernel,
    unpack: Kernel,
    fill_rings: Kernel,
    keep_ring: Kernel,
    layout: Layout,
}

impl Kernels {
    /// Loads them; `None` where the device has too little shared memory.
    pub fn load(context: &Arc<CudaContext>, layout: Layout) -> Result<Option<Self>> {
        let mut attend = Vec::new();
        for n in if layout.head_dim == 256 { 1..=1 } else { 1..=2 } {
            attend.extend(Attend::load(context, layout, n)?);
        }
        if attend.is_empty() {
            return Ok(None);
        }
        let Layout { bits, group, head_dim } = layout;
        let of = |name: &str| format!("{name}_b{bits}_g{group}_d{head_dim}");
        let sums_shared = SUM_WARPS * (layout.header() + layout.codes());
        let sums_threads = 32 * SUM_WARPS as u32;
        let sums = layout.image().kernel(context, &of("sums"), sums_threads, sums_shared as u32)?;
        let quantize_shared = layout.quantize_shared() as u32;
        Ok(Some(Self {
            attend,
            sums,
            quantize: PACK.kernel(context, &of("quantize"), 128, quantize_shared)?,
            unpack: PACK.kernel(context, &of("unpack"), UNPACK_THREADS as u32, 0)?,
            fill_rings: PACK.kernel(context, "fill_rings", head_dim as u32 / 8, 0)?,
            keep_ring: PACK.kernel(context, "keep_ring", KEEP_THREADS, 0)?,
            layout,
        }))
    }

    /// For `rows` kv heads of which the longest has `tiles` tiles, and so many heads each.
    ///
    /// # Safety
    /// As [`Attend::launch`], with kernels/sums.cuh.
    pub unsafe fn sums(
        &self,
        stream: &Arc<CudaStream>,
        args: &AttendArgs,
        (tiles, rows, heads): (usize, usize, usize),
    ) -> Result<()> {
        let grid = [tiles.div_ceil(SUM_WARPS), rows, heads];
        // SAFETY: the caller's.
        Ok(unsafe { self.sums.launch(stream, grid, args) }?)
    }

    /// For `rows` rows of which one has the most records for keys, one the most tiles of values.
    ///
    /// # Safety
    /// As [`Attend::launch`], with kernels/quantize.cuh.
    pub unsafe fn quantize(
        &self,
        stream: &Arc<CudaStream>,
        args: &FillArgs,
        (records, tiles, rows): (usize, usize, usize),
    ) -> Result<()> {
        let grid = [(records * self.layout.key_parts()).max(tiles), rows, 2];
        // SAFETY: the caller's.
        Ok(unsafe { self.quantize.launch(stream, grid, args) }?)
    }

    /// # Safety
    /// As [`Attend::launch`], with kernels/unpack.cuh.
    pub unsafe fn unpack(&self, stream: &Arc<CudaStream>, args: &UnpackArgs) -> Result<()> {
        let numbers = args.entries as usize * self.layout.head_dim;
        let grid = [numbers.div_ceil(UNPACK_THREADS), 1, 1];
        // SAFETY: the caller's.
        Ok(unsafe { self.unpack.launch(stream, grid, args) }?)
    }

    /// # Safety
    /// As [`Attend::launch`], with kernels/fill.cuh.
    pub unsafe fn fill_rings(
        &self,
        stream: &Arc<CudaStream>,
        args: &FillArgs,
        (entries, rows): (usize, usize),
    ) -> Result<()> {
        // SAFETY: the caller's.
        Ok(unsafe { self.fill_rings.launch(stream, [entries, rows, 2], args) }?)
    }
    /// # Safety
    /// As [`Attend::launch`], with kernels/fill.cuh.
    pub unsafe fn keep_ring(
        &self,
        stream: &Arc<CudaStream>,
        rows: &CudaSlice<KeepRow>,
    ) -> Result<()> {
        let address = rows.device_ptr(stream).0;
        // SAFETY: the caller's.
        Ok(unsafe { self.keep_ring.launch(stream, [rows.len(), 2, 1], &address) }?)
    }
}
