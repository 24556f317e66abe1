//! The compiled kernels and their launches.

use super::args::{AttendArgs, FillArgs, KeepRow, UnpackArgs};
use super::layout::{Family, Layout};
use longctx_core::Result;
use longctx_cuda::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use longctx_cuda::{Image, Kernel, max_shared_bytes, multiprocessors};
use std::sync::Arc;

static ATTEND_2: Image = longctx_cuda::image!("attend2");
static ATTEND_4: Image = longctx_cuda::image!("attend4");
static ATTEND_8: Image = longctx_cuda::image!("attend8");
static PACK: Image = longctx_cuda::image!("pack");
static FLOAT8: Image = longctx_cuda::image!("float8");
static ROTATED: Image = longctx_cuda::image!("rotated");
static TURBOQUANT: Image = longctx_cuda::image!("turboquant");
static KVARN: Image = longctx_cuda::image!("kvarn");

/// Tokens of a tile, as in kernels/layout.cuh.
pub const TILE: usize = 32;
/// Must equal the constant in kernels/sums.cuh.
const SUM_WARPS: usize = 4;
/// Must equal the constant in kernels/unpack.cuh.
const UNPACK_THREADS: usize = 256;
/// Must equal the constant in kernels/tokens.cuh.
const TOKEN_THREADS: u32 = 256;
/// Must equal the constant in kernels/fill.cuh.
const KEEP_THREADS: u32 = 256;

impl Layout {
    /// Returns the image of the kernels, except those that pack and unpack KIVI's records.
    fn image(self) -> &'static Image {
        match self.family {
            Family::Kivi(2) => &ATTEND_2,
            Family::Kivi(4) => &ATTEND_4,
            Family::Kivi(_) => &ATTEND_8,
            Family::Balanced(_) => &KVARN,
            Family::Tokens(name) if name.starts_with('e') => &FLOAT8,
            Family::Tokens("k8v4") => &TURBOQUANT,
            Family::Tokens(name) if name.starts_with("levels") => &TURBOQUANT,
            Family::Tokens(_) => &ROTATED,
        }
    }

    /// Returns the image of the kernels that pack and unpack.
    fn pack_image(self) -> &'static Image {
        match self.family {
            Family::Kivi(_) => &PACK,
            _ => self.image(),
        }
    }

    /// Returns the suffix of the kernels' names.
    fn suffix(self) -> String {
        let (group, d) = (self.group, self.head_dim);
        match self.family {
            Family::Kivi(bits) => format!("b{bits}_g{group}_d{d}"),
            Family::Tokens(name) | Family::Balanced(name) => format!("{name}_d{d}"),
        }
    }

    /// Returns the packing kernel's thread blocks per record, threads per block, and bytes of
    /// shared memory.
    fn quantize(self) -> (usize, u32, usize) {
        let (group, d) = (self.group, self.head_dim);
        match self.family {
            Family::Kivi(_) => {
                let channels = d.min(8192 / group);
                let source = 2 * (group * channels).max(TILE * d);
                let keys = self.key_codes() / d * channels * (group / TILE) + 4 * channels;
                let shared = source + keys.max(self.tile() - self.key_codes());
                (d / channels, 128, shared)
            }
            Family::Tokens(_) => (group / TILE, TOKEN_THREADS, 0),
            Family::Balanced(_) => {
                let threads = if d > 128 { 512 } else { 256 };
                let (warps, most) = (threads / 32, group.max(d));
                let numbers = group + 2 * d + 2 * warps * d + 4 * warps + 2 * most;
                (1, threads as u32, 4 * numbers + group * (d + 8))
            }
        }
    }
}

/// An attention kernel for thread blocks of a number of columns (query heads of a kv head times
/// queries).
#[derive(Debug, Clone)]
pub struct Attend {
    kernel: Kernel,
    pub columns: usize,
    pub warps: usize,
    /// Number of thread blocks that the device runs concurrently.
    pub blocks: usize,
}

impl Attend {
    fn load(context: &Arc<CudaContext>, layout: Layout, n: usize) -> Result<Option<Self>> {
        let head_dim = layout.head_dim;
        let (warps, stages) = layout.warps_and_stages(n);
        let ring = n * 16 * head_dim + warps * stages * (layout.header() + layout.tile());
        let outs = warps * 8 * n * (head_dim + 4) * 4;
        let shared = ring.max(outs) as u32;
        if max_shared_bytes(context)? < shared + 4096 {
            return Ok(None);
        }
        let name = match layout.family {
            Family::Kivi(_) => format!("attend_{}_n{n}", layout.suffix()),
            _ => format!("attend_{}", layout.suffix()),
        };
        let kernel = layout.image().kernel(context, &name, 32 * warps as u32, shared)?;
        let blocks = kernel.blocks_per_multiprocessor()? * multiprocessors(context)?;
        Ok(Some(Self { kernel, columns: 8 * n, warps, blocks }))
    }

    /// # Safety
    /// The arguments' addresses must be those of arrays on the stream's device, with the sizes
    /// stated in kernels/attend.cuh.
    pub unsafe fn launch(
        &self,
        stream: &Arc<CudaStream>,
        args: &AttendArgs,
        blocks: usize,
    ) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        Ok(unsafe { self.kernel.launch(stream, [blocks, 1, 1], args) }?)
    }
}

/// The kernels of one layout.
#[derive(Debug, Clone)]
pub struct Kernels {
    /// Attention kernels for 8 columns and, if it exists, for 16.
    pub attend: Vec<Attend>,
    sums: Kernel,
    quantize: Kernel,
    unpack: Kernel,
    fill_rings: Kernel,
    keep_ring: Kernel,
    layout: Layout,
}

impl Kernels {
    /// Loads the kernels; `None` if the device has too little shared memory.
    pub fn load(context: &Arc<CudaContext>, layout: Layout) -> Result<Option<Self>> {
        let mut attend = Vec::new();
        let wide = layout.head_dim < 256 && matches!(layout.family, Family::Kivi(_));
        for n in 1..=1 + usize::from(wide) {
            attend.extend(Attend::load(context, layout, n)?);
        }
        if attend.is_empty() {
            return Ok(None);
        }
        let (_, quantize_threads, quantize_shared) = layout.quantize();
        if max_shared_bytes(context)? < quantize_shared as u32 {
            return Ok(None);
        }
        let of = |name: &str| format!("{name}_{}", layout.suffix());
        let sums_shared = SUM_WARPS * (layout.header() + layout.key_params() + layout.key_codes());
        let sums_threads = 32 * SUM_WARPS as u32;
        let sums = layout.image().kernel(context, &of("sums"), sums_threads, sums_shared as u32)?;
        let pack = layout.pack_image();
        let quantize =
            pack.kernel(context, &of("quantize"), quantize_threads, quantize_shared as u32)?;
        Ok(Some(Self {
            attend,
            sums,
            quantize,
            unpack: pack.kernel(context, &of("unpack"), UNPACK_THREADS as u32, 0)?,
            fill_rings: PACK.kernel(context, "fill_rings", layout.head_dim as u32 / 8, 0)?,
            keep_ring: PACK.kernel(context, "keep_ring", KEEP_THREADS, 0)?,
            layout,
        }))
    }

    /// Launches attention sums for `rows` kv heads. The longest has `tiles` tiles; each has `heads`
    /// query heads.
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
        // SAFETY: guaranteed by the caller.
        Ok(unsafe { self.sums.launch(stream, grid, args) }?)
    }

    /// Launches packing for `rows` rows, with the largest numbers of key records and of value tiles
    /// in a row.
    ///
    /// # Safety
    /// As [`Attend::launch`], with kernels/quantize.cuh.
    pub unsafe fn quantize(
        &self,
        stream: &Arc<CudaStream>,
        args: &FillArgs,
        (records, tiles, rows): (usize, usize, usize),
    ) -> Result<()> {
        let grid = [(records * self.layout.quantize().0).max(tiles), rows, 2];
        // SAFETY: guaranteed by the caller.
        Ok(unsafe { self.quantize.launch(stream, grid, args) }?)
    }

    /// # Safety
    /// As [`Attend::launch`], with kernels/unpack.cuh.
    pub unsafe fn unpack(&self, stream: &Arc<CudaStream>, args: &UnpackArgs) -> Result<()> {
        let grid = [(args.entries as usize).div_ceil(UNPACK_THREADS / 32), 1, 1];
        // SAFETY: guaranteed by the caller.
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
        // SAFETY: guaranteed by the caller.
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
        // SAFETY: guaranteed by the caller.
        Ok(unsafe { self.keep_ring.launch(stream, [rows.len(), 2, 1], &address) }?)
    }
}
