//! Exact attention of many queries (prefill): kernels/prefill.cu.

use std::sync::Arc;

use crate::tensor_map::TensorMap;
use crate::{Error, Result};
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream};
use longctx_cuda::{Image, compute_capability};

static IMAGE: Image = longctx_cuda::image!("prefill");

/// Tokens per block of a paged cache.
pub const PAGE: usize = 64;

/// The dtype of queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
}

longctx_cuda::args! {
    /// The arguments of [`prefill`], with the same layout as in the kernels.
    ///
    /// Addresses are device addresses; strides count elements. q, k and v and all their rows are
    /// aligned to 16 bytes. Lengths and block tables are read from device memory.
    ///
    /// The queries of sequence s are `cu_seqlens_q[s]..cu_seqlens_q[s + 1]`. Its keys are
    /// `cu_seqlens_k[s]..cu_seqlens_k[s + 1]`. If `block_table` is not 0 (paged), they are the
    /// first `seqlens_k[s, kv_head]` entries of the blocks in its row of the table.
    pub struct PrefillArgs: 200, q_token at 72, seqs at 152, scale at 188 {
        /// `[tokens, heads, head_dim]`, f16 or bf16.
        pub q: u64,
        /// `[kv_extent, kv_heads, head_dim]`; paged: `[kv_extent blocks, PAGE, head_dim]`.
        pub k: u64,
        /// Same layout as `k`.
        pub v: u64,
        /// Output, `[tokens, heads, head_dim]`, contiguous, in the dtype of `q` or f32.
        pub out: u64,
        /// Output, `[tokens, heads]`, f32: the natural log-sum-exp; -inf where no key is visible.
        pub lse: u64,
        /// `[seqs + 1]`, u32.
        pub cu_seqlens_q: u64,
        /// `[seqs + 1]`, u32; not read if paged.
        pub cu_seqlens_k: u64,
        /// `[seqs, kv_heads]`, u32; paged only.
        pub seqlens_k: u64,
        /// `[seqs, kv_heads, blocks]`, u32. 0: keys and values are contiguous.
        pub block_table: u64,
        /// Strides of `q`.
        pub q_token: i64,
        /// See `q_token`.
        pub q_head: i64,
        /// Strides of `k`. Paged: `k_head` is the stride of a block.
        pub k_token: i64,
        /// See `k_token`.
        pub k_head: i64,
        /// Strides of `v`, as for `k`.
        pub v_token: i64,
        /// See `v_token`.
        pub v_head: i64,
        /// Strides of `block_table`. `table_head` is 0 if the heads share their blocks.
        pub table_seq: i64,
        /// See `table_seq`.
        pub table_head: i64,
        /// Strides of `seqlens_k`.
        pub lens_seq: i64,
        /// See `lens_seq`.
        pub lens_head: i64,
        /// Sequences.
        pub seqs: i32,
        /// Queries of all sequences.
        pub tokens: i32,
        /// Tokens of `k` and `v`; paged: blocks.
        pub kv_extent: i32,
        /// Query heads.
        pub heads: i32,
        /// Key/value heads.
        pub kv_heads: i32,
        /// Query heads per tile. Set by [`prefill`].
        pub pack: i32,
        /// 1: causal mask.
        pub causal: i32,
        /// Positions of the queries. 0: the last keys of a sequence belong to its queries. 1: all
        /// keys precede the queries.
        pub past: i32,
        /// Sliding window: a query sees the `window` keys up to its own position. 0: no limit.
        pub window: i32,
        /// Softmax scale of the scores q·k; positive.
        pub scale: f32,
        /// Scores s become `soft_cap * tanh(s / soft_cap)`. 0: they stay as they are.
        pub soft_cap: f32,
        /// 0: `out` has the dtype of `q`; 1: f32.
        pub out_f32: i32,
    }
}

/// The tile shape of a kernel, as in kernels/prefill/*.cuh.
struct Shape {
    wgmma: bool,
    /// Rows of a tile: packed query heads times tokens.
    rows: i32,
    threads: u32,
    shared_bytes: u32,
}

impl Shape {
    fn new(wgmma: bool, head_dim: usize) -> Self {
        let columns = head_dim.div_ceil(64) as u32;
        if wgmma {
            let groups = if head_dim == 64 { 3 } else { 2 };
            let keys = if head_dim <= 128 { 128 } else { 64 };
            let (rows, threads) = (64 * groups, 128 * (groups + 1));
            let shared_bytes = columns * 128 * (rows + 4 * keys) + 1024;
            return Self { wgmma, rows: rows as i32, threads, shared_bytes };
        }
        let rows: u32 = if head_dim <= 128 { 128 } else { 64 };
        let keys = if head_dim <= 96 { 64 } else { 32 };
        Self {
            wgmma,
            rows: rows as i32,
            threads: 128,
            shared_bytes: columns * 128 * (rows + 2 * keys),
        }
    }

    /// Returns the largest number of query heads of a group that leaves at most 1 of 16 rows of a
    /// tile unused.
    fn pack(&self, group: i32) -> i32 {
        let fits = |&pack: &i32| group % pack == 0 && self.rows % pack * 16 <= self.rows;
        (1..=group.min(self.rows)).rev().find(fits).unwrap_or(1)
    }
}

/// Returns whether the device has kernels for a head size: 64, 80, 96, 128, 192 or 256, on compute
/// capability 8.0 or later.
///
/// # Errors
/// An error of the CUDA driver.
pub fn has_prefill(context: &Arc<CudaContext>, head_dim: usize) -> Result<bool> {
    Ok(matches!(head_dim, 64 | 80 | 96 | 128 | 192 | 256) && compute_capability(context)? >= (8, 0))
}

/// Launches exact attention of the sequences' queries. Compute capability 9.0 has its own kernels.
///
/// # Errors
/// [`Error::Unsupported`] if [`has_prefill`] is false; [`Error::Mismatch`] for strides or addresses
/// that are not multiples of 16 bytes, or invalid numbers of heads; an error of the CUDA driver.
///
/// # Safety
/// The addresses must be those of arrays on the stream's device, of the sizes and formats that the
/// fields of [`PrefillArgs`] give, until the launched work has finished. Lengths and tables must
/// stay within the extents in `args`.
pub unsafe fn prefill(
    stream: &Arc<CudaStream>,
    half: Half,
    head_dim: usize,
    args: &PrefillArgs,
) -> Result<()> {
    let context = stream.context();
    if !has_prefill(context, head_dim)? {
        let what = format!("prefill attention with heads of {head_dim} channels on this device");
        return Err(Error::Unsupported(what));
    }
    check(args)?;
    if args.tokens == 0 || args.seqs == 0 {
        return Ok(());
    }
    let shape = Shape::new(compute_capability(context)? == (9, 0), head_dim);
    let args = PrefillArgs { pack: shape.pack(args.heads / args.kv_heads), ..*args };
    let tile_tokens = shape.rows / args.pack;
    let tiles = (args.tokens / tile_tokens + args.seqs) * (args.heads / args.pack);

    let name = format!(
        "prefill_{}_{}_d{head_dim}",
        if shape.wgmma { "wgmma" } else { "mma" },
        if half == Half::F16 { "f16" } else { "bf16" }
    );
    let kernel = IMAGE.kernel(context, &name, shape.threads, shape.shared_bytes)?;
    let maps = match shape.wgmma {
        true => tensor_maps(half, head_dim, &args, tile_tokens)?.to_vec(),
        false => Vec::new(),
    };
    // SAFETY: the arguments are those of the kernel, the grid has a thread block for each tile, and
    // the caller guarantees the addresses.
    unsafe { kernel.launch_with(stream, [tiles as usize, 1, 1], &args, &maps) }?;
    Ok(())
}

fn check(args: &PrefillArgs) -> Result<()> {
    if args.kv_heads < 1 || args.heads < 1 || args.heads % args.kv_heads != 0 {
        let expected = format!("a multiple of the {} kv heads", args.kv_heads);
        return Err(Error::mismatch("query heads", expected, args.heads));
    }
    let starts = [("q", args.q), ("k", args.k), ("v", args.v)];
    for (what, address) in starts {
        if address % 16 != 0 {
            return Err(Error::mismatch(what, "an address that 16 divides", address));
        }
    }
    let strides = [
        ("q", [args.q_token, args.q_head]),
        ("k", [args.k_token, args.k_head]),
        ("v", [args.v_token, args.v_head]),
    ];
    for (what, strides) in strides {
        if strides.iter().any(|stride| stride % 8 != 0) {
            let got = format!("{strides:?}");
            return Err(Error::mismatch(format!("strides of {what}"), "multiples of 8", got));
        }
    }
    Ok(())
}

/// Returns the tensor maps of q, k and v, in boxes of 64 channels.
fn tensor_maps(
    half: Half,
    head_dim: usize,
    args: &PrefillArgs,
    tile_tokens: i32,
) -> Result<[TensorMap; 3]> {
    let page = PAGE as i32;
    let q = ([(args.heads, args.q_head), (args.tokens, args.q_token)], [args.pack, tile_tokens]);
    let kv = |token, head| {
        let extents = match args.block_table {
            0 => [(args.kv_extent, token), (args.kv_heads, head)],
            _ => [(page, token), (args.kv_extent, head)],
        };
        (extents, [page, 1])
    };
    let map = |address, (dims, rows): ([(i32, i64); 2], [i32; 2])| {
        // A tensor without keys is not read, but a tensor map needs an extent of at least 1.
        let extents = [head_dim as u64, dims[0].0.max(1) as u64, dims[1].0.max(1) as u64];
        let strides = dims.map(|(_, stride)| stride as u64);
        TensorMap::new(half, address, extents, strides, [64, rows[0] as u32, rows[1] as u32])
    };
    Ok([
        map(args.q, q)?,
        map(args.k, kv(args.k_token, args.k_head))?,
        map(args.v, kv(args.v_token, args.v_head))?,
    ])
}

#[cfg(test)]
mod tests {
    use super::Shape;

    #[test]
    fn packed_heads_divide_the_group_and_fill_a_tile() {
        for (group, wanted) in [(1, 1), (4, 4), (7, 7), (5, 5), (48, 24), (71, 1), (128, 128)] {
            assert_eq!(Shape::new(true, 128).pack(group), wanted, "{group}");
        }
    }
}
