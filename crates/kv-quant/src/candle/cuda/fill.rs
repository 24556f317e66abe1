//! Append: copies entries to the rings and packs them into records.

use super::CudaPool;
use super::head::{Head, Packed};
use super::status::Status;
use super::tensors::{address, kind};
use crate::cuda::{FillArgs, FillRow, TILE};
use candle_core::{DType, Tensor};
use longctx_core::cuda::SharedList;
use longctx_core::{AttentionState, Batch, Error, Mask, Result, Selection, SeqId};
use longctx_cuda::upload;

/// An index that no entry and no record has.
const NONE: i32 = i32::MAX;

/// A call's keys and values in the pool's dtype, and the tokens that each head appends.
struct New {
    /// Keys, `[tokens, kv_heads, head_dim]`.
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
}

/// The tokens that each head appends, `[sequences * kv_heads]`.
pub(super) struct Tokens {
    /// The first token and the kv head in the call's tensors.
    firsts: Vec<(usize, usize)>,
    pub counts: Vec<usize>,
}

/// How far the heads of a sequence are to be packed, `[kv_heads]`.
pub(super) struct Goal {
    seq: SeqId,
    /// Index of the sequence in the batch.
    index: usize,
    heads: Vec<Packed>,
}

/// The rows that pack entries of the rings.
pub(super) struct Packing {
    pub rows: Vec<FillRow>,
    /// Addresses of the new records.
    pub new_records: Vec<u64>,
    pub goals: Vec<Goal>,
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

impl CudaPool {
    /// Appends to every head of the batch's sequences, and packs the entries that the format does
    /// not keep in full precision. After an error nothing has changed, or the batch's sequences are
    /// poisoned.
    pub fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        self.check_unseen(batch, k, v)?;
        let new = self.all(batch, k, v)?;
        self.append_new(batch, &new)
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
        let (mut firsts, mut counts) = (Vec::new(), Vec::new());
        for ((_, own), selection) in batch.iter().zip(tokens) {
            let lists = selection.check(&vec![own.len(); kv_heads])?;
            for (head, list) in lists.iter().enumerate() {
                firsts.push((rows.len(), 0));
                counts.push(list.len());
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
        let (k, v) = (gather(k)?, gather(v)?);
        self.append_new(batch, &New { k, v, tokens: Tokens { firsts, counts } })
    }

    fn append_new(&mut self, batch: &Batch, new: &New) -> Result<()> {
        self.dtype = Some(new.k.dtype());
        let begun = self.make_room(batch, &new.tokens.counts)?;
        let done = if self.fits(batch, &new.tokens.counts) {
            self.fill(batch, new).and_then(|()| self.pack(batch))
        } else {
            self.append_many(batch, new)
        };
        let checked = done.and_then(|()| batch.seqs().iter().try_for_each(|&seq| self.check(seq)));
        if let Err(error) = &checked {
            self.poison(batch, &begun, error);
        }
        checked
    }

    /// Appends tokens that [fit](Self::fits) to the rings, computes their causal attention in full
    /// precision and over the held entries, and then packs them. The output has dtype `dtype`: f32,
    /// f16 or bf16. Returns `None` and changes nothing if the tokens do not fit.
    pub fn append_after_attention(
        &mut self,
        batch: &Batch,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        dtype: DType,
    ) -> Result<Option<AttentionState>> {
        if let Some(prepared) = self.prepared_for(batch)? {
            return Ok(Some(self.run_prepared(batch, &prepared, (q, k, v), dtype)?));
        }
        if !self.fits(batch, &self.counts(batch)) {
            return Ok(None);
        }
        self.check_unseen(batch, k, v)?;
        let new = self.all(batch, k, v)?;
        self.shape.check_q(q)?;
        self.dtype = Some(new.k.dtype());
        let begun = self.make_room(batch, &new.tokens.counts)?;
        let done = self.fill(batch, &new).and_then(|()| {
            let state = self.attend_in(batch, q, Mask::Causal, dtype)?;
            self.pack(batch)?;
            Ok(Some(state))
        });
        if let Err(error) = &done {
            self.poison(batch, &begun, error);
        }
        done
    }

    /// Returns whether the rings have room for the batch's tokens. Then attention can read the
    /// tokens before they are packed.
    fn fits(&self, batch: &Batch, counts: &[usize]) -> bool {
        let (ring, kv_heads) = (self.ring_places(), self.shape.kv_heads);
        batch.seqs().iter().zip(counts.chunks(kv_heads)).all(|(seq, counts)| {
            let residual = |head: usize| {
                self.seqs.get(seq).map_or(0, |sequence| sequence.heads[head].residual())
            };
            counts.iter().enumerate().all(|(head, count)| residual(head) + count <= ring)
        })
    }

    fn check_unseen(&self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        let tokens = self.shape.check_kv(k, v)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of k", batch.tokens(), tokens));
        }
        batch.seqs().iter().try_for_each(|&seq| self.check(seq))
    }

    /// Returns the dtype in which a call's entries are held.
    pub(super) fn dtype_of(&self, k: &Tensor) -> DType {
        match self.dtype {
            Some(dtype) if !self.seqs.is_empty() => dtype,
            _ if k.dtype() == DType::BF16 => DType::BF16,
            _ => DType::F16,
        }
    }

    /// Returns all tokens of a call, for every head.
    fn all(&self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<New> {
        let dtype = self.dtype_of(k);
        let (k, v) = (self.fit_rows(k, dtype)?, self.fit_rows(v, dtype)?);
        Ok(New { k, v, tokens: self.all_tokens(batch) })
    }

    pub(super) fn all_tokens(&self, batch: &Batch) -> Tokens {
        let kv_heads = self.shape.kv_heads;
        let of_seq = |(_, tokens): (SeqId, std::ops::Range<usize>)| {
            (0..kv_heads).map(move |head| (tokens.start, head))
        };
        Tokens { firsts: batch.iter().flat_map(of_seq).collect(), counts: self.counts(batch) }
    }

    fn fill(&mut self, batch: &Batch, new: &New) -> Result<()> {
        let rows = self.ring_rows(batch, &new.tokens);
        self.fill_from(batch, rows, Some(new), &[], Step::Rings)?;
        self.advance(batch, &new.tokens.counts);
        Ok(())
    }

    /// Counts a call's tokens.
    pub(super) fn advance(&mut self, batch: &Batch, counts: &[usize]) {
        let (ring, mut counts) = (self.ring_places(), counts.iter());
        for seq in batch.seqs() {
            for head in self.seqs.get_mut(seq).into_iter().flat_map(|of| &mut of.heads) {
                head.slots += counts.next().unwrap_or(&0);
                head.ring_from = head.ring_from.max(head.slots.saturating_sub(ring));
            }
        }
    }

    /// Packs the entries of the rings that the format no longer keeps in full precision.
    fn pack(&mut self, batch: &Batch) -> Result<()> {
        let Packing { rows, new_records, goals } = self.packing(batch)?;
        self.fill_from(batch, rows, None, &new_records, Step::Records)?;
        self.note(goals);
        Ok(())
    }

    /// Returns the rows that pack entries of the rings, and takes their records.
    pub(super) fn packing(&mut self, batch: &Batch) -> Result<Packing> {
        let mut goals = self.goals(batch, None);
        goals.retain(|goal| self.seqs.get(&goal.seq).is_some_and(|of| goal.changes(&of.heads)));
        let new_records = self.take(&goals)?;
        let (group, mut rows, mut taken) = (self.layout.group(), Vec::new(), 0);
        for Goal { seq, index, heads } in &goals {
            self.for_each_head(*seq, *index, |i, head, mut row| {
                set_packing(&mut row, head.packed, heads[i], group, &mut taken);
                row.round = (heads[i].keys > heads[i].values) as i32;
                if row.key_records + row.value_tiles > 0 {
                    rows.push(row);
                }
            });
        }
        Ok(Packing { rows, new_records, goals })
    }

    /// Appends more tokens than fit in the rings: packs them from the call's tensors, and copies
    /// the newest to the rings.
    fn append_many(&mut self, batch: &Batch, new: &New) -> Result<()> {
        let goals = self.goals(batch, Some(&new.tokens.counts));
        let new_records = self.take(&goals)?;
        let (group, ring, mut taken) = (self.layout.group(), self.ring_places(), 0);
        let mut rows = self.ring_rows(batch, &new.tokens);
        let held = batch.seqs().iter().filter_map(|seq| self.seqs.get(seq));
        let held = held.flat_map(|sequence| &sequence.heads);
        let ends = goals.iter().flat_map(|goal| &goal.heads);
        for ((row, head), end) in rows.iter_mut().zip(held).zip(ends.clone()) {
            set_packing(row, head.packed, *end, group, &mut taken);
            row.move_from = row.move_from.max(row.move_to - ring as i32);
        }
        let step = Step::RecordsThenRings;
        self.fill_from(batch, rows.clone(), Some(new), &new_records, step)?;
        // Keys that are packed before their values are in the ring with their quantized values.
        let ahead = rows.into_iter().zip(ends).map(|(row, goal)| {
            let first = (goal.values / group).max(row.key_record as usize);
            let end = if goal.keys > goal.values { goal.keys / group } else { first };
            FillRow {
                first_new: NONE,
                first_new_record: NONE,
                key_record: first as i32,
                key_records: end.saturating_sub(first) as i32,
                value_tiles: 0,
                round: 1,
                ..row
            }
        });
        let ahead = ahead.filter(|row| row.key_records > 0).collect();
        self.fill_from(batch, ahead, None, &[], Step::Records)?;
        self.advance(batch, &new.tokens.counts);
        self.note(goals);
        Ok(())
    }

    /// Returns how far the heads are to be packed, with `more` further tokens per head if given.
    fn goals(&self, batch: &Batch, more: Option<&[usize]>) -> Vec<Goal> {
        let kv_heads = self.shape.kv_heads;
        let of = |(i, seq): (usize, &SeqId)| {
            let heads = self.seqs.get(seq).map_or(&[][..], |of| &of.heads).iter().enumerate();
            let more = |head: usize| more.map_or(0, |more| more[i * kv_heads + head]);
            let of_head = |(i, head): (usize, &Head)| {
                head.packed_at(self.device_format, head.slots + more(i))
            };
            Goal { seq: *seq, index: i, heads: heads.map(of_head).collect() }
        };
        batch.seqs().iter().enumerate().map(of).collect()
    }

    /// Takes the records that the goals need. Returns their addresses.
    fn take(&mut self, goals: &[Goal]) -> Result<Vec<u64>> {
        let (group, mut new_records) = (self.layout.group(), Vec::new());
        for Goal { seq, heads: goals, .. } in goals {
            let heads = self.seqs.get_mut(seq).into_iter().flat_map(|of| &mut of.heads);
            for (head, goal) in heads.zip(goals) {
                let held = head.table.numbers().len();
                if goal.keys / group > held {
                    head.table.take(goal.keys / group - held)?;
                    new_records.extend(head.table.addresses(held));
                }
            }
        }
        Ok(new_records)
    }

    /// Counts the entries that are packed.
    pub(super) fn note(&mut self, goals: Vec<Goal>) {
        for Goal { seq, heads: goals, .. } in goals {
            let heads = self.seqs.get_mut(&seq).into_iter().flat_map(|of| &mut of.heads);
            heads.zip(goals).for_each(|(head, goal)| head.packed = goal);
        }
    }

    /// Returns a row per kv head of the batch's sequences, which copies the call's tokens to the
    /// ring. All sequences exist.
    pub(super) fn ring_rows(&self, batch: &Batch, tokens: &Tokens) -> Vec<FillRow> {
        let mut rows = Vec::with_capacity(tokens.counts.len());
        for (index, &seq) in batch.seqs().iter().enumerate() {
            self.for_each_head(seq, index, |_, head, row| {
                let (i, slots) = (rows.len(), head.slots as i32);
                let (first_token, kv_head) = tokens.firsts[i];
                rows.push(FillRow {
                    first_token: first_token as i32,
                    kv_head: kv_head as i32,
                    first_new: slots,
                    move_from: slots,
                    move_to: slots + tokens.counts[i] as i32,
                    ..row
                });
            });
        }
        rows
    }

    /// Calls `visit` with each kv head of the batch's sequence `index`, its index in the sequence,
    /// and a row without entries.
    fn for_each_head(
        &self,
        seq: SeqId,
        index: usize,
        mut visit: impl FnMut(usize, &Head, FillRow),
    ) {
        let Some(sequence) = self.seqs.get(&seq) else { return };
        for (kv_head, head) in sequence.heads.iter().enumerate() {
            let row = FillRow {
                tag: Status::tag(sequence.number, kv_head),
                head: (index * self.shape.kv_heads + kv_head) as i32,
                status: Status::index(sequence.number) as i32,
                first_new: NONE,
                shift: head.shift as i32,
                first_new_record: NONE,
                ..FillRow::default()
            };
            visit(kv_head, head, row);
        }
    }

    /// Copies the lists of a step to the device and launches its kernels. `new_records` has the
    /// addresses of all new records.
    fn fill_from(
        &self,
        batch: &Batch,
        rows: Vec<FillRow>,
        new: Option<&New>,
        new_records: &[u64],
        step: Step,
    ) -> Result<()> {
        let most = |of: fn(&FillRow) -> i32| rows.iter().map(of).max().unwrap_or(0).max(0) as usize;
        let (packs, moves) = (step != Step::Rings, step != Step::Records);
        let sizes = FillSizes {
            rows: rows.len(),
            records: if packs { most(|row| row.key_records) } else { 0 },
            tiles: if packs { most(|row| row.value_tiles) } else { 0 },
            entries: if moves { most(|row| row.move_to - row.move_from) } else { 0 },
        };
        if sizes.records + sizes.tiles + sizes.entries == 0 {
            return Ok(());
        }
        let stream = self.stream();
        let new_records = upload(&stream, new_records)?;
        let rows = SharedList::new(batch, &stream, rows)?;
        let memory = self.memory_on_device(&self.memory_of(batch))?;
        let args = FillArgs {
            rows: rows.address(),
            kv_heads: memory.address(),
            new_records: new_records.address(),
            ..self.fill_args(new.map(|new| (&new.k, &new.v)))?
        };
        self.launch_fill(&args, sizes)
    }

    /// Returns the arguments that do not depend on the lists, with the call's tensors if it has
    /// any.
    pub(super) fn fill_args(&self, new: Option<(&Tensor, &Tensor)>) -> Result<FillArgs> {
        let mut args = FillArgs {
            status: self.status().address(),
            ring: self.ring_places() as i32,
            kind: kind(self.dtype.unwrap_or(DType::F16)),
            ..FillArgs::default()
        };
        if let Some((k, v)) = new {
            // The stride of a dimension of size 1 can be any number.
            let stride = |x: &Tensor, dim: usize| match x.dims()[dim] {
                1 => 0,
                _ => x.stride()[dim] as i64,
            };
            (args.new_k, args.new_v) = (address(k)?, address(v)?);
            (args.k_token, args.k_head) = (stride(k, 0), stride(k, 1));
            (args.v_token, args.v_head) = (stride(v, 0), stride(v, 1));
        }
        Ok(args)
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

/// The kernels that a call launches.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    Rings,
    Records,
    RecordsThenRings,
}

impl Goal {
    fn changes(&self, heads: &[Head]) -> bool {
        self.heads.iter().zip(heads).any(|(goal, head)| *goal != head.packed)
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
