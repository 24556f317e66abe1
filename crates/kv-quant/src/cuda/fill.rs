//! Entries on their way in: into the rings, and into records.

use super::CudaPool;
use super::args::{FillArgs, FillRow};
use super::head::Packed;
use super::kernels::TILE;
use super::status::Status;
use super::tensors::{address, kind};
use candle_core::{DType, Tensor};
use longctx_core::{AttentionState, Batch, Error, Mask, Result, Selection};
use longctx_cuda::cudarc::driver::DevicePtr;

/// No entry and no record has such a number.
const NONE: i32 = i32::MAX;

/// A call's tensors: `[tokens, kv_heads, head_dim]` in the pool's dtype.
struct New {
    k: Tensor,
    v: Tensor,
}

impl CudaPool {
    /// Appends to every head of the batch's sequences, and packs what the format does not keep in
    /// full precision. After an error nothing has changed, or the batch's sequences are poisoned.
    pub fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        let new = self.begin(batch, k, v)?;
        let begun = self.make_room(batch)?;
        let done = if self.fits(batch) {
            self.fill(batch, &new).and_then(|()| self.pack(batch))
        } else {
            self.append_many(batch, &new)
        };
        let done = done.and_then(|()| match batch.longest() {
            1 => Ok(()),
            _ => self.synchronize(),
        });
        let checked = done.and_then(|()| batch.seqs().iter().try_for_each(|&seq| self.check(seq)));
        if let Err(error) = &checked {
            self.poison(batch, &begun, error);
        }
        checked
    }

    /// Appends to each head the tokens selected for it: as many for every head of a sequence.
    pub fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        self.shape.check_kv(k, v)?;
        let (kv_heads, mut rows, mut parts) = (self.shape.kv_heads, Vec::new(), Vec::new());
        for ((seq, own), selection) in batch.iter().zip(tokens) {
            let lists = selection.heads();
            if lists.iter().any(|list| list.len() != lists[0].len()) {
                let what = "appending unequal numbers of tokens to heads on a CUDA device";
                return Err(Error::Unsupported(what.into()));
            }
            for i in 0..lists[0].len() {
                let row = |(head, list): (usize, &Vec<u32>)| {
                    ((own.start + list[i] as usize) * kv_heads + head) as u32
                };
                rows.extend(lists.iter().enumerate().map(row));
            }
            if !lists[0].is_empty() {
                parts.push((seq, lists[0].len()));
            }
        }
        if parts.is_empty() {
            return Ok(());
        }
        let count = rows.len() / kv_heads;
        let rows = Tensor::new(rows, k.device())?;
        let gather = |x: &Tensor| -> Result<Tensor> {
            let (_, heads, d) = x.dims3()?;
            let x = x.contiguous()?.reshape(((), d))?.index_select(&rows, 0)?;
            Ok(x.reshape((count, heads, d))?)
        };
        self.append(&Batch::new(&parts)?, &gather(k)?, &gather(v)?)
    }

    /// Appends tokens that [fit](Self::fits), attends causally to them, in full precision, and to
    /// what is held, and packs them then. `None`, and nothing is changed, if they do not fit.
    pub fn append_after_attention(
        &mut self,
        batch: &Batch,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Option<AttentionState>> {
        if !self.fits(batch) {
            return Ok(None);
        }
        let new = self.begin(batch, k, v)?;
        self.shape.check_q(q)?;
        let begun = self.make_room(batch)?;
        let done = self.fill(batch, &new).and_then(|()| {
            let state = self.attend(batch, q, Mask::Causal)?;
            self.pack(batch)?;
            Ok(Some(state))
        });
        if let Err(error) = &done {
            self.poison(batch, &begun, error);
        }
        done
    }

    /// Whether the batch's tokens go into the rings beside what is there: then they can be attended
    /// to before they are packed.
    fn fits(&self, batch: &Batch) -> bool {
        let ring = self.ring_places();
        batch.iter().all(|(seq, tokens)| {
            let heads = self.seqs.get(&seq).map_or(&[][..], |sequence| &sequence.heads);
            let residual = heads.iter().map(|head| head.residual()).max().unwrap_or(0);
            residual + tokens.len() <= ring
        })
    }

    /// The call's tensors, checked.
    fn begin(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<New> {
        let tokens = self.shape.check_kv(k, v)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of k", batch.tokens(), tokens));
        }
        batch.seqs().iter().try_for_each(|&seq| self.check(seq))?;
        let dtype = match self.dtype {
            Some(dtype) if !self.seqs.is_empty() => dtype,
            _ if k.dtype() == DType::BF16 => DType::BF16,
            _ => DType::F16,
        };
        let new = New { k: self.fit(k, dtype)?, v: self.fit(v, dtype)? };
        self.dtype = Some(dtype);
        Ok(new)
    }

    fn fill(&mut self, batch: &Batch, new: &New) -> Result<()> {
        let rows = self.rows(batch, Some(new), |_, _| {})?;
        self.launch_fill(rows, &[], Step::Rings)?;
        let ring = self.ring_places();
        for (seq, tokens) in batch.iter() {
            for head in self.seqs.get_mut(&seq).into_iter().flat_map(|of| &mut of.heads) {
                head.len += tokens.len();
                head.ring_from = head.ring_from.max(head.len.saturating_sub(ring));
            }
        }
        Ok(())
    }

    /// Packs from the rings what the format no longer keeps in full precision.
    fn pack(&mut self, batch: &Batch) -> Result<()> {
        let goals = self.goals(batch, false);
        let fresh = self.take(batch, &goals)?;
        let (mut goal, mut taken) = (goals.iter(), 0);
        let (group, mut firsts) = (self.layout.group, Vec::new());
        let rows = self.rows(batch, None, |head, row| {
            let Some(goal) = goal.next() else { return };
            row.pack(head.packed, *goal, group);
            row.round = (goal.keys > goal.values) as i32;
            firsts.push(taken);
            taken += row.key_records as usize;
        })?;
        self.launch_fill(place_fresh(rows, &firsts), &fresh, Step::Records)?;
        self.note(batch, &goals);
        Ok(())
    }

    /// Takes in more tokens than the rings hold: packs them from where they are, keeps the newest.
    fn append_many(&mut self, batch: &Batch, new: &New) -> Result<()> {
        let goals = self.goals(batch, true);
        let fresh = self.take(batch, &goals)?;
        let (group, ring) = (self.layout.group, self.ring_places());
        let (mut goal, mut taken, mut firsts) = (goals.iter(), 0, Vec::new());
        let rows = self.rows(batch, Some(new), |head, row| {
            let Some(goal) = goal.next() else { return };
            row.pack(head.packed, *goal, group);
            row.move_from = row.move_from.max(row.move_to - ring as i32);
            firsts.push(taken);
            taken += row.key_records as usize;
        })?;
        let rows = self.launch_fill(place_fresh(rows, &firsts), &fresh, Step::RecordsThenRings)?;
        // Keys that are packed ahead of their values lie in the ring as their codes have them.
        let mut goal = goals.iter();
        let ahead = rows.into_iter().map(|row| {
            let Some(goal) = goal.next() else { return row };
            let first = (goal.values / group).max(row.key_record as usize);
            let end = if goal.keys > goal.values { goal.keys / group } else { first };
            FillRow {
                first_new: NONE,
                fresh_record: NONE,
                key_record: first as i32,
                key_records: end.saturating_sub(first) as i32,
                value_tiles: 0,
                round: 1,
                ..row
            }
        });
        self.launch_fill(ahead.collect(), &[], Step::Records)?;
        for (seq, tokens) in batch.iter() {
            for head in self.seqs.get_mut(&seq).into_iter().flat_map(|of| &mut of.heads) {
                head.len += tokens.len();
                head.ring_from = head.ring_from.max(head.len.saturating_sub(ring));
            }
        }
        self.note(batch, &goals);
        Ok(())
    }

    /// How far each head is to be packed, without or with the batch's tokens.
    fn goals(&self, batch: &Batch, with: bool) -> Vec<Packed> {
        let format = self.format;
        let of = |(seq, tokens): (u64, std::ops::Range<usize>)| {
            let heads = self.seqs.get(&seq).map_or(&[][..], |sequence| &sequence.heads);
            let more = if with { tokens.len() } else { 0 };
            heads.iter().map(move |head| head.packed_at(format, head.len + more))
        };
        batch.iter().flat_map(of).collect()
    }

    /// Takes records for the goals. Gives their addresses.
    fn take(&mut self, batch: &Batch, goals: &[Packed]) -> Result<Vec<u64>> {
        let (group, mut goals, mut fresh) = (self.layout.group, goals.iter(), Vec::new());
        for seq in batch.seqs() {
            for head in self.seqs.get_mut(seq).into_iter().flat_map(|of| &mut of.heads) {
                let (held, goal) = (head.table.numbers().len(), goals.next());
                let goal = goal.map_or(held, |goal| goal.keys / group);
                head.table.take(goal - held)?;
                fresh.extend(head.table.addresses(held));
            }
        }
        Ok(fresh)
    }

    fn note(&mut self, batch: &Batch, goals: &[Packed]) {
        let mut goals = goals.iter();
        for seq in batch.seqs() {
            for head in self.seqs.get_mut(seq).into_iter().flat_map(|of| &mut of.heads) {
                head.packed = goals.next().copied().unwrap_or(head.packed);
            }
        }
    }

    /// A row for each kv head of the batch's sequences, which moves the call's tokens to the ring.
    fn rows(
        &self,
        batch: &Batch,
        new: Option<&New>,
        mut more: impl FnMut(&super::head::Head, &mut FillRow),
    ) -> Result<Vec<FillRow>> {
        let (stream, d, kv_heads) = (self.stream(), self.shape.head_dim, self.shape.kv_heads);
        let new = match new {
            Some(new) => Some((address(&new.k)?, address(&new.v)?)),
            None => None,
        };
        let mut rows = Vec::with_capacity(batch.seqs().len() * kv_heads);
        for (seq, tokens) in batch.iter() {
            let Some(sequence) = self.seqs.get(&seq) else { continue };
            for (kv_head, head) in sequence.heads.iter().enumerate() {
                let at = sequence.addresses(&stream, kv_head, self.ring_numbers());
                let mut row = FillRow {
                    ring_k: at.ring_k,
                    ring_v: at.ring_v,
                    table: at.table,
                    status: self.status().address(sequence.number),
                    tag: Status::tag(sequence.number, kv_head),
                    first_new: NONE,
                    shift: head.shift as i32,
                    fresh_record: NONE,
                    ..FillRow::default()
                };
                if let Some((k, v)) = new {
                    let offset = 2 * ((tokens.start * kv_heads + kv_head) * d) as u64;
                    (row.new_k, row.new_v) = (k + offset, v + offset);
                    row.first_new = head.len as i32;
                    row.move_from = head.len as i32;
                    row.move_to = (head.len + tokens.len()) as i32;
                }
                more(head, &mut row);
                rows.push(row);
            }
        }
        Ok(rows)
    }

    /// Launches a step's kernels for all rows. `fresh` are the addresses of the records that the
    /// rows take, whose places are in them as offsets.
    fn launch_fill(
        &self,
        mut rows: Vec<FillRow>,
        fresh: &[u64],
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
        let fresh: &[u64] = if fresh.is_empty() { &[0] } else { fresh };
        let fresh = stream.clone_htod(fresh)?;
        let base = fresh.device_ptr(&stream).0;
        rows.iter_mut().for_each(|row| row.fresh += base);
        let on_device = stream.clone_htod(&rows)?;
        let args = FillArgs {
            rows: on_device.device_ptr(&stream).0,
            stride: (self.shape.kv_heads * self.shape.head_dim) as i64,
            ring: self.ring_places() as i32,
            kind: kind(self.dtype.unwrap_or(DType::F16)),
            pieces: (self.shape.head_dim / 8) as i32,
            unused: 0,
        };
        // SAFETY: the rows' tensors, rings and tables have room for the entries and records that
        // they name; calls of one stream follow each other.
        unsafe {
            if packs {
                self.kernels.quantize(&stream, &args, (records, tiles, rows.len()))?;
            }
            if moves {
                self.kernels.fill_rings(&stream, &args, (entries, rows.len()))?;
            }
        }
        Ok(rows)
    }
}

/// Which kernels are launched.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    Rings,
    Records,
    RecordsThenRings,
}

/// Offsets of the rows' first fresh records, in bytes.
fn place_fresh(mut rows: Vec<FillRow>, firsts: &[usize]) -> Vec<FillRow> {
    rows.iter_mut().zip(firsts).for_each(|(row, first)| row.fresh = 8 * *first as u64);
    rows
}

impl FillRow {
    /// Packs from how far it is packed to a goal.
    fn pack(&mut self, from: Packed, goal: Packed, group: usize) {
        self.fresh_record = (from.keys / group) as i32;
        self.key_record = self.fresh_record;
        self.key_records = ((goal.keys - from.keys) / group) as i32;
        self.value_tile = from.tiles as i32;
        self.value_tiles = (goal.tiles - from.tiles) as i32;
        debug_assert!(goal.tiles * TILE <= goal.keys);
    }
}
