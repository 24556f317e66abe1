//! Attention over f16 or bf16 keys and values in paged blocks: kernels/paged.cu.

mod plan;

pub use plan::Plan;

use std::sync::Arc;

use crate::{Error, Half, PAGE, Result};
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream};
use longctx_cuda::{Image, Kernel, multiprocessors};

static IMAGE: Image = longctx_cuda::image!("paged");

/// Must equal the constant in kernels/paged/attend.cuh.
const THREADS: u32 = 128;
/// Must equal the constants in kernels/paged/append.cuh.
const APPEND_THREADS: u32 = 256;
const MOVE_THREADS: u32 = 512;
const MOVE_PIECES: usize = 2;

longctx_cuda::args! {
    /// One thread block's share of a kv head's entries, for a few columns. Column c is query `c %
    /// queries` of the kv head's query head `c / queries`. An item without queries is skipped, so
    /// that the list of a captured launch may be longer than needed.
    ///
    /// Addresses are device addresses; 0 means none.
    pub struct AttendWork: 48, len at 16 {
        /// Block table of the kv head: block addresses, u64. A block has keys `[PAGE, head_dim]`,
        /// then values.
        pub table: u64,
        /// Indices of the visible entries, increasing, u32. 0: all entries.
        pub entries: u64,
        /// Number of entries, or of visible entries if `entries` is given.
        pub len: i32,
        /// First entry of the share.
        pub from: i32,
        /// End of the share (exclusive).
        pub to: i32,
        /// Index of its partial result.
        pub part: i32,
        /// The kv head.
        pub kv_head: i32,
        /// Queries of the sequence.
        pub queries: i32,
        /// Token index of the sequence's first query.
        pub first_token: i32,
        /// First column.
        pub first_column: i32,
    }
}

longctx_cuda::args! {
    /// The partial results of a kv head and some columns. They have consecutive indices.
    pub struct AttendMerge: 24 {
        /// Index of the first partial result.
        pub first_part: i32,
        /// Number of partial results.
        pub parts: i32,
        /// See [`AttendWork`].
        pub kv_head: i32,
        /// See [`AttendWork`].
        pub queries: i32,
        /// See [`AttendWork`].
        pub first_token: i32,
        /// See [`AttendWork`].
        pub first_column: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`attend`], with the same layout as in the kernels.
    pub struct AttendArgs: 96, heads at 64, scale at 84 {
        /// `[tokens, heads, head_dim]`, contiguous, in the dtype of keys and values.
        pub q: u64,
        /// Output, `[tokens, heads, head_dim]`, f32.
        pub out: u64,
        /// Output, `[tokens, heads]`, f32: the natural log-sum-exp; -inf where nothing is seen.
        pub lse: u64,
        /// Workspace `[parts, columns, head_dim]`, f32.
        pub part_out: u64,
        /// Workspace `[parts, columns]`, f32.
        pub part_max: u64,
        /// Workspace `[parts, columns]`, f32.
        pub part_sum: u64,
        /// Array of [`AttendWork`].
        pub work: u64,
        /// Array of [`AttendMerge`].
        pub merges: u64,
        /// Query heads.
        pub heads: i32,
        /// Query heads of a kv head.
        pub heads_per_kv: i32,
        /// Columns of a thread block: 1, 2 or 4.
        pub columns: i32,
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
    }
}

longctx_cuda::args! {
    /// The keys of a kv head and the queries of its sequence.
    pub struct SumsWork: 48, stride at 16, len at 32 {
        /// Block table, see [`AttendWork`]. 0: the keys are the rows of `keys`.
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
    /// Rows of a call to append to one kv head.
    pub struct AppendRow: 56, first_row at 24 {
        /// Block table of the kv head.
        pub table: u64,
        /// Addresses of newly taken blocks, u64. The kernel writes them to the block table.
        pub new_blocks: u64,
        /// Tokens to append, u32, relative to the sequence's first token in this call. 0: all.
        pub tokens: u64,
        /// Row of the sequence's first token. The next token is `stride` rows later.
        pub first_row: i64,
        /// Block table index of the first new block.
        pub first_new_block: i32,
        /// Number of new blocks.
        pub new_block_count: i32,
        /// First entry to write.
        pub first: i32,
        /// Number of entries to write.
        pub count: i32,
        /// Number of tokens of the sequence in this call. No later token is read.
        pub seqlen: i32,
        /// Padding.
        pub unused: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`append`], with the same layout as in the kernels.
    pub struct AppendArgs: 40, stride at 24 {
        /// Keys: rows of head_dim elements.
        pub k: u64,
        /// Values.
        pub v: u64,
        /// Array of [`AppendRow`].
        pub rows: u64,
        /// See [`AppendRow`].
        pub stride: i64,
        /// 16-byte pieces of a row.
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

/// Returns how many thread blocks of [`attend`] the device runs concurrently. A plan divides the
/// work by this number.
///
/// # Errors
/// [`Error::Unsupported`] for a head size other than 64, 80, 96, 128, 192 and 256; an error of the
/// CUDA driver.
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
    if !matches!(columns, 1 | 2 | 4) {
        return Err(Error::mismatch("columns", "1, 2 or 4", columns));
    }
    let name = format!("paged_attend_{}_d{head_dim}_c{columns}", name(half));
    Ok(IMAGE.kernel(context, &name, THREADS, 0)?)
}

/// Launches attention of a few queries of many sequences: `count` work items, whose partial results
/// `merges` merges into the outputs. Both lists are read from device memory, so a captured launch
/// can be replayed with other lists of the same lengths.
///
/// # Errors
/// As [`attend_slots`]; [`Error::Mismatch`] for an unsupported number of columns.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields give, until the launched work has finished. Lists and tables must stay within
/// the arrays that they describe.
pub unsafe fn attend(
    stream: &Arc<CudaStream>,
    half: Half,
    head_dim: usize,
    args: &AttendArgs,
    (count, merges): (usize, usize),
) -> Result<()> {
    let context = stream.context();
    let columns = args.columns.max(0) as usize;
    if args.head_dim as usize != head_dim {
        return Err(Error::mismatch("head_dim of the arguments", head_dim, args.head_dim));
    }
    let kernel = attend_kernel(context, half, head_dim, columns)?;
    let merge = IMAGE.kernel(context, "paged_merge", (head_dim as u32).next_multiple_of(32), 0)?;
    // SAFETY: the caller guarantees the addresses; the grids are those that the kernels expect.
    unsafe {
        kernel.launch(stream, [count, 1, 1], args)?;
        merge.launch(stream, [merges, columns, 1], args)?;
    }
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
    let kernel = IMAGE.kernel(stream.context(), &kernel_name, THREADS, shared as u32)?;
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
    // SAFETY: the caller guarantees the addresses.
    unsafe { kernel.launch(stream, [blocks, rows, 2], args) }?;
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
