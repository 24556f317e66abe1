//! Append: copies entries to the rings and packs them into records.

use super::CudaPool;
use super::append_step::{AppendStep, FillSizes, HeadTokens, Rows, Tokens};
use super::tensors::{address, kind};
use crate::cuda::FillArgs;
use candle_core::{DType, Tensor};
use longctx_core::{AttentionState, Batch, Error, Mask, Result, Selection, SeqId};
use longctx_cuda::upload;
use std::sync::Arc;

/// A call's keys and values in the pool's dtype, `[tokens, kv_heads, head_dim]`.
struct New {
    k: Tensor,
    v: Tensor,
}

impl CudaPool {
    /// Appends to every head of the batch's sequences, and packs the entries that the format does
    /// not keep in full precision. After an error nothing has changed, or the batch's sequences are
    /// poisoned.
    pub fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        self.check_unseen(batch, k, v)?;
        let new = self.in_pool_dtype(k, v)?;
        self.append_new(batch, &new, &Tokens::All)
    }

    /// Appends to each head the tokens selected for it.
    pub fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        self.check_unseen(batch, k, v)?;
        let (kv_heads, mut rows) = (self.shape.kv_heads, Vec::new());
        let mut heads = Vec::new();
        for ((_, own), selection) in batch.iter().zip(tokens) {
            let lists = selection.check(&vec![own.len(); kv_heads])?;
            for (head, list) in lists.iter().enumerate() {
                heads.push(HeadTokens { first: rows.len(), kv_head: 0, count: list.len() });
                let row = |&token: &u32| ((own.start + token as usize) * kv_heads + head) as u32;
                rows.extend(list.iter().map(row));
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let rows = Tensor::new(rows, k.device())?;
        let dtype = self.dtype_of(k);
        let gather = |x: &Tensor| -> Result<Tensor> {
            let x = x.contiguous()?.reshape(((), self.shape.head_dim))?.index_select(&rows, 0)?;
            self.fit(&x.unsqueeze(1)?, dtype)
        };
        let new = New { k: gather(k)?, v: gather(v)? };
        self.append_new(batch, &new, &Tokens::Each(heads))
    }

    fn append_new(&mut self, batch: &Batch, new: &New, tokens: &Tokens) -> Result<()> {
        let (step, created) = self.begin(batch, tokens)?;
        self.dtype = Some(new.k.dtype());
        let done = self.run(batch, &step, new, |_, _| Ok(()));
        let checked = done.and_then(|()| self.check_all(batch));
        if let Err(error) = &checked {
            self.poison(batch, &created, error);
        }
        checked
    }

    /// Appends tokens that fit in the rings, computes their causal attention in full precision and
    /// over the held entries, and then packs them. The output has dtype `dtype`: f32, f16 or bf16.
    /// Returns `None` and changes nothing if the tokens do not fit.
    pub fn append_after_attention(
        &mut self,
        batch: &Batch,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        dtype: DType,
    ) -> Result<Option<AttentionState>> {
        if let Some(prepared) = self.prepared_for(batch)? {
            return Ok(Some(self.run_prepared(batch, &prepared, (q, k, v), dtype)?));
        }
        if batch.max_seqlen() > self.ring_places() {
            return Ok(None);
        }
        self.check_unseen(batch, k, v)?;
        self.check_q(batch, q)?;
        let new = self.in_pool_dtype(k, v)?;
        let q = self.fit(q, new.k.dtype())?;
        let (step, created) = self.begin(batch, &Tokens::All)?;
        if !step.fits {
            self.forget(&created);
            return Ok(None);
        }
        self.dtype = Some(new.k.dtype());
        let done = self.run(batch, &step, &new, |pool, kv_heads| {
            let state = pool.outputs(batch, dtype)?;
            let kernel = pool.kernel(batch, batch.max_seqlen());
            let launch = pool.step_plan(batch, kernel, &step)?.launch(&pool.stream())?;
            let early = step.first.sizes.entries > 0;
            pool.launch_attend(kernel, &q, Mask::Causal, &state, (launch, kv_heads), early)?;
            Ok(state)
        });
        if let Err(error) = &done {
            self.poison(batch, &created, error);
        }
        done.map(Some)
    }

    fn check_unseen(&self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        let tokens = self.shape.check_kv(k, v)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of k", batch.tokens(), tokens));
        }
        self.check_all(batch)
    }

    /// Returns the dtype in which a call's entries are held.
    pub(super) fn dtype_of(&self, k: &Tensor) -> DType {
        match self.dtype {
            Some(dtype) if !self.seqs.is_empty() => dtype,
            _ if k.dtype() == DType::BF16 => DType::BF16,
            _ => DType::F16,
        }
    }

    fn in_pool_dtype(&self, k: &Tensor, v: &Tensor) -> Result<New> {
        let dtype = self.dtype_of(k);
        Ok(New { k: self.fit_rows(k, dtype)?, v: self.fit_rows(v, dtype)? })
    }

    /// Creates unknown sequences, and makes room for a call's tokens. Returns the call's lists and
    /// the new sequences. After an error nothing has changed.
    pub(super) fn begin(
        &mut self,
        batch: &Batch,
        tokens: &Tokens,
    ) -> Result<(Arc<AppendStep>, Vec<SeqId>)> {
        let created = self.create(batch)?;
        let step = self.step(batch, tokens).and_then(|step| {
            self.make_room(&step)?;
            Ok(step)
        });
        match step {
            Ok(step) => Ok((step, created)),
            Err(error) => {
                self.forget(&created);
                Err(error)
            }
        }
    }

    /// Copies the call's tokens to the rings, calls `attend` with the address of the heads' memory,
    /// and packs the entries that the format does not keep in full precision.
    fn run<T>(
        &mut self,
        batch: &Batch,
        step: &AppendStep,
        new: &New,
        attend: impl FnOnce(&Self, u64) -> Result<T>,
    ) -> Result<T> {
        let stream = self.stream();
        let new_records = upload(&stream, &self.take(step)?)?;
        let memory = self.memory_on_device(&self.memory_of(batch))?;
        let args = FillArgs {
            kv_heads: memory.address(),
            new_records: new_records.address(),
            ..self.fill_args((&new.k, &new.v))?
        };
        let launch = |pool: &Self, rows: &Rows| -> Result<()> {
            match rows.rows.list().is_empty() {
                true => Ok(()),
                false => {
                    let args = FillArgs { rows: rows.rows.address(&stream)?, ..args };
                    pool.launch_fill(&args, rows.sizes)
                }
            }
        };
        launch(self, &step.first)?;
        let attended = attend(self, memory.address())?;
        launch(self, &step.second)?;
        self.advance(batch, step);
        Ok(attended)
    }

    /// Takes the records of a step. Returns their addresses.
    pub(super) fn take(&mut self, step: &AppendStep) -> Result<Vec<u64>> {
        let mut new_records = Vec::new();
        for take in &step.takes {
            if let Some(sequence) = self.seqs.get_mut(&take.seq) {
                let table = &mut sequence.heads[take.kv_head].table;
                table.take(take.count)?;
                new_records.extend(table.addresses(take.held));
            }
        }
        Ok(new_records)
    }

    /// Counts a call's tokens, and the entries that are packed.
    pub(super) fn advance(&mut self, batch: &Batch, step: &AppendStep) {
        let (ring, mut ends) = (self.ring_places(), step.ends.iter());
        for seq in batch.seqs() {
            let heads = self.seqs.get_mut(seq).into_iter().flat_map(|of| &mut of.heads);
            for (head, &(count, packed)) in heads.zip(&mut ends) {
                head.slots += count;
                head.ring_from = head.ring_from.max(head.slots.saturating_sub(ring));
                head.packed = packed;
            }
        }
    }

    /// Returns the arguments that do not depend on the lists, with the call's tensors.
    pub(super) fn fill_args(&self, (k, v): (&Tensor, &Tensor)) -> Result<FillArgs> {
        // The stride of a dimension of size 1 can be any number.
        let stride = |x: &Tensor, dim: usize| match x.dims()[dim] {
            1 => 0,
            _ => x.stride()[dim] as i64,
        };
        Ok(FillArgs {
            new_k: address(k)?,
            new_v: address(v)?,
            status: self.status().address(),
            k_token: stride(k, 0),
            k_head: stride(k, 1),
            v_token: stride(v, 0),
            v_head: stride(v, 1),
            ring: self.ring_places() as i32,
            kind: kind(self.dtype.unwrap_or(DType::F16)),
            ..FillArgs::default()
        })
    }

    /// Launches the packing of records, and then the copy to the rings.
    pub(super) fn launch_fill(&self, args: &FillArgs, sizes: FillSizes) -> Result<()> {
        let (stream, FillSizes { rows, records, tiles, entries }) = (self.stream(), sizes);
        // SAFETY: the rows' tensors, rings and tables have room for their entries and records, and
        // a stream runs its operations in order.
        unsafe {
            if records + tiles > 0 {
                self.kernels.pack(&stream, args, (rows, records, tiles))?;
            }
            if entries > 0 {
                self.kernels.fill_rings(&stream, args, (rows, entries))?;
            }
        }
        Ok(())
    }
}
