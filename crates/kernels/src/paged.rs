//! Attention over f16 or bf16 keys and values in paged blocks: kernels/paged.cu.

mod plan;

pub use plan::Plan;

use std::sync::Arc;

use crate::{Error, Half, PAGE, Result};
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream, DeviceRepr};
use longctx_cuda::{Image, Kernel, multiprocessors};

static IMAGE: Image = longctx_cuda::image!("paged");

/// Entries that a warp of [`attend`] reads at a time. Must equal the constant in
/// kernels/paged/attend.cuh.
pub const TILE: usize = 16;
/// Must equal the constant in kernels/paged/attend.cuh.
const STAGES: usize = 3;
/// Must equal the constant in kernels/paged/sums.cuh.
const SUMS_THREADS: u32 = 128;
/// Must equal the constants in kernels/paged/append.cuh.
const APPEND_THREADS: u32 = 256;
const MOVE_THREADS: u32 = 512;
const MOVE_PIECES: usize = 2;
/// Must equal the constant in kernels/paged/evict.cuh.
const EVICT_THREADS: u32 = 512;
/// Must equal the constant in kernels/paged/args.cuh.
const EVICT_LAYERS: usize = 32;

longctx_cuda::args! {
    /// One thread block's share of a kv head's entries, for a few columns. Column c is query `c %
    /// queries` of the kv head's query head `c / queries`. An item without queries is skipped, so
    /// that the list of a captured launch may be longer than needed. A [`Plan`] makes the items from
    /// one for each kv head, and sets the fields from `from` to `merge` and `first_column`.
    ///
    /// Addresses are device addresses; 0 means none.
    pub struct AttendWork: 64, len at 12 {
        /// Indices of the visible entries, increasing, u32. 0: all entries.
        pub entries: u64,
        /// Index of the kv head's block table in [`AttendArgs::tables`].
        pub table: i32,
        /// Number of entries, or of visible entries if `entries` is given.
        pub len: i32,
        /// First entry of the share; a multiple of [`TILE`].
        pub from: i32,
        /// End of the share (exclusive).
        pub to: i32,
        /// Index of the first partial result of the kv head and columns.
        pub first_part: i32,
        /// The share's index among them.
        pub part: i32,
        /// Their number.
        pub parts: i32,
        /// Index in [`AttendArgs::arrived`].
        pub merge: i32,
        /// The kv head.
        pub kv_head: i32,
        /// Queries of the sequence.
        pub queries: i32,
        /// Token index of the sequence's first query.
        pub first_token: i32,
        /// First column.
        pub first_column: i32,
        /// Padding.
        pub unused: [i32; 2],
    }
}

longctx_cuda::args! {
    /// The arguments of [`attend`], with the same layout as in the kernels. `columns` is
    /// [`columns`]; `parts` and `merges` are those of the [`Plan`].
    pub struct AttendArgs: 120, heads at 72, scale at 88, scores at 104 {
        /// `[tokens, heads, head_dim]`, contiguous, in the dtype of keys and values.
        pub q: u64,
        /// Output, `[tokens, heads, head_dim]`, of dtype `out_kind`.
        pub out: u64,
        /// Output, `[tokens, heads]`, f32: the natural log-sum-exp; -inf where nothing is seen. 0:
        /// not written.
        pub lse: u64,
        /// Workspace `[parts, columns, head_dim]`, f32.
        pub part_out: u64,
        /// Workspace `[parts, columns]`, f32.
        pub part_max: u64,
        /// Workspace `[parts, columns]`, f32.
        pub part_sum: u64,
        /// Workspace `[merges]`, u32: 0 before and after the launch.
        pub arrived: u64,
        /// Array of [`AttendWork`].
        pub work: u64,
        /// Addresses of the block tables of all kv heads, u64. A table lists block addresses, u64. A
        /// block has keys `[PAGE, head_dim]`, then values.
        pub tables: u64,
        /// Query heads.
        pub heads: i32,
        /// Query heads of a kv head.
        pub heads_per_kv: i32,
        /// 1: causal mask; the last entries of a sequence belong to its queries.
        pub causal: i32,
        /// Sliding window: entries that a query sees up to its own, if causal. 0: no limit.
        pub window: i32,
        /// Softmax scale of the scores q·k; positive.
        pub scale: f32,
        /// Scores s become `soft_cap * tanh(s / soft_cap)`. 0: they stay as they are.
        pub soft_cap: f32,
        /// Channels of a head.
        pub head_dim: i32,
        /// Dtype of the output. 0: f16; 1: bf16; 2: f32.
        pub out_kind: i32,
        /// Output, `[tokens, heads, scores_row]`, f32: the score of each entry, in units of log 2;
        /// -inf for an entry that is not seen. Not for selected entries. 0: not written.
        pub scores: u64,
        /// Row stride of `scores`: at least the largest number of entries.
        pub scores_row: i32,
        /// 1: the launch before this one in the stream is the [`append`] of the queries' own entries,
        /// during which attention can read earlier ones. The mask is causal.
        pub early: i32,
    }
}

longctx_cuda::args! {
    /// The keys of a kv head and the queries of its sequence.
    pub struct SumsWork: 48, stride at 16, len at 32 {
        /// Block table, see [`AttendArgs::tables`]. 0: the keys are the rows of `keys`.
        pub table: u64,
        /// Keys that are not in blocks.
        pub keys: u64,
        /// Row stride of `keys`, in elements.
        pub stride: i64,
        /// Offset of the sums `[heads_per_kv, len]` in the output, in elements.
        pub out: i64,
        /// Entries.
        pub len: i32,
        /// The kv head.
        pub kv_head: i32,
        /// Queries of the sequence.
        pub queries: i32,
        /// Token index of the sequence's first query.
        pub first_token: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`sums`], with the same layout as in the kernels.
    pub struct SumsArgs: 56, heads at 32, scale at 48 {
        /// See [`AttendArgs`].
        pub q: u64,
        /// `[tokens, heads]`, f32: the natural log-sum-exp over all entries that the queries see.
        pub lse: u64,
        /// Output, f32: `[heads_per_kv, len]` for each kv head.
        pub out: u64,
        /// Array of [`SumsWork`], one for each kv head of each sequence.
        pub work: u64,
        /// See [`AttendArgs`].
        pub heads: i32,
        /// See [`AttendArgs`].
        pub heads_per_kv: i32,
        /// See [`AttendArgs`].
        pub causal: i32,
        /// See [`AttendArgs`].
        pub window: i32,
        /// See [`AttendArgs`].
        pub scale: f32,
        /// See [`AttendArgs`].
        pub soft_cap: f32,
    }
}

longctx_cuda::args! {
    /// Tokens of a call to append to one kv head. A row without tokens is skipped.
    pub struct AppendRow: 48, first at 24 {
        /// Tokens to append, u32, relative to the sequence's first token in this call. 0: all.
        pub tokens: u64,
        /// Index of the kv head's block table in [`AppendArgs::tables`].
        pub table: i32,
        /// The kv head.
        pub kv_head: i32,
        /// The sequence's first token in this call.
        pub first_token: i32,
        /// Number of tokens of the sequence in this call. No later token is read.
        pub seqlen: i32,
        /// First entry to write.
        pub first: i32,
        /// Number of entries to write.
        pub count: i32,
        /// Block table index of the first new block.
        pub first_new_block: i32,
        /// Number of new blocks.
        pub new_block_count: i32,
        /// Index of the first new block's address in [`AppendArgs::new_blocks`].
        pub new_blocks: i32,
        /// Padding.
        pub unused: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`append`], with the same layout as in the kernels. Strides count pieces of
    /// 16 bytes.
    pub struct AppendArgs: 80, k_token at 40, pieces at 72 {
        /// Keys, `[tokens, kv_heads, head_dim]`.
        pub k: u64,
        /// Values.
        pub v: u64,
        /// Array of [`AppendRow`].
        pub rows: u64,
        /// See [`AttendArgs::tables`].
        pub tables: u64,
        /// Addresses of newly taken blocks, u64. The kernel writes them to the block tables.
        pub new_blocks: u64,
        /// Token stride of `k`.
        pub k_token: i64,
        /// Head stride of `k`.
        pub k_head: i64,
        /// Token stride of `v`.
        pub v_token: i64,
        /// Head stride of `v`.
        pub v_head: i64,
        /// Pieces of a row.
        pub pieces: i32,
        /// Padding.
        pub unused: i32,
    }
}

longctx_cuda::args! {
    /// Entries of a kv head to move, in order. If both tables share a block, no entry of it moves
    /// to a later index.
    pub struct MoveRow: 40, first at 24 {
        /// Source block table.
        pub from: u64,
        /// Destination block table.
        pub to: u64,
        /// Source entries, u32.
        pub entries: u64,
        /// Destination of the first entry.
        pub first: i32,
        /// Number of entries.
        pub count: i32,
        /// Number of entries of the source: later ones are not read.
        pub len: i32,
        /// Padding.
        pub unused: i32,
    }
}

longctx_cuda::args! {
    struct MoveArgs: 16 {
        rows: u64,
        pieces: i32,
        unused: i32,
    }
}

longctx_cuda::args! {
    /// A kv head, of which [`evict`] drops the entry with the lowest score. The score of an entry is
    /// the reduction of the attention probabilities that a token's query heads give to it, plus its
    /// score in `previous`.
    pub struct EvictRow: 80, table at 32 {
        /// Scores to add to those of the first entries, `[scored]`, f32.
        pub previous: u64,
        /// Positions of the first entries, `[placed]`, u32.
        pub positions: u64,
        /// Output: the scores of the kept entries, `[len - 1]`, f32. 0: not written.
        pub kept_scores: u64,
        /// Output: their positions, `[len - 1]`, u32.
        pub kept_positions: u64,
        /// Index of the kv head's block table in [`EvictArgs::tables`].
        pub table: i32,
        /// The kv head.
        pub kv_head: i32,
        /// Index of the token.
        pub token: i32,
        /// Number of entries.
        pub len: i32,
        /// Number of scores in `previous`.
        pub scored: i32,
        /// Number of positions in `positions`.
        pub placed: i32,
        /// The position of entry `placed`. Later entries have the positions after it.
        pub next: u32,
        /// Entries at this many first positions always stay.
        pub sinks: i32,
        /// Entries at this many last positions always stay. `sinks + recent` is less than `len`.
        pub recent: i32,
        /// 1: all query heads of the layer are reduced; 0: those of the kv head.
        pub layer: i32,
        /// 1: reduced to the maximum; 0: to the mean.
        pub maximum: i32,
        /// Padding.
        pub unused: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`evict`], with the same layout as in the kernel.
    pub struct EvictArgs: 56, heads at 32 {
        /// See [`AttendArgs::scores`].
        pub scores: u64,
        /// See [`AttendArgs::lse`].
        pub lse: u64,
        /// Array of [`EvictRow`].
        pub rows: u64,
        /// See [`AttendArgs::tables`].
        pub tables: u64,
        /// Query heads.
        pub heads: i32,
        /// Query heads of a kv head.
        pub heads_per_kv: i32,
        /// See [`AttendArgs`].
        pub scores_row: i32,
        /// Pieces of 16 bytes in a row.
        pub pieces: i32,
        /// Number of [`EvictRow`]s at `rows`.
        pub count: i32,
        /// Padding.
        pub unused: i32,
    }
}

/// The evictions of several layers: the kernel's argument.
#[derive(Clone, Copy)]
#[repr(C)]
struct EvictLayers([EvictArgs; EVICT_LAYERS]);

// SAFETY: an array of the kernel's structs.
unsafe impl DeviceRepr for EvictLayers {}

fn name(half: Half) -> &'static str {
    match half {
        Half::F16 => "f16",
        Half::BF16 => "bf16",
    }
}

fn check_head_dim(head_dim: usize) -> Result<()> {
    match head_dim {
        64 | 80 | 96 | 128 | 192 | 256 => Ok(()),
        _ => {
            let what = format!("paged attention with heads of {head_dim} channels on this device");
            Err(Error::Unsupported(what))
        }
    }
}

/// Returns the number of columns of a thread block of [`attend`], if the longest sequence has
/// `queries` queries.
pub fn columns(heads_per_kv: usize, queries: usize) -> usize {
    if heads_per_kv * queries <= 8 { 8 } else { 16 }
}

/// Returns how many thread blocks of [`attend`] the device runs concurrently. A plan divides the
/// work by this number.
///
/// # Errors
/// [`Error::Unsupported`] for a head size other than 64, 80, 96, 128, 192 and 256;
/// [`Error::Mismatch`] for an unsupported number of columns; an error of the CUDA driver.
pub fn attend_slots(
    context: &Arc<CudaContext>,
    half: Half,
    head_dim: usize,
    columns: usize,
) -> Result<usize> {
    let kernel = attend_kernel(context, half, head_dim, columns)?;
    Ok(kernel.blocks_per_multiprocessor()? * multiprocessors(context)?)
}

fn attend_kernel(
    context: &Arc<CudaContext>,
    half: Half,
    head_dim: usize,
    columns: usize,
) -> Result<Kernel> {
    check_head_dim(head_dim)?;
    if !matches!(columns, 8 | 16) {
        return Err(Error::mismatch("columns", "8 or 16", columns));
    }
    let name = format!("paged_attend_{}_d{head_dim}_n{}", name(half), columns / 8);
    // As `Rings` in kernels/paged/attend.cuh.
    let (warps, pieces) = (if head_dim > 128 { 2 } else { 4 }, head_dim / 8);
    let row = if pieces.is_multiple_of(8) { pieces } else { pieces + 1 };
    let shared = warps * STAGES * 2 * TILE * row * 16;
    Ok(IMAGE.kernel(context, &name, 32 * warps as u32, shared as u32)?)
}

/// Launches attention of a few queries of many sequences: `count` work items for blocks of
/// `columns` [`columns`](columns()). The list is read from device memory, so a captured launch can
/// be replayed with another list of the same length.
///
/// # Errors
/// As [`attend_slots`].
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields give, until the launched work has finished. Lists and tables must stay within
/// the arrays that they describe.
pub unsafe fn attend(
    stream: &Arc<CudaStream>,
    half: Half,
    args: &AttendArgs,
    (count, columns): (usize, usize),
) -> Result<()> {
    let kernel = attend_kernel(stream.context(), half, args.head_dim.max(0) as usize, columns)?;
    // SAFETY: the caller guarantees the addresses; the grid is the one that the kernel expects, which
    // waits first.
    unsafe { kernel.launch_dependent(stream, [count, 1, 1], args) }?;
    Ok(())
}

/// Computes the attention probability that each entry receives, summed over the queries of each
/// head. `rows`: kv heads of all sequences; `longest`: entries of the longest head; `most`: the
/// largest number of queries of a sequence.
///
/// # Errors
/// As [`attend_slots`].
///
/// # Safety
/// As [`attend`].
pub unsafe fn sums(
    stream: &Arc<CudaStream>,
    half: Half,
    head_dim: usize,
    args: &SumsArgs,
    (rows, longest, most): (usize, usize, usize),
) -> Result<()> {
    check_head_dim(head_dim)?;
    let kernel_name = format!("paged_sums_{}_d{head_dim}", name(half));
    let shared = 2 * 2 * PAGE * (head_dim + 8);
    let kernel = IMAGE.kernel(stream.context(), &kernel_name, SUMS_THREADS, shared as u32)?;
    let heads = if most > 1 { args.heads_per_kv as usize } else { 1 };
    // SAFETY: the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [longest.div_ceil(PAGE), rows, heads], args) }?;
    Ok(())
}

/// Appends rows to kv heads. `rows`: number of [`AppendRow`]s; `longest`: the largest number of
/// entries appended to one head.
///
/// # Errors
/// An error of the CUDA driver.
///
/// # Safety
/// As [`attend`].
pub unsafe fn append(
    stream: &Arc<CudaStream>,
    args: &AppendArgs,
    (rows, longest): (usize, usize),
) -> Result<()> {
    let kernel = IMAGE.kernel(stream.context(), "paged_append", APPEND_THREADS, 0)?;
    let blocks = (longest * args.pieces as usize).div_ceil(APPEND_THREADS as usize);
    // SAFETY: the caller guarantees the addresses; the kernel waits first.
    unsafe { kernel.launch_dependent(stream, [blocks, rows, 2], args) }?;
    Ok(())
}

/// Moves entries of heads of `head_dim` channels, as described by the `count` [`MoveRow`]s at an
/// address.
///
/// # Errors
/// An error of the CUDA driver.
///
/// # Safety
/// As [`attend`].
pub unsafe fn move_entries(
    stream: &Arc<CudaStream>,
    head_dim: usize,
    rows: u64,
    count: usize,
) -> Result<()> {
    let kernel = IMAGE.kernel(stream.context(), "paged_move", MOVE_THREADS, 0)?;
    let pieces = head_dim / 8;
    let args = MoveArgs { rows, pieces: pieces as i32, unused: 0 };
    // SAFETY: the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [pieces.div_ceil(MOVE_PIECES), count, 2], &args) }?;
    Ok(())
}

/// Drops the entry with the lowest score of each kv head, the newest of equal ones, and moves the
/// newest entry to its place. `layers`: the evictions of each layer. No two tables share a block. A
/// launch takes up to 32 layers, because the rows of one layer do not fill the device.
///
/// # Errors
/// An error of the CUDA driver.
///
/// # Safety
/// As [`attend`].
pub unsafe fn evict(stream: &Arc<CudaStream>, layers: &[EvictArgs]) -> Result<()> {
    let kernel = IMAGE.kernel(stream.context(), "paged_evict", EVICT_THREADS, 0)?;
    for layers in layers.chunks(EVICT_LAYERS) {
        let mut args = EvictLayers([EvictArgs::default(); EVICT_LAYERS]);
        args.0[..layers.len()].copy_from_slice(layers);
        let rows = layers.iter().map(|of| of.count.max(0) as usize).max().unwrap_or(0);
        // SAFETY: the caller guarantees the addresses.
        unsafe { kernel.launch(stream, [rows, layers.len(), 1], &args) }?;
    }
    Ok(())
}
