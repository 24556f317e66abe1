//! Quest: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
//! arXiv 2406.10774.

mod bounds;

use crate::sequences::Sequences;
use crate::storage::{check_store, marks, restore};
use crate::sub_batch::{SubBatch, assemble};
use bounds::{PageBounds, reduce_pages};
use candle_core::{DType, Device, Tensor};
use longctx_core::{
    AttentionState, Batch, EntryRanges, Error, Footprint, KvCache, KvStore, LayerSpec, Mask,
    Result, SeqId, Step, check_unseen,
};

/// A cache that drops nothing: a decoded token reads only the few pages whose keys may match its
/// query best.
///
/// Each page of 16 tokens stores the minimum and maximum of each channel of its keys, which bound
/// the score of any of them. The pages with the highest bounds are read, separately for each kv
/// head; the newest page is always among them. The query heads of a group read the same pages,
/// selected by their largest bound. Calls of several tokens use exact attention, as in the
/// published code.
///
/// Quest saves time, not memory: it holds the store and two keys in f16 for each page and kv head.
/// Keys and values may be in any [`KvStore`], packed ones included; the bounds are computed from
/// the original keys. Pages that do not end at a block boundary of the store are read as parts of
/// blocks.
///
/// [`truncate`](KvCache::truncate) is possible where the store's is. The bounds of a page that is
/// cut are recomputed from the store's keys.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::{AttentionShape, Batch, DenseStore, KvCache, LayerSpec, Step};
/// use token_drop::Quest;
///
/// // An engine that rotates queries and keys itself.
/// let spec = LayerSpec::new(AttentionShape::new(8, 2, 64)?);
/// let store = DenseStore::new(spec.shape, DType::F16)?;
/// let mut cache = Quest::new(spec, store, 64)?;
/// for batch in [Batch::new(&[(0, 400), (1, 30)])?, Batch::decode(&[0, 1])?] {
///     let q = Tensor::randn(0f32, 1., (batch.tokens(), 8, 64), &Device::Cpu)?;
///     let k = Tensor::randn(0f32, 1., (batch.tokens(), 2, 64), &Device::Cpu)?;
///     cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &k })?;
/// }
/// assert_eq!((cache.held(0), cache.held(1)), (401, 31));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Quest<S> {
    spec: LayerSpec,
    store: S,
    /// Pages that a decoded token reads.
    pages_read: usize,
    /// Tokens per page.
    page_size: usize,
    sequences: Sequences<PageBounds>,
}

impl<S: KvStore> Quest<S> {
    /// Creates a cache in which a decoded token reads at most `budget` tokens, in pages of 16.
    ///
    /// # Errors
    /// [`Error::Setting`] if the budget is less than a page or the store is not empty;
    /// [`Error::Mismatch`] if the store was made for another shape; [`Error::Unsupported`] if the
    /// layer has a sliding window.
    pub fn new(spec: LayerSpec, store: S, budget: usize) -> Result<Self> {
        Self::with_page_size(spec, store, budget, 16)
    }

    /// Creates a cache with pages of `page_size` tokens.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if `page_size` is 0.
    pub fn with_page_size(
        spec: LayerSpec,
        store: S,
        budget: usize,
        page_size: usize,
    ) -> Result<Self> {
        if page_size == 0 {
            return Err(Error::setting("page", "at least 1 token", 0));
        }
        if budget < page_size {
            return Err(Error::setting(
                "budget",
                format!("at least a page of {page_size}"),
                budget,
            ));
        }
        check_store(&spec, &store, "Quest")?;
        Ok(Self {
            spec,
            store,
            pages_read: budget / page_size,
            page_size,
            sequences: Sequences::default(),
        })
    }

    /// Returns the store.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Attention of tokens that are already in the store.
    fn attend_all(&self, batch: &Batch, q: &Tensor) -> Result<AttentionState> {
        let prompts = SubBatch::of_sequences(batch, |_, tokens| tokens > 1)?;
        let decoded = SubBatch::of_sequences(batch, |_, tokens| tokens == 1)?;
        let mut parts = Vec::new();
        if let Some(part) = &prompts {
            parts.push((part, self.store.attend(&part.batch, &part.rows(q)?, Mask::Causal)?));
        }
        if let Some(part) = &decoded {
            let q = part.rows(q)?;
            let ranges = self.select_ranges(&part.batch, &q)?;
            parts.push((part, self.store.attend(&part.batch, &q, Mask::Entries(&ranges))?));
        }
        assemble(&parts, batch.tokens())
    }

    /// Selects the entries that decoded tokens read.
    fn select_ranges(&self, batch: &Batch, q: &Tensor) -> Result<EntryRanges> {
        let shape = &self.spec.shape;
        let of_group = shape.heads_per_kv() * shape.head_dim;
        let q = q.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        let mut ranges = Vec::new();
        for (i, queries) in q.chunks_exact(of_group).enumerate() {
            let seq = batch.seqs()[i / shape.kv_heads];
            let len = self.sequences.seen(seq) + 1;
            let pages = match self.sequences.get(seq) {
                Some(sequence) => {
                    sequence.state.select_pages(i % shape.kv_heads, queries, len, self.pages_read)
                }
                None => vec![0],
            };
            // Adjacent pages are read as one range.
            let run = |run: &[usize]| {
                let end = (run[run.len() - 1] + 1) * self.page_size;
                run[0] * self.page_size..end.min(len)
            };
            ranges.push(pages.chunk_by(|a, b| a + 1 == *b).map(run).collect());
        }
        EntryRanges::new(ranges)
    }

    /// Adds a call's keys, `[tokens, kv_heads, head_dim]`, to the bounds. Copies once from the
    /// device.
    fn update_bounds(&mut self, batch: &Batch, keys: &Tensor) -> Result<()> {
        let keys = keys.flatten_from(1)?.to_dtype(DType::F32)?;
        let (mut rows, mut pages) = (Vec::new(), Vec::new());
        for (seq, own) in batch.iter() {
            let keys = keys.narrow(0, own.start, own.len())?;
            let (of_seq, pages_of_seq) = reduce_pages(&keys, self.seen(seq), self.page_size)?;
            rows.push(of_seq);
            pages.push(pages_of_seq);
        }
        let rows = Tensor::cat(&rows, 0)?.to_vec2::<f32>()?;
        let mut rows = rows.iter();
        let (page_size, shape) = (self.page_size, self.spec.shape);
        for ((seq, own), pages) in batch.iter().zip(pages) {
            let new = || PageBounds::new(shape.kv_heads, page_size, shape.head_dim);
            let sequence = self.sequences.begin(seq, new);
            pages.into_iter().zip(&mut rows).for_each(|(page, row)| sequence.state.add(page, row));
            self.sequences.advance(seq, own.len());
        }
        Ok(())
    }

    /// Appends a call's tokens and, if `attends`, computes their attention.
    fn append_and_attend(&mut self, step: &Step<'_>, attends: bool) -> Result<Option<Tensor>> {
        let (q, k) = step.rotate(&self.spec, |seq| self.sequences.seen(seq))?;
        self.store.append(step.batch, &k, step.v)?;
        let out = match attends {
            true => {
                let state = self.attend_all(step.batch, &q)?;
                Some(self.spec.output(state, step.q.dtype())?)
            }
            false => None,
        };
        self.update_bounds(step.batch, &k)
            .map_err(|error| self.sequences.poison(step.batch.seqs(), error))?;
        Ok(out)
    }

    /// Processes a call, or restores the state before it on an error.
    fn step_or_roll_back(&mut self, step: &Step<'_>, attends: bool) -> Result<Option<Tensor>> {
        let marks = marks(&self.store, step.batch);
        self.append_and_attend(step, attends).map_err(|error| {
            let lost = restore(&mut self.store, step.batch, &marks);
            self.sequences.poison(&lost, error)
        })
    }
}

impl<S: KvStore> KvCache for Quest<S> {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        self.sequences.check(step.batch)?;
        let nothing = || Error::mismatch("output", "a tensor", "none");
        self.step_or_roll_back(step, true)?.ok_or_else(nothing)
    }

    fn append_prompt(&mut self, step: &Step<'_>, _: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        self.sequences.check(step.batch)?;
        check_unseen(self, step.batch)?;
        self.step_or_roll_back(step, false).map(drop)
    }

    fn needs_lse(&self) -> bool {
        false
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.sequences.check_fork(from, to)?;
        self.store.fork(from, to)?;
        self.sequences.fork(from, to);
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        self.sequences.check_truncate(seq, len)?;
        self.store.check_truncate(seq, len)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        self.store.truncate(seq, len)?;
        let Some(sequence) = self.sequences.get_mut(seq) else {
            return Err(Error::UnknownSequence(seq));
        };
        if len == sequence.seen {
            return Ok(());
        }
        sequence.truncate(len);
        let first = sequence.state.truncate(len);
        for head in 0..self.spec.shape.kv_heads {
            let (keys, _) = self.store.read_range(seq, head, first..len)?;
            for (token, key) in (first..).zip(keys.to_vec2::<f32>()?) {
                sequence.state.add_to_head(head, token / self.page_size, &key);
            }
        }
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.store.remove(seq);
        self.sequences.remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.sequences.ids()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.sequences.seen(seq)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.sequences.seen(seq)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        self.store.can_append(batch)
    }

    fn footprint(&self) -> Footprint {
        let bounds = self.sequences.iter().map(|(_, sequence)| sequence.state.footprint());
        self.store.footprint() + bounds.sum()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        let bounds = self.sequences.get(seq).map(|sequence| sequence.state.footprint());
        self.store.seq_footprint(seq) + bounds.unwrap_or_default()
    }

    fn clear(&mut self) {
        self.store.clear();
        self.sequences.clear();
    }
}
