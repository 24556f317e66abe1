//! Decode steps with CUDA graphs: the host's part of an append and of attention.

use std::sync::Arc;

use super::CudaPool;
use super::append::AppendLists;
use super::append_step::AppendStep;
use super::decode::part_len;
use super::evict::EvictLists;
use crate::cuda::PlanLaunch;
use crate::{Batch, Mask, PreparedStep, Result, StepLists};
use longctx_cuda::bytes_of;

/// The lists of a prepared step. The addresses are offsets in its [`StepLists`] and its workspace.
#[derive(Debug, Clone, Copy)]
pub struct Prepared {
    /// Kv heads of all sequences.
    pub heads: usize,
    /// Their block tables.
    pub tables: u64,
    /// `None` if the step only attends.
    pub append: Option<AppendLists>,
    pub attend: PlanLaunch,
    /// Columns of a thread block of attention.
    pub columns: usize,
    /// `None` if the step evicts nothing.
    pub evict: Option<EvictLists>,
}

impl Prepared {
    /// Returns the lists with device addresses.
    fn at(mut self, step: PreparedStep) -> Self {
        self.tables += step.lists;
        if let Some(AppendLists { rows, tables, new_blocks }) = &mut self.append {
            [rows, tables, new_blocks].into_iter().for_each(|list| *list += step.lists);
        }
        if let Some(EvictLists { rows, lse, scores }) = &mut self.evict {
            *rows += step.lists;
            *lse += step.reserved;
            scores.address += step.reserved;
        }
        Self { attend: self.attend.at(step), ..self }
    }
}

impl CudaPool {
    /// Returns whether one query per sequence runs through the decode kernel.
    pub fn prepares_decode(&self) -> bool {
        self.decodes(1)
    }

    /// Takes memory for a token of each sequence, and adds the lists of its append and of causal
    /// attention after it. All sequences exist.
    pub fn prepare_decode(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()> {
        batch.check_decode()?;
        // The plan, after the tokens have been counted, cannot fail if this does not.
        self.sizes(batch)?;
        let step = self.step(batch)?;
        let blocks = self.blocks.take(step.blocks)?;
        let append = match self.append_lists(batch, &step, &blocks, lists) {
            Ok(append) => append,
            Err(error) => {
                blocks.into_iter().for_each(|block| self.blocks.release(block));
                return Err(error);
            }
        };
        self.advance(batch, &step, &blocks);
        let heads = batch.seqs().len() * self.shape.kv_heads;
        let (attend, columns) = self.attend_lists(batch, lists)?;
        let tables = append.tables;
        let append = Some(append);
        let prepared = Prepared { heads, tables, append, attend, columns, evict: None };
        self.set_prepared(batch, prepared);
        Ok(())
    }

    /// Adds the lists of attention of one query per sequence over all its entries. All sequences
    /// exist.
    pub fn prepare_attend(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()> {
        batch.check_decode()?;
        let tables = self.head_tables(&self.seq_tables(batch));
        let tables = lists.push(bytes_of(&tables), size_of_val(&tables[..]));
        let heads = batch.seqs().len() * self.shape.kv_heads;
        let (attend, columns) = self.attend_lists(batch, lists)?;
        let (append, evict) = (None, None);
        self.set_prepared(batch, Prepared { heads, tables, append, attend, columns, evict });
        Ok(())
    }

    fn set_prepared(&mut self, batch: &Batch, prepared: Prepared) {
        self.prepared = Some(prepared);
        self.prepared_seqs.clear();
        self.prepared_seqs.extend_from_slice(batch.seqs());
    }

    fn append_lists(
        &mut self,
        batch: &Batch,
        step: &Arc<AppendStep>,
        blocks: &[u32],
        lists: &mut StepLists,
    ) -> Result<AppendLists> {
        self.reserve_tables(step)?;
        self.copy_shared(step, blocks)?;
        let tables = self.head_tables(&self.seq_tables(batch));
        let addresses = self.addresses(blocks);
        let (rows, tables) = (bytes_of(step.rows.list()), bytes_of(&tables));
        Ok(AppendLists {
            rows: lists.push_part(step, rows, rows.len()),
            // A head takes at most one block, new or a copy.
            new_blocks: lists.push(bytes_of(&addresses), tables.len()),
            tables: lists.push(tables, tables.len()),
        })
    }

    fn attend_lists(&self, batch: &Batch, lists: &mut StepLists) -> Result<(PlanLaunch, usize)> {
        let plan = self.plan(batch, Mask::Causal, (0, &[]))?;
        let (items, merges) = plan.limits();
        let columns = plan.columns();
        lists.require_workspace(4 * items * part_len(columns, self.shape.head_dim));
        let work = bytes_of(&plan.plan.work);
        let item = work.len() / plan.plan.work.len().max(1);
        let launch = PlanLaunch {
            work: lists.push_part(&plan, work, items * item),
            items,
            arrived: lists.push_shared(&[], 4 * merges),
            parts: 0,
            max_parts: items,
        };
        Ok((launch, columns))
    }

    /// Returns the lists of a prepared step; `None` if the batch is not prepared.
    pub(super) fn prepared_for(&self, batch: &Batch) -> Result<Option<Prepared>> {
        let seqs = self.prepared.map(|prepared| prepared.heads / self.shape.kv_heads);
        let step = batch.prepared_for(seqs)?;
        Ok(self.prepared.zip(step).map(|(prepared, step)| prepared.at(step)))
    }
}
