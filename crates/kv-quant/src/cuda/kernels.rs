//! The compiled kernels and their launches.

use super::layout::{Family, Layout, needs};
use super::plan::{Plan, Sizes};
use super::{AttendArgs, Error, FillArgs, Result, TILE, UnpackArgs, Work};
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream};
use longctx_cuda::{Image, Kernel, max_shared_bytes, multiprocessors};
use std::sync::Arc;

static ATTEND_22: Image = longctx_cuda::image!("attend22");
static ATTEND_33: Image = longctx_cuda::image!("attend33");
static ATTEND_44: Image = longctx_cuda::image!("attend44");
static ATTEND_88: Image = longctx_cuda::image!("attend88");
static ATTEND_42: Image = longctx_cuda::image!("attend42");
static ATTEND_24: Image = longctx_cuda::image!("attend24");
static PACK: Image = longctx_cuda::image!("pack");
static FLOAT8: Image = longctx_cuda::image!("float8");
static ROTATED: Image = longctx_cuda::image!("rotated");
static TURBOQUANT: Image = longctx_cuda::image!("turboquant");
static KVARN: Image = longctx_cuda::image!("kvarn");
static KVARN_64: Image = longctx_cuda::image!("kvarn64");

/// From this number of kv heads on, small thread blocks are faster: more of them share a
/// multiprocessor, and one streams while another begins or merges its results.
const MANY_HEADS: usize = 16;
/// Those of the kernels for few heads, as in kernels/attend*.cu.
const FEW_WARPS_AND_STAGES: (usize, usize) = (8, 3);
/// Must equal the constant in kernels/sums.cuh.
const SUM_WARPS: usize = 4;
/// Must equal the constant in kernels/unpack.cuh.
const UNPACK_THREADS: usize = 256;
/// Must equal the constant in kernels/tokens.cuh.
const TOKEN_THREADS: u32 = 32;
/// Must equal the constant in kernels/fill.cuh.
const KEEP_THREADS: u32 = 256;

impl Layout {
    /// Returns the image of the kernels, except those that pack and unpack KIVI's records.
    fn image(self) -> &'static Image {
        match self.family {
            Family::Kivi("kivi22") => &ATTEND_22,
            Family::Kivi("kivi33") => &ATTEND_33,
            Family::Kivi("kivi44") => &ATTEND_44,
            Family::Kivi("kivi42") => &ATTEND_42,
            Family::Kivi("kivi24") => &ATTEND_24,
            Family::Kivi(_) => &ATTEND_88,
            Family::Balanced(_) if self.group() == 64 => &KVARN_64,
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
        let (group, d) = (self.group(), self.head_dim());
        match self.family {
            Family::Tokens(name) => format!("{name}_d{d}"),
            Family::Kivi(name) | Family::Balanced(name) => format!("{name}_g{group}_d{d}"),
        }
    }

    /// Returns the packing kernel's thread blocks per record, threads per block, and bytes of
    /// shared memory.
    fn quantize(self) -> (usize, u32, usize) {
        let (group, d) = (self.group(), self.head_dim());
        match self.family {
            Family::Kivi(_) => {
                // Codes of 3 bits are 4-bit fields in shared memory.
                let codes = |bits, channels| TILE * channels * if bits == 3 { 4 } else { bits } / 8;
                let channels = d.min(8192 / group);
                let source = 2 * (group * channels).max(TILE * d);
                let keys = codes(self.key_bits(), channels) * (group / TILE) + 4 * channels;
                let values = codes(self.value_bits(), d) + self.value_params();
                (d / channels, 128, source + keys.max(values))
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

/// An attention kernel, for a number of columns per thread block.
#[derive(Debug, Clone)]
pub struct AttendKernel {
    kernel: Kernel,
    layout: Layout,
    columns: usize,
    warps: usize,
    slots: usize,
}

impl AttendKernel {
    /// Loads the kernel for `8 n` columns, or the one for few heads; `None` if the device has too
    /// little shared memory.
    fn load(
        context: &Arc<CudaContext>,
        layout: Layout,
        (n, few): (usize, bool),
    ) -> Result<Option<Self>> {
        let head_dim = layout.head_dim();
        let (warps, stages) = if few { FEW_WARPS_AND_STAGES } else { layout.warps_and_stages(n) };
        let ring = n * 16 * head_dim + warps * stages * (layout.header() + layout.tile());
        let outs = warps * 8 * n * (head_dim + 4) * 4;
        let shared = ring.max(outs) as u32;
        if max_shared_bytes(context)? < shared + 4096 {
            return Ok(None);
        }
        let name = match layout.family {
            Family::Kivi(_) if few => format!("attend_{}_few", layout.suffix()),
            Family::Kivi(_) => format!("attend_{}_n{n}", layout.suffix()),
            _ => format!("attend_{}", layout.suffix()),
        };
        let kernel = layout.image().kernel(context, &name, 32 * warps as u32, shared)?;
        let slots = kernel.blocks_per_multiprocessor()? * multiprocessors(context)?;
        Ok(Some(Self { kernel, layout, columns: 8 * n, warps, slots }))
    }

    /// Returns the columns of a thread block: query heads of a kv head times queries.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Splits attention over the device's thread blocks.
    ///
    /// `heads` has one work item for each kv head of each sequence, over all its slots. `window` is
    /// the sliding window of causal attention: records before it are not read.
    pub fn plan(&self, heads: &[Work], heads_per_kv: usize, window: Option<usize>) -> Plan {
        Plan::new(heads, self.sizes(heads_per_kv, window))
    }

    /// Returns the sizes that determine a plan.
    pub(crate) fn sizes(&self, heads_per_kv: usize, window: Option<usize>) -> Sizes {
        Sizes {
            group: self.layout.group(),
            heads_per_kv,
            columns: self.columns,
            warps: self.warps,
            slots: self.slots,
            window,
        }
    }

    /// Returns the largest number of work items, and of partial results, of a plan for `heads` kv
    /// heads of all sequences, each with `columns` query heads times queries: the length of the
    /// list of a captured launch. Such a plan has at most `heads * columns.div_ceil(self.columns())`
    /// merges.
    pub fn max_work(&self, heads: usize, columns: usize) -> usize {
        2 * self.slots + 2 * heads * columns.div_ceil(self.columns)
    }

    /// Launches attention for the `count` work items of a [`Plan`]. `early`: the launch before this one
    /// in the stream is [`Kernels::fill_rings`], during which attention can start to read records.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for invalid dtypes or numbers of heads; an error of the CUDA driver.
    ///
    /// # Safety
    /// The addresses must be those of arrays on the stream's device, of the sizes and formats that
    /// the fields of [`AttendArgs`], [`Work`] and [`KvHead`](super::KvHead) give, until the launched work has finished. Tables
    /// and lengths must stay within the arrays that they describe. `early` must be as documented.
    pub unsafe fn launch(
        &self,
        stream: &Arc<CudaStream>,
        args: &AttendArgs,
        count: usize,
        early: bool,
    ) -> Result<()> {
        let args = with_layout(args, self.layout)?;
        // SAFETY: guaranteed by the caller. If it starts early, the kernel waits before it reads what
        // `fill_rings` writes or needs.
        unsafe {
            match early {
                true => self.kernel.launch_dependent(stream, [count, 1, 1], &args)?,
                false => self.kernel.launch(stream, [count, 1, 1], &args)?,
            }
        }
        Ok(())
    }
}

/// Checks the arguments and sets those that the layout determines.
fn with_layout(args: &AttendArgs, layout: Layout) -> Result<AttendArgs> {
    if args.heads < 1 || args.heads_per_kv < 1 || args.heads % args.heads_per_kv != 0 {
        let expected = format!("a multiple of the {} of a kv head", args.heads_per_kv);
        return Err(Error::mismatch("query heads", expected, args.heads));
    }
    check_kind("dtype of the queries", args.kind, 1)?;
    check_kind("dtype of the output", args.out_kind, 2)?;
    let (key_scale, value_scale) = layout.fixed_scales();
    Ok(AttendArgs { rotated: layout.rotated(), key_scale, value_scale, ..*args })
}

fn check_kind(what: &str, kind: i32, last: i32) -> Result<()> {
    if (0..=last).contains(&kind) {
        return Ok(());
    }
    Err(Error::mismatch(what, format!("0 to {last}"), kind))
}

/// The kernels of one layout, loaded in a context.
#[derive(Debug, Clone)]
pub struct Kernels {
    /// The attention kernel for 8 columns.
    narrow: AttendKernel,
    /// The one for 8 columns and few heads, if it exists.
    few: Option<AttendKernel>,
    /// The one for 16 columns, if it exists.
    wide: Option<AttendKernel>,
    sums: Kernel,
    quantize: Kernel,
    unpack: Kernel,
    fill_rings: Kernel,
    keep_ring: Kernel,
    layout: Layout,
}

impl Kernels {
    /// Loads the kernels of a layout.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device has too little shared memory; an error of the CUDA
    /// driver.
    pub fn load(context: &Arc<CudaContext>, layout: Layout) -> Result<Self> {
        let small = || needs("more shared memory than this device has");
        let load = |n, few| AttendKernel::load(context, layout, (n, few));
        let narrow = load(1, false)?.ok_or_else(small)?;
        let wide = match layout.family {
            Family::Kivi(_) if layout.head_dim() < 256 => load(2, false)?,
            _ => None,
        };
        let few = if layout.has_kernel_for_few_heads() { load(1, true)? } else { None };
        let (_, quantize_threads, quantize_shared) = layout.quantize();
        if max_shared_bytes(context)? < quantize_shared as u32 {
            return Err(small());
        }
        let of = |name: &str| format!("{name}_{}", layout.suffix());
        let sums_shared = SUM_WARPS * (layout.header() + layout.key_params() + layout.key_codes());
        let sums_threads = 32 * SUM_WARPS as u32;
        let sums = layout.image().kernel(context, &of("sums"), sums_threads, sums_shared as u32)?;
        let pack = layout.pack_image();
        let quantize =
            pack.kernel(context, &of("quantize"), quantize_threads, quantize_shared as u32)?;
        Ok(Self {
            narrow,
            few,
            wide,
            sums,
            quantize,
            unpack: pack.kernel(context, &of("unpack"), UNPACK_THREADS as u32, 0)?,
            fill_rings: PACK.kernel(context, "fill_rings", layout.head_dim() as u32 / 8, 0)?,
            keep_ring: PACK.kernel(context, "keep_ring", KEEP_THREADS, 0)?,
            layout,
        })
    }

    /// Returns the layout of the records.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Returns the attention kernel for `columns` columns: query heads of a kv head times the
    /// largest number of queries of a sequence. `heads`: kv heads of all sequences.
    pub fn attend(&self, columns: usize, heads: usize) -> &AttendKernel {
        match (&self.wide, &self.few) {
            (Some(wide), _) if columns > self.narrow.columns => wide,
            (_, Some(few)) if heads < MANY_HEADS => few,
            _ => &self.narrow,
        }
    }

    /// Launches sums of the attention probabilities that each slot receives, over the queries of
    /// each head. `lse` of the arguments is an input. `rows`: number of [`Work`] items, one for
    /// each kv head of each sequence; `tiles`: the largest number of [tiles](TILE) of one, those of
    /// its records and those of its ring each rounded up; `queries`: the largest number of queries
    /// of a sequence.
    ///
    /// # Errors
    /// As [`AttendKernel::launch`].
    ///
    /// # Safety
    /// As [`AttendKernel::launch`].
    pub unsafe fn sums(
        &self,
        stream: &Arc<CudaStream>,
        args: &AttendArgs,
        (rows, tiles, queries): (usize, usize, usize),
    ) -> Result<()> {
        let args = with_layout(args, self.layout)?;
        let heads = args.heads_per_kv as usize;
        let heads = if queries > 1 { heads } else { heads.div_ceil(8) };
        let grid = [tiles.div_ceil(SUM_WARPS), rows, heads];
        // SAFETY: guaranteed by the caller.
        Ok(unsafe { self.sums.launch(stream, grid, &args) }?)
    }

    /// Checks the arguments and sets those that the layout determines.
    fn with_layout(&self, args: &FillArgs) -> Result<FillArgs> {
        check_kind("dtype of the entries", args.kind, 1)?;
        let strides = [args.k_token, args.k_head, args.v_token, args.v_head];
        if let Some(stride) = strides.into_iter().find(|stride| stride % 8 != 0) {
            return Err(Error::mismatch("stride of the entries", "a multiple of 8", stride));
        }
        let (key_scale, value_scale) = self.layout.fixed_scales();
        Ok(FillArgs {
            pieces: self.layout.head_dim() as i32 / 8,
            rotated: self.layout.rotated(),
            f16_steps: i32::from(self.layout.f16_steps()),
            key_scale,
            value_scale,
            ..*args
        })
    }

    /// Launches packing: keys in whole records, values in whole [tiles](TILE). `rows`: number of
    /// [`FillRow`](super::FillRow)s; `records` and `tiles`: the largest numbers of key records and
    /// of value tiles of a row.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for an invalid dtype or stride; an error of the CUDA driver.
    ///
    /// # Safety
    /// As [`AttendKernel::launch`].
    pub unsafe fn pack(
        &self,
        stream: &Arc<CudaStream>,
        args: &FillArgs,
        (rows, records, tiles): (usize, usize, usize),
    ) -> Result<()> {
        let args = self.with_layout(args)?;
        let grid = [(records * self.layout.quantize().0).max(tiles), rows, 2];
        // SAFETY: guaranteed by the caller.
        Ok(unsafe { self.quantize.launch(stream, grid, &args) }?)
    }

    /// Launches the copy of new entries to the rings. `rows`: number of
    /// [`FillRow`](super::FillRow)s; `entries`: the largest number of entries that a row copies.
    ///
    /// # Errors
    /// As [`pack`](Self::pack); [`Error::Mismatch`] for rings without capacity.
    ///
    /// # Safety
    /// As [`AttendKernel::launch`].
    pub unsafe fn fill_rings(
        &self,
        stream: &Arc<CudaStream>,
        args: &FillArgs,
        (rows, entries): (usize, usize),
    ) -> Result<()> {
        let args = self.with_layout(args)?;
        if args.ring < 1 {
            return Err(Error::mismatch("capacity of a ring", "at least 1", args.ring));
        }
        let grid = [entries, rows, 2];
        // SAFETY: guaranteed by the caller; the kernel waits first.
        Ok(unsafe { self.fill_rings.launch_dependent(stream, grid, &args) }?)
    }

    /// Launches unpacking of some slots of a kv head.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for an invalid dtype; an error of the CUDA driver.
    ///
    /// # Safety
    /// As [`AttendKernel::launch`], with the fields of [`UnpackArgs`].
    pub unsafe fn unpack(&self, stream: &Arc<CudaStream>, args: &UnpackArgs) -> Result<()> {
        check_kind("dtype of the entries", args.kind, 2)?;
        let (key_scale, value_scale) = self.layout.fixed_scales();
        let rotated = self.layout.rotated();
        let args = UnpackArgs { rotated, key_scale, value_scale, ..*args };
        let grid = [(args.entries.max(0) as usize).div_ceil(UNPACK_THREADS / 32), 1, 1];
        // SAFETY: guaranteed by the caller.
        Ok(unsafe { self.unpack.launch(stream, grid, &args) }?)
    }

    /// Launches the compaction of rings after an eviction, as described by the `count`
    /// [`CompactRow`](super::CompactRow)s at an address.
    ///
    /// # Errors
    /// An error of the CUDA driver.
    ///
    /// # Safety
    /// As [`AttendKernel::launch`], with the fields of [`CompactRow`](super::CompactRow).
    pub unsafe fn compact_rings(
        &self,
        stream: &Arc<CudaStream>,
        rows: u64,
        count: usize,
    ) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        Ok(unsafe { self.keep_ring.launch(stream, [count, 2, 1], &rows) }?)
    }
}
