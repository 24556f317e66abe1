//! The lists of an append and of the attention of its tokens. They depend on lengths only, so the
//! layers of a model share them.

use std::sync::{Arc, OnceLock};

use super::CudaPool;
use super::attend::SharedPlan;
use super::head::Packed;
use super::lens::HeadLens;
use crate::Format;
use crate::cuda::{AttendKernel, FillRow, Sizes, TILE, Work};
use longctx_core::cuda::SharedList;
use longctx_core::{Batch, Mask, Result, SeqId};

/// The tokens that the heads append.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Tokens {
    /// All tokens of a call.
    All,
    /// The tokens of each head, `[sequences * kv_heads]`.
    Each(Vec<HeadTokens>),
}

/// The tokens that a head appends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct HeadTokens {
    /// The first token and the kv head in the call's tensors.
    pub first: usize,
    pub kv_head: usize,
    pub count: usize,
}

impl Tokens {
    /// Returns the tokens of each head.
    pub fn each(&self, batch: &Batch, kv_heads: usize) -> Vec<HeadTokens> {
        match self {
            Self::All => batch
                .iter()
                .flat_map(|(_, own)| {
                    (0..kv_heads).map(move |kv_head| HeadTokens {
                        first: own.start,
                        kv_head,
                        count: own.len(),
                    })
                })
                .collect(),
            Self::Each(heads) => heads.clone(),
        }
    }
}

/// The rows of a launch that packs entries and copies tokens to rings.
#[derive(Debug)]
pub(super) struct Rows {
    pub rows: SharedList<FillRow>,
    pub sizes: FillSizes,
}

/// The size of a launch.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FillSizes {
    pub rows: usize,
    /// The largest numbers of key records and value tiles that a row packs.
    pub records: usize,
    pub tiles: usize,
    /// The largest number of entries that a row copies to a ring.
    pub entries: usize,
}

impl Rows {
    fn new(rows: Vec<FillRow>) -> Self {
        let most = |of: fn(&FillRow) -> i32| rows.iter().map(of).max().unwrap_or(0).max(0) as usize;
        let sizes = FillSizes {
            rows: rows.len(),
            records: most(|row| row.key_records),
            tiles: most(|row| row.value_tiles),
            entries: most(|row| row.move_to - row.move_from),
        };
        Self { rows: SharedList::new(rows), sizes }
    }
}

/// The records that a head takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Take {
    pub seq: SeqId,
    pub kv_head: usize,
    /// Records that it holds before.
    pub held: usize,
    pub count: usize,
}

/// The properties of a layer that determine its lists, besides the lengths.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Key {
    /// Address of the stream, whose order protects the lists on the device.
    stream: usize,
    format: Format,
    kv_heads: usize,
    head_dim: usize,
    /// Those of attention.
    sizes: Sizes,
}

/// A call's lists.
pub(super) struct AppendStep {
    key: Key,
    tokens: Tokens,
    /// The lengths before the call.
    lens: Vec<HeadLens>,
    /// Whether the rings have room for the tokens. Then attention can read the tokens before they
    /// are packed.
    pub fits: bool,
    /// Copies the tokens to the rings. Tokens that do not fit are packed, except the newest.
    pub first: Rows,
    /// Packs entries of the rings.
    pub second: Rows,
    /// The number of tokens that each head appends, and how far it is packed then.
    pub ends: Vec<(usize, Packed)>,
    pub takes: Vec<Take>,
    /// Work items of attention before packing.
    pub work: Vec<Work>,
    plan: OnceLock<Arc<SharedPlan>>,
}

impl CudaPool {
    /// Returns the lists of a call, which layers with equal lengths share. All sequences exist.
    pub(super) fn step(&self, batch: &Batch, tokens: &Tokens) -> Result<Arc<AppendStep>> {
        let key = Key {
            stream: self.stream().cu_stream() as usize,
            format: self.device_format,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.head_dim,
            sizes: self.sizes(self.kernel(batch, batch.max_seqlen()), Mask::Causal),
        };
        let equal = |step: &AppendStep| {
            step.key == key && step.tokens == *tokens && self.has_lens(batch, &step.lens)
        };
        batch.shared(equal, || Ok(self.new_step(batch, tokens, key)))
    }

    fn new_step(&self, batch: &Batch, tokens: &Tokens, key: Key) -> AppendStep {
        let (kv_heads, group, ring) = (key.kv_heads, self.layout.group(), self.ring_places());
        let lens = self.lens_of(batch);
        let heads = tokens.each(batch, kv_heads);
        let after = || lens.iter().zip(&heads).map(|(head, tokens)| head.after(tokens.count));
        let goals: Vec<_> = after().map(|head| head.goal(key.format)).collect();
        let (mut takes, mut work) = (Vec::new(), Vec::with_capacity(lens.len()));
        for (index, (head, goal)) in after().zip(&goals).enumerate() {
            let (seq, kv_head) = (index / kv_heads, index % kv_heads);
            let own = batch.cu_seqlens()[seq]..batch.cu_seqlens()[seq + 1];
            work.push(head.work(index, kv_head, &own, ring));
            let (held, seq) = (head.records, batch.seqs()[seq]);
            let count = (goal.keys / group).saturating_sub(held);
            takes.extend((count > 0).then_some(Take { seq, kv_head, held, count }));
        }
        let fits = after().all(|head| head.residual() <= ring);
        let (first, second) = self.fill_rows(&lens, &heads, &goals, fits);
        AppendStep {
            key,
            tokens: tokens.clone(),
            fits,
            first: Rows::new(first),
            second: Rows::new(second),
            ends: heads.iter().map(|tokens| tokens.count).zip(goals).collect(),
            takes,
            work,
            plan: OnceLock::new(),
            lens,
        }
    }

    /// Returns the rows of the first and the second launch.
    fn fill_rows(
        &self,
        lens: &[HeadLens],
        heads: &[HeadTokens],
        goals: &[Packed],
        fits: bool,
    ) -> (Vec<FillRow>, Vec<FillRow>) {
        let (group, ring, mut taken) = (self.layout.group(), self.ring_places() as i32, 0);
        let (mut first, mut second) = (Vec::with_capacity(lens.len()), Vec::new());
        for (index, ((head, tokens), goal)) in lens.iter().zip(heads).zip(goals).enumerate() {
            let empty = head.row(index, index % self.shape.kv_heads);
            let slots = head.slots as i32;
            let move_to = slots + tokens.count as i32;
            let copy = FillRow {
                first_token: tokens.first as i32,
                kv_head: tokens.kv_head as i32,
                first_new: slots,
                move_from: slots,
                move_to,
                ..empty
            };
            let mut pack = if fits { empty } else { copy };
            set_packing(&mut pack, head.packed, *goal, group, &mut taken);
            if fits {
                first.push(copy);
                pack.round = (goal.keys > goal.values).into();
                second.extend((pack.key_records + pack.value_tiles > 0).then_some(pack));
                continue;
            }
            pack.move_from = pack.move_from.max(move_to - ring);
            first.push(pack);
            // Keys that are packed before their values are in the ring with their quantized values.
            let ahead = (goal.values / group).max(pack.key_record as usize);
            let end = if goal.keys > goal.values { goal.keys / group } else { ahead };
            second.extend((end > ahead).then_some(FillRow {
                key_record: ahead as i32,
                key_records: (end - ahead) as i32,
                round: 1,
                ..empty
            }));
        }
        (first, second)
    }

    /// Returns the plan of a step's causal attention.
    pub(super) fn step_plan(
        &self,
        batch: &Batch,
        kernel: &AttendKernel,
        step: &AppendStep,
    ) -> Result<Arc<SharedPlan>> {
        if let Some(plan) = step.plan.get() {
            return Ok(plan.clone());
        }
        let plan = self.plan(batch, kernel, Mask::Causal, &step.work)?;
        Ok(step.plan.get_or_init(|| plan).clone())
    }
}

/// Packs the entries between `from` and `goal`. `taken` counts the new records of the rows so far.
fn set_packing(row: &mut FillRow, from: Packed, goal: Packed, group: usize, taken: &mut i32) {
    row.new_records = *taken;
    row.first_new_record = (from.keys / group) as i32;
    row.key_record = row.first_new_record;
    row.key_records = ((goal.keys - from.keys) / group) as i32;
    row.value_tile = from.tiles as i32;
    row.value_tiles = (goal.tiles - from.tiles) as i32;
    *taken += row.key_records;
    debug_assert!(goal.tiles * TILE <= goal.keys);
}
