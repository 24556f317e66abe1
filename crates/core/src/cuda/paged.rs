//! Keys and values in f16 or bf16 in blocks behind block tables: kernels/paged.cu.

mod plan;

pub use plan::Plan;

use std::sync::Arc;

use super::prefill::{Half, PAGE};
use crate::{Error, Result};
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream};
use longctx_cuda::{Image, Kernel, multiprocessors};

static IMAGE: Image = longctx_cuda::image!("paged");

/// As in kernels/paged/attend.cuh.
const THREADS: u32 = 128;
/// As in kernels/paged/append.cuh.
const MOVE_THREADS: u32 = 256;

longctx_cuda::args! {
    /// A block of threads' share of a kv head's entries, for some columns: column c is query
    /// `c % queries` of the kv head's query head `c / queries`. Without queries it is no work: a list that
    /// a captured launch reads may be longer than it need be.
    ///
    /// Addresses are device addresses, 0 for none.
    pub struct AttendWork: 48, len at 16 {
        /// The addresses of the kv head's blocks, u64. A block has keys `[PAGE, head_dim]`, then values.
        pub table: u64,
        /// The entries that are seen, in order, u32. 0: all.
        pub entries: u64,
        /// How many entries there are, or are seen.
        pub len: i32,
        /// The first entry of the share.
        pub from: i32,
        /// The entry after its last.
        pub to: i32,
        /// Where its results lie.
        pub part: i32,
        /// The kv head.
        pub kv_head: i32,
        /// Queries of the sequence.
        pub queries: i32,
        /// The first one's token.
        pub first_token: i32,
        /// The first column.
        pub first_column: i32,
    }
}

longctx_cuda::args! {
    /// The parts of a kv head and some columns, which lie one after the other.
    pub struct AttendJoin: 24 {
        /// The first part.
        pub first_part: i32,
        /// How many there are.
        pub parts: i32,
        /// As in [`AttendWork`].
        pub kv_head: i32,
        /// As in [`AttendWork`].
        pub queries: i32,
        /// As in [`AttendWork`].
        pub first_token: i32,
        /// As in [`AttendWork`].
        pub first_column: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`attend`], field for field those of the kernels.
    pub struct AttendArgs: 96, heads at 64, scale at 84 {
        /// `[tokens, heads, head_dim]`, contiguous, in the format of keys and values.
        pub q: u64,
        /// Output, `[tokens, heads, head_dim]`, f32.
        pub out: u64,
        /// Output, `[tokens, heads]`, f32: the natural log-sum-exp; -inf where nothing is seen.
        pub lse: u64,
        /// Memory for `[parts, columns, head_dim]` f32.
        pub part_out: u64,
        /// Memory for `[parts, columns]` f32.
        pub part_max: u64,
        /// Memory for `[parts, columns]` f32.
        pub part_sum: u64,
        /// The list of [`AttendWork`].
        pub work: u64,
        /// The list of [`AttendJoin`].
        pub joins: u64,
        /// Query heads.
        pub heads: i32,
        /// Query heads of a kv head.
        pub heads_per_kv: i32,
        /// Columns of a block of threads: 1, 2 or 4.
        pub columns: i32,
        /// 1: a sequence's last entries are its queries' own, and a query sees none after its own.
        pub causal: i32,
        /// Entries that a query sees up to its own, if causal. 0: no limit.
        pub window: i32,
        /// Factor of the dot products; positive.
        pub scale: f32,
        /// Scores s become `soft_cap * tanh(s / soft_cap)`. 0: they stay as they are.
        pub soft_cap: f32,
        /// Channels of a head.
        pub head_dim: i32,
    }
}

longctx_cuda::args! {
    /// A kv head's keys beside the queries of its sequence.
    pub struct SumsWork: 48, stride at 16, len at 32 {
        /// As in [`AttendWork`]. 0: keys are the rows of `keys`.
        pub table: u64,
        /// Keys that lie in no blocks.
        pub keys: u64,
        /// Numbers from one of their rows to the next.
        pub stride: i64,
        /// Where the sums `[heads_per_kv, len]` begin in the output.
        pub out: i64,
        /// Entries.
        pub len: i32,
        /// The kv head.
        pub kv_head: i32,
        /// Queries of the sequence.
        pub queries: i32,
        /// The first one's token.
        pub first_token: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`sums`], field for field those of the kernels.
    pub struct SumsArgs: 56, heads at 32, scale at 48 {
        /// As in [`AttendArgs`].
        pub q: u64,
        /// `[tokens, heads]`, f32: the natural log-sum-exp of all that the queries see.
        pub lse: u64,
        /// Output, f32: for each kv head `[heads_per_kv, len]`.
        pub out: u64,
        /// The list of [`SumsWork`], one for each kv head of each sequence.
        pub work: u64,
        /// As in [`AttendArgs`].
        pub heads: i32,
        /// As in [`AttendArgs`].
        pub heads_per_kv: i32,
        /// As in [`AttendArgs`].
        pub causal: i32,
        /// As in [`AttendArgs`].
        pub window: i32,
        /// As in [`AttendArgs`].
        pub scale: f32,
        /// As in [`AttendArgs`].
        pub soft_cap: f32,
    }
}

longctx_cuda::args! {
    /// Rows of a call that go to the end of a kv head.
    pub struct AppendRow: 48, first_row at 24 {
        /// The kv head's block table.
        pub table: u64,
        /// The addresses of blocks that are taken now, u64: the kernel puts them into the table.
        pub fresh: u64,
        /// The rows to take, u32. 0: `first_row` and every `stride`-th after it.
        pub rows: u64,
        /// See `rows`.
        pub first_row: i64,
        /// The first block that is taken now.
        pub first_fresh: i32,
        /// How many blocks are taken now.
        pub fresh_count: i32,
        /// The first entry to write.
        pub first: i32,
        /// How many.
        pub count: i32,
    }
}

longctx_cuda::args! {
    /// The arguments of [`append`], field for field those of the kernel.
    pub struct AppendArgs: 40, stride at 24 {
        /// Keys: rows of head_dim numbers.
        pub k: u64,
        /// Values.
        pub v: u64,
        /// The list of [`AppendRow`].
        pub rows: u64,
        /// See [`AppendRow`].
        pub stride: i64,
        /// Pieces of 16 bytes in a row.
        pub pieces: i32,
        /// Nothing.
        pub unused: i32,
    }
}

longctx_cuda::args! {
    /// Entries of a kv head that move to others, in order. Where both tables name one block, none moves
    /// to a later place than its own.
    pub struct MoveRow: 32, first at 24 {
        /// The block table of the entries.
        pub from: u64,
        /// The block table of where they go.
        pub to: u64,
        /// The entries, u32.
        pub entries: u64,
        /// The entry that the first moves to.
        pub first: i32,
        /// How many.
        pub count: i32,
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

/// How many blocks of threads of [`attend`] a device runs at a time: what a plan divides work by.
///
/// # Errors
/// [`Error::Unsupported`] for another head size than 64, 80, 96, 128, 192 and 256; the driver's.
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

/// Attention of a few queries of many sequences: `count` pieces of work, whose parts `joins` joins
/// make the outputs. Both lists are read from device memory, so that a captured launch serves other
/// lists of as many.
///
/// # Errors
/// As [`attend_slots`]; [`Error::Mismatch`] for other columns.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields give, until the work that is launched here has ended. Lists and tables must stay within
/// the arrays that they describe.
pub unsafe fn attend(
    stream: &Arc<CudaStream>,
    half: Half,
    head_dim: usize,
    args: &AttendArgs,
    (count, joins): (usize, usize),
) -> Result<()> {
    let context = stream.context();
    let columns = args.columns.max(0) as usize;
    if args.head_dim as usize != head_dim {
        return Err(Error::mismatch("head_dim of the arguments", head_dim, args.head_dim));
    }
    let kernel = attend_kernel(context, half, head_dim, columns)?;
    let join = IMAGE.kernel(context, "paged_join", (head_dim as u32).next_multiple_of(32), 0)?;
    // SAFETY: the caller's; the grids are those that the kernels count with.
    unsafe {
        kernel.launch(stream, [count, 1, 1], args)?;
        join.launch(stream, [joins, columns, 1], args)?;
    }
    Ok(())
}

/// The attention probability that each entry receives, summed over the queries of each head.
/// `rows`: kv heads of all sequences; `longest`: entries of the longest; `most`: queries of the
/// sequence that has the most.
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
    // SAFETY: the caller's.
    unsafe { kernel.launch(stream, [longest.div_ceil(PAGE), rows, heads], args) }?;
    Ok(())
}

/// Appends rows to kv heads. `rows`: how many; `longest`: entries of the one that takes the most.
///
/// # Errors
/// The driver's.
///
/// # Safety
/// As [`attend`].
pub unsafe fn append(
    stream: &Arc<CudaStream>,
    args: &AppendArgs,
    (rows, longest): (usize, usize),
) -> Result<()> {
    let kernel = IMAGE.kernel(stream.context(), "paged_append", MOVE_THREADS, 0)?;
    let blocks = (longest * args.pieces as usize).div_ceil(MOVE_THREADS as usize);
    // SAFETY: the caller's.
    unsafe { kernel.launch(stream, [blocks, rows, 2], args) }?;
    Ok(())
}

/// Moves entries, of heads of `head_dim` channels, as the `count` [`MoveRow`]s at an address say.
///
/// # Errors
/// The driver's.
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
    // SAFETY: the caller's.
    unsafe { kernel.launch(stream, [pieces.div_ceil(4), count, 2], &args) }?;
    Ok(())
}
