//! Attention over 4-bit keys and values in memory that this program allocates with cudarc, without
//! a tensor library: it packs random tokens, captures attention in a CUDA graph and replays it for
//! other sequences. The results are compared with those of kv-quant on the CPU.
//!
//!     cargo run --release -p longctx-cuda-raw --features cuda
#![allow(unsafe_code)]

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use half::{f16, slice::HalfFloatSliceExt};
use kv_quant::cuda::longctx_cuda::cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, DevicePtr, sys,
};
use kv_quant::cuda::{AttendArgs, FillArgs, FillRow, Kernels, KvHead, Layout, Report, TILE, Work};
use kv_quant::{Bits, Format, Mask, Pool, PoolShape, Queries};
use rand::{Rng, SeedableRng, rngs::StdRng};

const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const PER_KV: usize = HEADS / KV_HEADS;
const D: usize = 128;
/// The sequences' tokens. A call attends to two of the sequences, with one query each.
const LENS: [usize; 3] = [5000, 333, 20_000];

fn at<T>(x: &CudaSlice<T>) -> u64 {
    x.device_ptr(x.stream()).0
}

fn random(rng: &mut StdRng, count: usize) -> Vec<f16> {
    (0..count).map(|_| f16::from_f32(rng.random_range(-2.0..2.0))).collect()
}

fn worst(got: &[f32], want: &[f32]) -> f32 {
    let errors = got.iter().zip(want).map(|(got, want)| (got - want).abs());
    errors.max_by(f32::total_cmp).unwrap_or(f32::NAN)
}

/// Packs the whole groups of each sequence, and copies its other tokens to the rings. Returns a
/// work item for each kv head, the heads' memory, and what that points to.
fn pack(
    stream: &Arc<CudaStream>,
    kernels: &Kernels,
    tokens: &[[Vec<f16>; 2]],
) -> Result<(Vec<Work>, CudaSlice<KvHead>, impl Sized + use<>)> {
    let (layout, rows) = (kernels.layout(), LENS.len() * KV_HEADS);
    let (group, blocks) = (layout.group(), LENS.map(|len| len / layout.group()));
    let most = blocks.into_iter().max().unwrap_or(0);
    let total = KV_HEADS * blocks.iter().sum::<usize>();
    let records = stream.alloc_zeros::<u8>(total * layout.record())?;
    // A record can be anywhere: the block tables take them from the end.
    let mut free = (0..total).map(|i| at(&records) + (i * layout.record()) as u64);
    let mut tables = vec![0; rows * most];
    for (row, table) in tables.chunks_mut(most).enumerate() {
        table[..blocks[row / KV_HEADS]].fill_with(|| free.next_back().unwrap_or(0));
    }
    let tables = stream.clone_htod(&tables)?;
    let ring = || stream.alloc_zeros::<u16>(rows * group * D);
    let (rings, status) = ([ring()?, ring()?], stream.alloc_zeros::<u64>(1)?);
    let (mut fill, mut heads, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for seq in 0..LENS.len() {
        for kv_head in 0..KV_HEADS {
            let row = heads.len();
            let of_ring = |ring| at(ring) + (2 * row * group * D) as u64;
            memory.push(KvHead {
                table: at(&tables) + (8 * row * most) as u64,
                ring_k: of_ring(&rings[0]),
                ring_v: of_ring(&rings[1]),
                valid: 0,
            });
            let work = Work {
                head: row as i32,
                packed: (blocks[seq] * group) as i32,
                residual: (LENS[seq] % group) as i32,
                kv_head: kv_head as i32,
                queries: 1,
                ..Work::default()
            };
            fill.push(FillRow {
                head: row as i32,
                kv_head: kv_head as i32,
                first_token: LENS[..seq].iter().sum::<usize>() as i32,
                first_new_record: i32::MAX, // All addresses are in the table.
                key_records: blocks[seq] as i32,
                value_tiles: work.packed / TILE as i32,
                move_from: work.packed,
                move_to: LENS[seq] as i32,
                ..FillRow::default()
            });
            heads.push(work);
        }
    }
    let of = |i: usize| tokens.iter().flat_map(|kv| &kv[i]).copied().collect::<Vec<f16>>();
    let upload = |x: Vec<f16>| stream.clone_htod::<u16, _>(x.reinterpret_cast());
    let (k, v) = (upload(of(0))?, upload(of(1))?);
    let (fill, memory) = (stream.clone_htod(&fill)?, stream.clone_htod(&memory)?);
    let (token, head) = ((KV_HEADS * D) as i64, D as i64);
    let args = FillArgs {
        rows: at(&fill),
        kv_heads: at(&memory),
        new_k: at(&k),
        new_v: at(&v),
        status: at(&status),
        k_token: token,
        k_head: head,
        v_token: token,
        v_head: head,
        ring: group as i32,
        ..FillArgs::default()
    };
    // SAFETY: the rows describe the arrays above, which are freed in the order of the stream.
    unsafe {
        kernels.pack(stream, &args, (rows, most, most * group / TILE))?;
        kernels.fill_rings(stream, &args, (rows, group))?;
    }
    let report = Report::decode(stream.clone_dtoh(&status)?[0]);
    ensure!(report.is_none(), "numbers that cannot be packed: {report:?}");
    Ok((heads, memory, (records, tables, rings)))
}

fn main() -> Result<()> {
    let (rng, scale) = (&mut StdRng::seed_from_u64(1), 1.0 / (D as f32).sqrt());
    let stream = CudaContext::new(0)?.new_stream()?;
    let format = Format::kivi_rolling(Bits::Four, Bits::Four, 32, 0)?;
    let kernels = Kernels::load(stream.context(), Layout::new(format, D)?)?;
    let mut pool = Pool::new(PoolShape { kv_heads: KV_HEADS, head_dim: D, value_dim: D }, format)?;
    let tokens = LENS.map(|len| [(); 2].map(|()| random(rng, len * KV_HEADS * D)));
    for (seq, [k, v]) in tokens.iter().enumerate() {
        pool.append(&[seq as u64], &[0, LENS[seq]], k, v)?;
    }
    let (held, kv_heads, _memory) = pack(&stream, &kernels, &tokens)?;

    // Memory for a call with any two sequences.
    let attend = kernels.attend(PER_KV, 2 * KV_HEADS);
    let parts = attend.max_work(2 * KV_HEADS, PER_KV);
    let mut work = stream.clone_htod(&vec![Work::default(); parts])?;
    let mut q = stream.alloc_zeros::<u16>(2 * HEADS * D)?;
    let floats = |count| stream.alloc_zeros::<f32>(count);
    let (out, lse) = (floats(q.len())?, floats(2 * HEADS)?);
    let part_out = floats(parts * attend.columns() * D)?;
    let part_lse = floats(parts * attend.columns())?;
    let arrived = stream.alloc_zeros::<u32>(2 * KV_HEADS)?;
    let args = AttendArgs {
        q: at(&q),
        out: at(&out),
        lse: at(&lse),
        part_out: at(&part_out),
        part_lse: at(&part_lse),
        arrived: at(&arrived),
        work: at(&work),
        kv_heads: at(&kv_heads),
        heads: HEADS as i32,
        heads_per_kv: PER_KV as i32,
        ring: kernels.layout().group() as i32,
        causal: 1,
        out_kind: 2,
        scale,
        ..AttendArgs::default()
    };
    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
    // SAFETY: the arrays have the sizes of `args` and of the work items, which are written below.
    unsafe { attend.launch(&stream, &args, parts, false) }?;
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags)?.context("nothing was captured")?;

    for seqs in [[0, 1], [2, 0], [1, 2]] {
        let heads_of = |token: usize| {
            let heads = &held[seqs[token] as usize * KV_HEADS..][..KV_HEADS];
            heads.iter().map(move |head| Work { first_token: token as i32, ..*head })
        };
        let heads: Vec<_> = (0..2).flat_map(heads_of).collect();
        let plan = attend.plan(&heads, PER_KV, None).padded(parts);
        let data = &random(rng, q.len())[..];
        stream.memcpy_htod::<u16, _, _>(data.reinterpret_cast(), &mut q)?;
        stream.memcpy_htod(&plan.work, &mut work)?;
        graph.launch()?;
        let queries = Queries { data, heads: HEADS, scale, soft_cap: None, window: None };
        let want = pool.attend(&queries, &seqs, &[0, 1, 2], Mask::Causal)?;
        let of_out = worst(&stream.clone_dtoh(&out)?, &want.out);
        let of_lse = worst(&stream.clone_dtoh(&lse)?, &want.lse);
        println!(
            "sequences {seqs:?}: errors {of_out:.1e} of outputs, {of_lse:.1e} of log-sum-exps"
        );
        ensure!(of_out < 2e-3 && of_lse < 2e-3, "the errors are too large");
    }
    Ok(())
}
