//! Keys and values of one layer for many sequences, and attention over them. Caches are built from
//! stores.

use std::ops::Range;

use crate::{
    AttentionShape, AttentionState, AttentionSums, Batch, Error, EvictOne, Footprint, KeptEntries,
    Result, Selection, SeqId, StepLists,
};
use candle_core::{DType, Tensor};

/// Stores keys and values per sequence and kv head, and computes attention over them.
///
/// A store does not know positions or the rotary embedding: keys are stored as given. Entries are
/// numbered per sequence and kv head in the order of appending. [`retain`](KvStore::retain)
/// renumbers the remaining entries, so entry i of two heads may come from different tokens.
/// [`attend_and_evict`](KvStore::attend_and_evict) moves the newest entry.
///
/// Memory is a pool of blocks. A sequence has a block table per kv head; forks share blocks. After
/// an error nothing has changed.
pub trait KvStore: Send {
    /// Returns the shape of the layer.
    fn shape(&self) -> &AttentionShape;

    /// Appends keys `[tokens, kv_heads, head_dim]` and values `[tokens, kv_heads, value_dim]` to
    /// every head of the batch's sequences. A sequence that does not exist yet is created.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the tensors do not fit, or for a number that the store cannot
    /// represent; [`Error::NotFinite`] from stores that quantize; [`Error::PoolFull`].
    fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()>;

    /// Appends to each kv head the tokens selected for it. `tokens` has one selection per sequence
    /// of the batch. Its indices are relative to the sequence's first token of the batch.
    ///
    /// # Errors
    /// As [`append`](KvStore::append), and [`Error::Mismatch`] for a selection that does not fit.
    fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()>;

    /// Computes attention of queries `[tokens, heads, head_dim]` over the entries that `mask`
    /// allows. A query that sees nothing has an output of zero and a log-sum-exp of -inf.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if `q` or `mask` does not fit the stored entries.
    fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState>;

    /// Computes attention as [`attend`](Self::attend), and returns only the output, in `dtype`. The
    /// default implementation converts it. Stores whose kernels write other dtypes override it.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    fn attend_output(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
        dtype: DType,
    ) -> Result<Tensor> {
        Ok(self.attend(batch, q, mask)?.out.to_dtype(dtype)?)
    }

    /// Returns whether [`prepare_decode`](Self::prepare_decode) is possible with the sequences that
    /// the store holds now.
    fn prepares_decode(&self) -> bool {
        false
    }

    /// Allocates memory for one token of each sequence, and adds the lists that the kernels read.
    /// After that, an append and causal attention of the batch [with the prepared
    /// lists](Batch::with_prepared) only launch kernels.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless [`prepares_decode`](Self::prepares_decode);
    /// [`Error::Mismatch`] for several tokens of a sequence; [`Error::PoolFull`]; errors of the
    /// driver.
    fn prepare_decode(&mut self, _: &Batch, _: &mut StepLists) -> Result<()> {
        Err(Error::Unsupported("a prepared decode step of this store".into()))
    }

    /// Returns whether [`attend_and_evict`](Self::attend_and_evict) is possible with these
    /// sequences.
    fn evicts_one(&self, _: &[SeqId]) -> bool {
        false
    }

    /// Computes causal attention of one query per sequence, with the output in `dtype`, and evicts
    /// one entry of each kv head by it. The newest entry takes the place of the evicted one: no
    /// other entry moves, and entries are no longer in the order of appending. Returns the entries
    /// that are left. `evictions`: one for each sequence.
    ///
    /// With [prepared](Self::prepare_evict) lists it only launches kernels, needs no `evictions` and
    /// returns no entries.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless the store [evicts one](Self::evicts_one); [`Error::Mismatch`]
    /// if `q` or an eviction does not fit the stored entries; errors of the driver.
    fn attend_and_evict(
        &mut self,
        _batch: &Batch,
        _q: &Tensor,
        _dtype: DType,
        _evictions: &[EvictOne],
    ) -> Result<(Tensor, Vec<KeptEntries>)> {
        Err(Error::Unsupported("attention and eviction in one call".into()))
    }

    /// Adds an eviction to a step that [`prepare_decode`](Self::prepare_decode) has prepared for the
    /// same sequences, and returns the entries that it will leave. The tensors of `evictions` must
    /// live until the step has been launched.
    ///
    /// # Errors
    /// As [`attend_and_evict`](Self::attend_and_evict), and [`Error::Mismatch`] if the last step was
    /// prepared for other sequences.
    fn prepare_evict(
        &mut self,
        _: &Batch,
        _: &[EvictOne],
        _: &mut StepLists,
    ) -> Result<Vec<KeptEntries>> {
        Err(Error::Unsupported("a prepared eviction of this store".into()))
    }

    /// Returns the attention probability that each entry receives, summed over the queries, for
    /// each sequence of the batch, on the store's device.
    ///
    /// `lse` (`[tokens, heads]`) is the log-sum-exp over *everything* that the queries see, in this
    /// store and elsewhere. The sums of several stores then add up to the number of queries.
    ///
    /// # Errors
    /// As [`attend`](KvStore::attend).
    fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<AttentionSums>>;

    /// Keeps the selected entries of each kv head of a sequence and frees the others.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] for a selection that does not fit.
    fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()>;

    /// Retains the selected entries of several sequences. Returns for each whether there was room:
    /// if forks share blocks, a pool of fixed capacity may have no room for copies of the changed
    /// ones, and the sequence keeps all entries. A sequence that is listed twice retains in turn.
    ///
    /// The default implementation calls [`retain`](KvStore::retain) for each sequence. Stores on a
    /// device override it to launch kernels once.
    ///
    /// # Errors
    /// As [`retain`](KvStore::retain), except [`Error::PoolFull`]. The sequences before the one
    /// that failed may have changed.
    fn retain_each(&mut self, keep: &[(SeqId, Selection)]) -> Result<Vec<bool>> {
        retain_in_turn(self, keep)
    }

    /// Returns the keys `[entries, head_dim]` and values `[entries, value_dim]` of one kv head, in
    /// f32 on the store's device. For policies and tests.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] if there is no such head.
    fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)>;

    /// Returns the keys and values of a range of entries. The default implementation reads the
    /// whole head and narrows the result. Stores that can read a part override it.
    ///
    /// # Errors
    /// As [`read`](Self::read), and [`Error::Mismatch`] for a range past the head's end.
    fn read_range(
        &self,
        seq: SeqId,
        kv_head: usize,
        entries: Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        let (k, v) = self.read(seq, kv_head)?;
        check_range(&entries, k.dim(0)?)?;
        let part = |x: &Tensor| x.narrow(0, entries.start, entries.len());
        Ok((part(&k)?, part(&v)?))
    }

    /// Returns the number of entries of each kv head, `[kv_heads]`; empty for an unknown sequence.
    fn lens(&self, seq: SeqId) -> Vec<usize>;

    /// Makes `to` a copy of `from`. They share blocks until one of them changes them (copy on
    /// write).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`] for `from`; [`Error::Mismatch`] if `to` exists.
    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()>;

    /// Checks whether [`truncate_heads`](Self::truncate_heads) is possible. The error gives the
    /// reason if it is not.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] for a wrong number of lengths, or if a head
    /// holds fewer entries; [`Error::Unsupported`] if the format does not allow it;
    /// [`Error::PoolFull`] if entries have to be unpacked and there is no room.
    fn check_truncate_heads(&self, seq: SeqId, lens: &[usize]) -> Result<()>;

    /// Drops the entries of each kv head after its first `lens[head]`.
    ///
    /// # Errors
    /// As [`check_truncate_heads`](Self::check_truncate_heads), and no others except those of a
    /// device's driver.
    fn truncate_heads(&mut self, seq: SeqId, lens: &[usize]) -> Result<()>;

    /// Checks whether [`truncate`](Self::truncate) is possible.
    ///
    /// # Errors
    /// As [`check_truncate_heads`](Self::check_truncate_heads).
    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate_heads(seq, &vec![len; self.lens(seq).len()])
    }

    /// Drops the entries of every head after the first `len`.
    ///
    /// # Errors
    /// As [`truncate_heads`](Self::truncate_heads).
    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.truncate_heads(seq, &vec![len; self.lens(seq).len()])
    }

    /// Returns a mark of the current contents of a sequence, for [`restore`](Self::restore). The
    /// sequence may be unknown.
    fn mark(&self, seq: SeqId) -> Mark;

    /// Drops the entries that were appended to a sequence since a mark, if this restores exactly
    /// the contents at the mark. A sequence that was unknown at the mark is removed. Between the
    /// two calls only appends may change the sequence.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if older entries have been packed since, so that their full precision
    /// is lost; then nothing changes. Errors of a device's driver.
    fn restore(&mut self, seq: SeqId, mark: &Mark) -> Result<()>;

    /// Removes a sequence and frees its blocks. Returns whether it existed.
    fn remove(&mut self, seq: SeqId) -> bool;

    /// Returns the sequences, in increasing order.
    fn seqs(&self) -> Vec<SeqId>;

    /// Returns whether there is memory to append the batch's tokens to every head.
    fn can_append(&self, batch: &Batch) -> bool;

    /// Returns the bytes held for all sequences, including allocated memory that is not in use.
    fn footprint(&self) -> Footprint;

    /// Returns the bytes held for one sequence. Blocks that it shares with others count in full.
    fn seq_footprint(&self, seq: SeqId) -> Footprint;

    /// Removes all sequences and frees the memory.
    fn clear(&mut self);

    /// Returns the number of entries of the longest kv head of a sequence.
    fn len(&self, seq: SeqId) -> usize {
        self.lens(seq).into_iter().max().unwrap_or(0)
    }
}

/// Forwards every method, also those with a default implementation, which stores override.
#[deny(clippy::missing_trait_methods)]
impl<S: KvStore + ?Sized> KvStore for Box<S> {
    fn shape(&self) -> &AttentionShape {
        (**self).shape()
    }

    fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        (**self).append(batch, k, v)
    }

    fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        (**self).append_selected(batch, k, v, tokens)
    }

    fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        (**self).attend(batch, q, mask)
    }

    fn attend_output(
        &self,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
        dtype: DType,
    ) -> Result<Tensor> {
        (**self).attend_output(batch, q, mask, dtype)
    }

    fn prepares_decode(&self) -> bool {
        (**self).prepares_decode()
    }

    fn prepare_decode(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()> {
        (**self).prepare_decode(batch, lists)
    }

    fn evicts_one(&self, seqs: &[SeqId]) -> bool {
        (**self).evicts_one(seqs)
    }

    fn attend_and_evict(
        &mut self,
        batch: &Batch,
        q: &Tensor,
        dtype: DType,
        evictions: &[EvictOne],
    ) -> Result<(Tensor, Vec<KeptEntries>)> {
        (**self).attend_and_evict(batch, q, dtype, evictions)
    }

    fn prepare_evict(
        &mut self,
        batch: &Batch,
        evictions: &[EvictOne],
        lists: &mut StepLists,
    ) -> Result<Vec<KeptEntries>> {
        (**self).prepare_evict(batch, evictions, lists)
    }

    fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        (**self).attention_sums(batch, q, lse, mask)
    }

    fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        (**self).retain(seq, keep)
    }

    fn retain_each(&mut self, keep: &[(SeqId, Selection)]) -> Result<Vec<bool>> {
        (**self).retain_each(keep)
    }

    fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        (**self).read(seq, kv_head)
    }

    fn read_range(
        &self,
        seq: SeqId,
        kv_head: usize,
        entries: Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        (**self).read_range(seq, kv_head, entries)
    }

    fn lens(&self, seq: SeqId) -> Vec<usize> {
        (**self).lens(seq)
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        (**self).fork(from, to)
    }

    fn check_truncate_heads(&self, seq: SeqId, lens: &[usize]) -> Result<()> {
        (**self).check_truncate_heads(seq, lens)
    }

    fn truncate_heads(&mut self, seq: SeqId, lens: &[usize]) -> Result<()> {
        (**self).truncate_heads(seq, lens)
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        (**self).check_truncate(seq, len)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        (**self).truncate(seq, len)
    }

    fn mark(&self, seq: SeqId) -> Mark {
        (**self).mark(seq)
    }

    fn restore(&mut self, seq: SeqId, mark: &Mark) -> Result<()> {
        (**self).restore(seq, mark)
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        (**self).remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        (**self).seqs()
    }

    fn can_append(&self, batch: &Batch) -> bool {
        (**self).can_append(batch)
    }

    fn footprint(&self) -> Footprint {
        (**self).footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        (**self).seq_footprint(seq)
    }

    fn clear(&mut self) {
        (**self).clear();
    }

    fn len(&self, seq: SeqId) -> usize {
        (**self).len(seq)
    }
}

/// Retains the selected entries of one sequence after the other, as
/// [`retain_each`](KvStore::retain_each).
pub(crate) fn retain_in_turn(
    store: &mut (impl KvStore + ?Sized),
    keep: &[(SeqId, Selection)],
) -> Result<Vec<bool>> {
    keep.iter().map(|(seq, keep)| had_room(store.retain(*seq, keep))).collect()
}

/// Returns false for [`Error::PoolFull`], and passes other errors on.
pub(crate) fn had_room(done: Result<()>) -> Result<bool> {
    match done {
        Ok(()) => Ok(true),
        Err(Error::PoolFull { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The numbers of entries of a sequence at one time, for [`KvStore::restore`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mark {
    /// The number of entries of each kv head; empty for an unknown sequence.
    pub lens: Vec<usize>,
    /// The numbers of packed keys and values of each kv head; empty if the store packs nothing.
    pub packed: Vec<[usize; 2]>,
}

/// Checks the numbers of entries that a truncation leaves against those that the heads hold.
///
/// # Errors
/// [`Error::UnknownSequence`] if `held` is empty; [`Error::Mismatch`] for a wrong number of lengths,
/// or if a head holds fewer entries.
pub fn check_lens(seq: SeqId, lens: &[usize], held: &[usize]) -> Result<()> {
    if held.is_empty() {
        return Err(Error::UnknownSequence(seq));
    }
    if lens.len() != held.len() {
        return Err(Error::mismatch("numbers of entries to keep", held.len(), lens.len()));
    }
    match lens.iter().zip(held).find(|(len, held)| len > held) {
        Some((len, held)) => {
            let what = format!("entries of sequence {seq} to keep");
            Err(Error::mismatch(what, format!("at most {held}"), len))
        }
        None => Ok(()),
    }
}

/// Checks a range of entries against the number of a head's entries.
///
/// # Errors
/// [`Error::Mismatch`] if the range is reversed or ends past the last entry.
pub fn check_range(entries: &Range<usize>, len: usize) -> Result<()> {
    if entries.start > entries.end || entries.end > len {
        let expected = format!("a range within {len}");
        return Err(Error::mismatch("entries to read", expected, format!("{entries:?}")));
    }
    Ok(())
}

/// The entries of its sequence that a query sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mask<'a> {
    /// Every query sees every entry: all entries precede it.
    Full,
    /// The last n entries of a sequence belong to its n queries. Query i sees the entries up to its
    /// own; with the layer's sliding window, only the last `window` of these.
    Causal,
    /// Every query of a sequence sees the ranges listed for it.
    Entries(&'a EntryRanges),
}

impl Mask<'_> {
    /// Returns the range of entries that query `i` of `queries` sees among `len`, for
    /// [`Full`](Mask::Full) and [`Causal`](Mask::Causal). [`Entries`](Mask::Entries) are selected
    /// beforehand; `len` then counts the selected entries.
    pub fn range(
        self,
        i: usize,
        queries: usize,
        len: usize,
        window: Option<usize>,
    ) -> Range<usize> {
        match self {
            Mask::Full | Mask::Entries(_) => 0..len,
            Mask::Causal => {
                let end = (len + i + 1).saturating_sub(queries);
                end.saturating_sub(window.unwrap_or(end))..end
            }
        }
    }
}

/// Ranges of entries to attend to, a list for each sequence of a batch and kv head: `[sequences *
/// kv_heads]`. The ranges of a list are disjoint and increasing.
///
/// Retrieval methods use it to read blocks of the past from any store. Blocks outside of the ranges
/// are not read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EntryRanges {
    heads: Vec<Vec<Range<usize>>>,
}

impl EntryRanges {
    /// Creates the ranges from one list for each sequence and kv head.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming a list whose ranges are empty, overlap or decrease.
    pub fn new(heads: Vec<Vec<Range<usize>>>) -> Result<Self> {
        for (head, ranges) in heads.iter().enumerate() {
            let mut end = 0;
            for range in ranges {
                if range.start < end || range.is_empty() {
                    let what = format!("ranges of list {head}");
                    let expected = format!("a range that begins at {end} or later");
                    return Err(Error::mismatch(what, expected, format!("{range:?}")));
                }
                end = range.end;
            }
        }
        Ok(Self { heads })
    }

    /// Returns the lists.
    pub fn heads(&self) -> &[Vec<Range<usize>>] {
        &self.heads
    }

    /// Checks the lists against the number of entries of each head.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a wrong number of lists, or a range past the end of a head.
    pub fn check(&self, lens: &[usize]) -> Result<()> {
        if self.heads.len() != lens.len() {
            return Err(Error::mismatch("lists of entry ranges", lens.len(), self.heads.len()));
        }
        for (head, (ranges, &len)) in self.heads.iter().zip(lens).enumerate() {
            if let Some(last) = ranges.last().filter(|last| last.end > len) {
                let what = format!("entry ranges of list {head}");
                return Err(Error::mismatch(what, format!("an end of at most {len}"), last.end));
            }
        }
        Ok(())
    }
}
