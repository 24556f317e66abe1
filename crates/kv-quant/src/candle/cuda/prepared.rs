//! Decode steps with CUDA graphs: the host's part of an append and of attention before packing.

use super::CudaPool;
use super::append_step::{AppendStep, FillSizes, Tokens};
use super::attend::part_len;
use super::head::completed_by_token;
use crate::cuda::{FillArgs, Work};
use candle_core::{DType, Tensor};
use longctx_core::cuda::{PlanLaunch, after_step};
use longctx_core::{AttentionState, Batch, Mask, PreparedStep, Result, StepLists};
use longctx_cuda::bytes_of;
use longctx_cuda::cudarc::driver::CudaStream;
use std::sync::Arc;

/// The lists of a prepared step. The addresses are offsets in its [`StepLists`] and its workspace.
#[derive(Debug, Clone, Copy)]
pub struct Prepared {
    /// Kv heads of all sequences.
    heads: usize,
    /// Their memory.
    kv_heads: u64,
    ring_rows: u64,
    pack_rows: u64,
    new_records: u64,
    attend: PlanLaunch,
    /// The largest numbers of key records and value tiles that a head packs.
    records: usize,
    tiles: usize,
}

impl Prepared {
    /// Returns the lists with device addresses.
    fn at(mut self, step: PreparedStep) -> Self {
        let Self { kv_heads, ring_rows, pack_rows, new_records, .. } = &mut self;
        for list in [kv_heads, ring_rows, pack_rows, new_records] {
            *list += step.lists;
        }
        Self { attend: self.attend.at(step), ..self }
    }
}

impl CudaPool {
    /// Takes memory for a token of each sequence, and adds the lists of its append, of causal
    /// attention, and of packing after it. All sequences exist. After an error nothing has changed,
    /// or the batch's sequences are poisoned.
    pub fn prepare_decode(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()> {
        batch.check_decode()?;
        self.check_all(batch)?;
        let (step, _) = self.begin(batch, &Tokens::All)?;
        match self.prepare_lists(batch, &step, lists) {
            Ok(prepared) => self.prepared = Some(prepared),
            Err(error) => {
                self.poison(batch, &[], &error);
                return Err(error);
            }
        }
        self.advance(batch, &step);
        Ok(())
    }

    fn prepare_lists(
        &mut self,
        batch: &Batch,
        step: &Arc<AppendStep>,
        lists: &mut StepLists,
    ) -> Result<Prepared> {
        let new_records = self.take(step)?;
        let memory = self.memory_of(batch);
        let kv_heads = lists.push(bytes_of(&memory), size_of_val(&memory[..]));
        let attend = self.attend_lists(batch, step, lists)?;
        let (heads, ring_rows) = (step.work.len(), bytes_of(step.first.rows.list()));
        let pack_rows = bytes_of(step.second.rows.list());
        let usual = completed_by_token(self.device_format, self.layout);
        let records = step.second.sizes.records.max(usual.0);
        let tiles = step.second.sizes.tiles.max(usual.1);
        [records, tiles].into_iter().for_each(|size| lists.push_size(size));
        Ok(Prepared {
            heads,
            kv_heads,
            ring_rows: lists.push_part(step, ring_rows, ring_rows.len()),
            // Rows without entries are skipped.
            pack_rows: lists.push_part(step, pack_rows, ring_rows.len()),
            new_records: lists.push(bytes_of(&new_records), 8 * heads * records),
            attend,
            records,
            tiles,
        })
    }

    fn attend_lists(
        &self,
        batch: &Batch,
        step: &AppendStep,
        lists: &mut StepLists,
    ) -> Result<PlanLaunch> {
        let (per, heads) = (self.shape.heads_per_kv(), step.work.len());
        let kernel = self.kernel(batch, 1);
        let plan = self.step_plan(batch, kernel, step)?;
        let items = kernel.max_work(heads, per);
        let merges = heads * per.div_ceil(kernel.columns());
        lists.require_workspace(4 * items * part_len(kernel.columns(), self.shape.head_dim));
        Ok(PlanLaunch {
            work: lists.push_part(&plan, bytes_of(&plan.plan.work), items * size_of::<Work>()),
            items,
            arrived: lists.push_shared(&[], 4 * merges),
            parts: 0,
            max_parts: items,
        })
    }

    /// Returns the lists of a prepared step; `None` if the batch is not prepared.
    pub(super) fn prepared_for(&self, batch: &Batch) -> Result<Option<Prepared>> {
        let seqs = self.prepared.map(|prepared| prepared.heads / self.shape.kv_heads);
        let step = batch.prepared_for(seqs)?;
        Ok(self.prepared.zip(step).map(|(prepared, step)| prepared.at(step)))
    }

    /// Launches a prepared step: copies the tokens to the rings and computes attention. Packs at the
    /// end of the step.
    pub(super) fn run_prepared(
        &self,
        batch: &Batch,
        prepared: &Prepared,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        dtype: DType,
    ) -> Result<AttentionState> {
        let held = self.dtype_of(k);
        let (q, k, v) = (self.fit(q, held)?, self.fit_rows(k, held)?, self.fit_rows(v, held)?);
        let args = FillArgs {
            rows: prepared.ring_rows,
            kv_heads: prepared.kv_heads,
            new_records: prepared.new_records,
            ..self.fill_args((&k, &v))?
        };
        let rows = prepared.heads;
        self.launch_fill(&args, FillSizes { rows, entries: 1, ..FillSizes::default() })?;
        let state = self.outputs(batch, dtype)?;
        let kernel = self.kernel(batch, 1);
        let lists = (prepared.attend, prepared.kv_heads);
        self.launch_attend(kernel, &q, Mask::Causal, &state, lists, true)?;
        let &Prepared { records, tiles, pack_rows, .. } = prepared;
        if records + tiles > 0 {
            let (kernels, args) = (self.kernels.clone(), FillArgs { rows: pack_rows, ..args });
            let sizes = (rows, records, tiles);
            // SAFETY: as in `launch_fill`. `first_new` of these rows is beyond every entry, so the
            // kernel reads the rings, and not `k` and `v`, which may be freed before.
            let launch = move |on: &Arc<CudaStream>| Ok(unsafe { kernels.pack(on, &args, sizes) }?);
            after_step(batch, &self.stream(), launch)?;
        }
        Ok(state)
    }
}
