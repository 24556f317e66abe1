//! Append: copies entries to the rings and packs them into records.

use super::CudaPool;
use super::head::{Head, Packed};
use super::status::Status;
use super::tensors::{address, kind};
use crate::cuda::{FillArgs, FillRow, TILE};
use candle_core::{DType, Tensor};
use longctx_core::{AttentionState, Batch, Error, Mask, Result, Selection, SeqId};
use longctx_cuda::upload;

/// An index that no entry and no record has.
const NONE: i32 = i32::MAX;

/// A call's keys and values in the pool's dtype, and the tokens that each head appends.
struct New {
    /// Keys, in rows of head_dim elements.
    k: Tensor,
    v: Tensor,
    /// Number of rows from a head's token to its next.
    stride: usize,
    /// The first row that each head appends, `[sequences * kv_heads]`.
    firsts: Vec<usize>,
    /// Number of tokens that each head appends, `[sequences * kv_heads]`.
    counts: Vec<usize>,
}

/// How far the heads of a sequence are to be packed, `[kv_heads]`.
struct Goal {
    seq: SeqId,
    heads: Vec<Packed>,
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
                firsts.push(rows.len());
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
            self.fit(&x, dtype)
        };
        let (k, v) = (gather(k)?, gather(v)?);
        self.append_new(batch, &New { k, v, stride: 1, firsts, counts })
    }

    fn append_new(&mut self, batch: &Batch, new: &New) -> Result<()> {
        self.dtype = Some(new.k.dtype());
        let begun = self.make_room(batch, &new.counts)?;
        let done = if self.fits(batch, &new.counts) {
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
        if !self.fits(batch, &self.counts(batch)) {
            return Ok(None);
        }
        self.check_unseen(batch, k, v)?;
        let new = self.all(batch, k, v)?;
        self.shape.check_q(q)?;
        self.dtype = Some(new.k.dtype());
        let begun = self.make_room(batch, &new.counts)?;
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
    fn dtype_of(&self, k: &Tensor) -> DType {
        match self.dtype {
            Some(dtype) if !self.seqs.is_empty() => dtype,
            _ if k.dtype() == DType::BF16 => DType::BF16,
            _ => DType::F16,
        }
    }

    /// Returns all tokens of a call, for every head.
    fn all(&self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<New> {
        let (dtype, kv_heads) = (self.dtype_of(k), self.shape.kv_heads);
        let of_seq = |(_, tokens): (u64, std::ops::Range<usize>)| {
            (0..kv_heads).map(move |head| tokens.start * kv_heads + head)
        };
        Ok(New {
            k: self.fit(k, dtype)?,
            v: self.fit(v, dtype)?,
            stride: kv_heads,
            firsts: batch.iter().flat_map(of_seq).collect(),
            counts: self.counts(batch),
        })
    }

    fn fill(&mut self, batch: &Batch, new: &New) -> Result<()> {
        let rows = self.ring_rows(batch, new)?;
        self.launch_fill(rows, new.stride, &[], Step::Rings)?;
        self.advance(batch, &new.counts);
        Ok(())
    }

    /// Counts a call's tokens.
    fn advance(&mut self, batch: &Batch, counts: &[usize]) {
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
        let mut goals = self.goals(batch, None);
        goals.retain(|goal| self.seqs.get(&goal.seq).is_some_and(|of| goal.changes(&of.heads)));
        let new_records = self.take(&goals)?;
        let (group, mut rows, mut taken) = (self.layout.group(), Vec::new(), 0);
        for Goal { seq, heads } in &goals {
            self.for_each_head(*seq, |i, head, mut row| {
                set_packing(&mut row, head.packed, heads[i], group, &mut taken);
                row.round = (heads[i].keys > heads[i].values) as i32;
                if row.key_records + row.value_tiles > 0 {
                    rows.push(row);
                }
            });
        }
        self.launch_fill(rows, 0, &new_records, Step::Records)?;
        self.note(goals);
        Ok(())
    }

    /// Appends more tokens than fit in the rings: packs them from the call's tensors, and copies
    /// the newest to the rings.
    fn append_many(&mut self, batch: &Batch, new: &New) -> Result<()> {
        let goals = self.goals(batch, Some(&new.counts));
        let new_records = self.take(&goals)?;
        let (group, ring, mut taken) = (self.layout.group(), self.ring_places(), 0);
        let mut rows = self.ring_rows(batch, new)?;
        let held = batch.seqs().iter().filter_map(|seq| self.seqs.get(seq));
        let held = held.flat_map(|sequence| &sequence.heads);
        let ends = goals.iter().flat_map(|goal| &goal.heads);
        for ((row, head), end) in rows.iter_mut().zip(held).zip(ends.clone()) {
            set_packing(row, head.packed, *end, group, &mut taken);
            row.move_from = row.move_from.max(row.move_to - ring as i32);
        }
        let rows = self.launch_fill(rows, new.stride, &new_records, Step::RecordsThenRings)?;
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
        self.launch_fill(ahead, 0, &[], Step::Records)?;
        self.advance(batch, &new.counts);
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
            Goal { seq: *seq, heads: heads.map(of_head).collect() }
        };
        batch.seqs().iter().enumerate().map(of).collect()
    }

    /// Takes the records that the goals need. Returns their addresses.
    fn take(&mut self, goals: &[Goal]) -> Result<Vec<u64>> {
        let (group, mut new_records) = (self.layout.group(), Vec::new());
        for Goal { seq, heads: goals } in goals {
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

    fn note(&mut self, goals: Vec<Goal>) {
        for Goal { seq, heads: goals } in goals {
            let heads = self.seqs.get_mut(&seq).into_iter().flat_map(|of| &mut of.heads);
            heads.zip(goals).for_each(|(head, goal)| head.packed = goal);
        }
    }

    /// Returns a row per kv head of the batch's sequences, which copies the call's tokens to the
    /// ring. All sequences exist.
    fn ring_rows(&self, batch: &Batch, new: &New) -> Result<Vec<FillRow>> {
        let (k, v, d) = (address(&new.k)?, address(&new.v)?, self.shape.head_dim);
        let mut rows = Vec::with_capacity(new.counts.len());
        for &seq in batch.seqs() {
            self.for_each_head(seq, |_, head, row| {
                let (i, slots) = (rows.len(), head.slots as i32);
                let offset = 2 * (new.firsts[i] * d) as u64;
                rows.push(FillRow {
                    new_k: k + offset,
                    new_v: v + offset,
                    first_new: slots,
                    move_from: slots,
                    move_to: slots + new.counts[i] as i32,
                    ..row
                });
            });
        }
        Ok(rows)
    }

    /// Calls `visit` with each kv head of a sequence, its index, and a row without entries.
    fn for_each_head(&self, seq: SeqId, mut visit: impl FnMut(usize, &Head, FillRow)) {
        let Some(sequence) = self.seqs.get(&seq) else { return };
        let all = sequence.addresses(&self.stream(), self.ring_numbers());
        for (kv_head, head) in sequence.heads.iter().enumerate() {
            let at = all.of_head(kv_head);
            let row = FillRow {
                ring_k: at.ring_k,
                ring_v: at.ring_v,
                table: at.table,
                status: self.status().address(sequence.number),
                tag: Status::tag(sequence.number, kv_head),
                first_new: NONE,
                shift: head.shift as i32,
                first_new_record: NONE,
                ..FillRow::default()
            };
            visit(kv_head, head, row);
        }
    }

    /// Launches a step's kernels for all rows. `stride` is the number of rows of the call's tensors
    /// from a head's token to its next. `new_records` has the addresses of all new records; the rows
    /// contain offsets into it.
    fn launch_fill(
        &self,
        mut rows: Vec<FillRow>,
        stride: usize,
        new_records: &[u64],
        step: Step,
    ) -> Result<Vec<FillRow>> {
        let most = |of: fn(&FillRow) -> i32| rows.iter().map(of).max().unwrap_or(0).max(0) as usize;
        let (records, tiles) = (most(|row| row.key_records), most(|row| row.value_tiles));
        let entries = most(|row| row.move_to - row.move_from);
        let packs = step != Step::Rings && records + tiles > 0;
        let moves = step != Step::Records && entries > 0;
        if !packs && !moves {
            return Ok(rows);
        }
        let stream = self.stream();
        let new_records = upload(&stream, new_records)?;
        rows.iter_mut().for_each(|row| row.new_records += new_records.address());
        let on_device = upload(&stream, &rows)?;
        let args = FillArgs {
            rows: on_device.address(),
            stride: (stride * self.shape.head_dim) as i64,
            ring: self.ring_places() as i32,
            kind: kind(self.dtype.unwrap_or(DType::F16)),
            ..FillArgs::default()
        };
        // SAFETY: the rows' tensors, rings and tables have room for their entries and records, and
        // a stream runs its operations in order.
        unsafe {
            if packs {
                self.kernels.pack(&stream, &args, (rows.len(), records, tiles))?;
            }
            if moves {
                self.kernels.fill_rings(&stream, &args, (rows.len(), entries))?;
            }
        }
        Ok(rows)
    }
}

/// The kernels to launch.
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
fn set_packing(row: &mut FillRow, from: Packed, goal: Packed, group: usize, taken: &mut u64) {
    row.new_records = 8 * *taken;
    row.first_new_record = (from.keys / group) as i32;
    row.key_record = row.first_new_record;
    row.key_records = ((goal.keys - from.keys) / group) as i32;
    row.value_tile = from.tiles as i32;
    row.value_tiles = (goal.tiles - from.tiles) as i32;
    *taken += row.key_records as u64;
    debug_assert!(goal.tiles * TILE <= goal.keys);
}
