//! Which kernels there are, and how they are launched.

use super::args::{AttendArgs, FillArgs, KeepRow, UnpackArgs};
use super::wrap;
use crate::{Axis, Bits, Flush, Format, KeyBasis};
use candle_core::CudaDevice;
use candle_core::cuda::cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use candle_core::cuda::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr,
    LaunchConfig, PushKernelArg,
};
use candle_core::cuda::cudarc::nvrtc::Ptx;
use longctx_core::Result;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

const ATTEND_2: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/attend2.fatbin"));
const ATTEND_4: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/attend4.fatbin"));
const ATTEND_8: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/attend8.fatbin"));
const PACK: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pack.fatbin"));

/// Tokens of a tile, as in kernels/layout.cuh.
pub const TILE: usize = 32;
/// As in kernels/sums.cuh.
const SUM_WARPS: usize = 4;
/// As in kernels/fill.cuh.
const KEEP_THREADS: usize = 256;

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
    function: CudaFunction,
    pub columns: usize,
    pub warps: usize,
    shared: usize,
    /// Blocks that the device runs at a time.
    pub blocks: usize,
}

impl Attend {
    fn load(
        context: &Arc<CudaContext>,
        module: &Arc<CudaModule>,
        layout: Layout,
        n: usize,
    ) -> Result<Option<Self>> {
        let Layout { bits, group, head_dim } = layout;
        // As in kernels/attend*.cu.
        let (warps, stages) = match (bits, head_dim, n) {
            (8, ..) | (_, 256, _) => (4, 3),
            (_, 128, 2) => (4, 4),
            _ => (8, 3),
        };
        let ring = n * 16 * head_dim + warps * stages * (layout.header() + layout.tile());
        let outs = warps * 8 * n * (head_dim + 4) * 4;
        let shared = ring.max(outs);
        let attribute = |a| context.attribute(a).map_err(wrap);
        use CUdevice_attribute::*;
        if attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? < shared as i32 + 4096
        {
            return Ok(None);
        }
        let name = format!("attend_b{bits}_g{group}_d{head_dim}_n{n}");
        let function = module.load_function(&name).map_err(wrap)?;
        use CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC;
        function.set_attribute(DYNAMIC, shared as i32).map_err(wrap)?;
        let threads = 32 * warps as u32;
        let per_sm = function.occupancy_max_active_blocks_per_multiprocessor(threads, shared, None);
        let sms = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let blocks = per_sm.map_err(wrap)? as usize * sms;
        Ok(Some(Self { function, columns: 8 * n, warps, shared, blocks }))
    }

    /// # Safety
    /// The arguments' pointers must be valid on the stream's device for the sizes that kernels/attend.cuh gives.
    pub unsafe fn launch(
        &self,
        stream: &CudaStream,
        args: &AttendArgs,
        blocks: usize,
    ) -> Result<()> {
        let grid = (blocks as u32, 1, 1);
        // SAFETY: the caller's.
        unsafe { launch(stream, &self.function, grid, 32 * self.warps, self.shared, args) }
    }
}

/// The kernels of one layout.
#[derive(Debug, Clone)]
pub struct Kernels {
    /// For 8 columns, and for 16 where there is one.
    pub attend: Vec<Attend>,
    sums: CudaFunction,
    quantize: CudaFunction,
    unpack: CudaFunction,
    fill_rings: CudaFunction,
    keep_ring: CudaFunction,
    layout: Layout,
}

impl Kernels {
    /// Loads them; `None` where the device has too little shared memory.
    pub fn load(device: &CudaDevice, layout: Layout) -> Result<Option<Self>> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let (name, image) = match layout.bits {
            2 => ("attend2", ATTEND_2),
            4 => ("attend4", ATTEND_4),
            _ => ("attend8", ATTEND_8),
        };
        let module = module(context, name, image)?;
        let mut attend = Vec::new();
        for n in if layout.head_dim == 256 { 1..=1 } else { 1..=2 } {
            attend.extend(Attend::load(context, &module, layout, n)?);
        }
        if attend.is_empty() {
            return Ok(None);
        }
        let pack = self::module(context, "pack", PACK)?;
        let Layout { bits, group, head_dim } = layout;
        let load = |name: &str| pack.load_function(name).map_err(wrap);
        Ok(Some(Self {
            attend,
            sums: module
                .load_function(&format!("sums_b{bits}_g{group}_d{head_dim}"))
                .map_err(wrap)?,
            quantize: load(&format!("quantize_b{bits}_g{group}_d{head_dim}"))?,
            unpack: load(&format!("unpack_b{bits}_g{group}_d{head_dim}"))?,
            fill_rings: load("fill_rings")?,
            keep_ring: load("keep_ring")?,
            layout,
        }))
    }

    /// For `rows` kv heads of which the longest has `tiles` tiles, and so many heads each.
    ///
    /// # Safety
    /// As [`Attend::launch`], with kernels/sums.cuh.
    pub unsafe fn sums(
        &self,
        stream: &CudaStream,
        args: &AttendArgs,
        (tiles, rows, heads): (usize, usize, usize),
    ) -> Result<()> {
        let grid = (tiles.div_ceil(SUM_WARPS) as u32, rows as u32, heads as u32);
        let shared = SUM_WARPS * (self.layout.header() + self.layout.codes());
        // SAFETY: the caller's.
        unsafe { launch(stream, &self.sums, grid, 32 * SUM_WARPS, shared, args) }
    }

    /// For `rows` rows of which one has the most records for keys, one the most tiles of values.
    ///
    /// # Safety
    /// As [`Attend::launch`], with kernels/quantize.cuh.
    pub unsafe fn quantize(
        &self,
        stream: &CudaStream,
        args: &FillArgs,
        (records, tiles, rows): (usize, usize, usize),
    ) -> Result<()> {
        let grid = ((records * self.layout.key_parts()).max(tiles) as u32, rows as u32, 2);
        // SAFETY: the caller's.
        unsafe { launch(stream, &self.quantize, grid, 128, self.layout.quantize_shared(), args) }
    }

    /// # Safety
    /// As [`Attend::launch`], with kernels/unpack.cuh.
    pub unsafe fn unpack(&self, stream: &CudaStream, args: &UnpackArgs) -> Result<()> {
        let numbers = args.entries as usize * self.layout.head_dim;
        // SAFETY: the caller's.
        unsafe { launch(stream, &self.unpack, (numbers.div_ceil(256) as u32, 1, 1), 256, 0, args) }
    }

    /// # Safety
    /// As [`Attend::launch`], with kernels/fill.cuh.
    pub unsafe fn fill_rings(
        &self,
        stream: &CudaStream,
        args: &FillArgs,
        (entries, rows): (usize, usize),
    ) -> Result<()> {
        let grid = (entries as u32, rows as u32, 2);
        // SAFETY: the caller's.
        unsafe { launch(stream, &self.fill_rings, grid, args.pieces as usize, 0, args) }
    }

    /// # Safety
    /// As [`Attend::launch`], with kernels/fill.cuh.
    pub unsafe fn keep_ring(&self, stream: &CudaStream, rows: &CudaSlice<KeepRow>) -> Result<()> {
        let (grid, address) = ((rows.len() as u32, 2, 1), rows.device_ptr(stream).0);
        // SAFETY: the caller's.
        unsafe { launch(stream, &self.keep_ring, grid, KEEP_THREADS, 0, &address) }
    }
}

/// # Safety
/// `args` must be what the kernel takes, and right for its grid.
unsafe fn launch<A: DeviceRepr>(
    stream: &CudaStream,
    function: &CudaFunction,
    grid_dim: (u32, u32, u32),
    threads: usize,
    shared: usize,
    args: &A,
) -> Result<()> {
    if grid_dim.0 == 0 {
        return Ok(());
    }
    let config = LaunchConfig {
        grid_dim,
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    };
    let mut builder = stream.launch_builder(function);
    builder.arg(args);
    // SAFETY: the caller's.
    unsafe { builder.launch(config) }.map_err(wrap)?;
    Ok(())
}

/// A module, loaded once for each context.
fn module(context: &Arc<CudaContext>, name: &'static str, image: &[u8]) -> Result<Arc<CudaModule>> {
    type Modules = HashMap<(usize, &'static str), Arc<CudaModule>>;
    static LOADED: Mutex<Option<Modules>> = Mutex::new(None);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let loaded = loaded.get_or_insert_default();
    let key = (context.cu_ctx() as usize, name);
    if let Some(module) = loaded.get(&key) {
        return Ok(module.clone());
    }
    let module = context.load_module(Ptx::from_binary(image.to_vec())).map_err(wrap)?;
    loaded.insert(key, module.clone());
    Ok(module)
}
