//! A cache with a sliding window over any store.

use std::collections::BTreeMap;

use crate::cache::check_window_truncate;
use crate::{
    AttentionState, Batch, EntryRanges, Error, Footprint, KvCache, KvStore, LayerSpec, Mask,
    Result, Selection, SeqId, Step, attention, check_unseen,
};
use candle_core::{DType, Device, Tensor};

/// Returns a function that makes the caches of a model with two kinds of layers: `windowed` for
/// layers with a sliding window, `full` for the others.
///
/// ```
/// use candle_core::DType;
/// use longctx_core::{
///     AttentionShape, DenseCache, DenseStore, KvCache, LayerSpec, WindowCache, by_layer_type,
/// };
///
/// let make = by_layer_type(
///     |layer| DenseCache::new(layer.clone(), DType::F32),
///     |layer| WindowCache::new(layer.clone(), DenseStore::new(layer.shape, DType::F16)?, 64),
/// );
/// let shape = AttentionShape::new(8, 2, 64)?;
/// let full = make(&LayerSpec::new(shape))?;
/// let windowed = make(&LayerSpec::new(AttentionShape { window: Some(512), ..shape }))?;
/// assert_eq!((full.spec().shape.window, windowed.spec().shape.window), (None, Some(512)));
/// # Ok::<(), longctx_core::Error>(())
/// ```
pub fn by_layer_type<F: KvCache + 'static, W: KvCache + 'static>(
    full: impl Fn(&LayerSpec) -> Result<F>,
    windowed: impl Fn(&LayerSpec) -> Result<W>,
) -> impl Fn(&LayerSpec) -> Result<Box<dyn KvCache>> {
    move |layer| match layer.shape.window {
        Some(_) => Ok(Box::new(windowed(layer)?)),
        None => Ok(Box::new(full(layer)?)),
    }
}

/// A cache that keeps the tokens within a layer's sliding window, over any dense or packed store.
///
/// Entries that have left the window are dropped `step` at a time. If the step is a packed store's
/// group, whole blocks are freed and nothing is repacked. A sequence holds fewer than `window +
/// step` tokens plus the tokens of its last call.
///
/// Attention is exact among the tokens of a call, and uses the store's numbers for earlier tokens.
#[derive(Debug)]
pub struct WindowCache<S> {
    spec: LayerSpec,
    store: S,
    window: usize,
    step: usize,
    seen: BTreeMap<SeqId, usize>,
}

impl<S: KvStore> WindowCache<S> {
    /// Creates an empty cache.
    ///
    /// # Errors
    /// [`Error::Setting`] for a layer without a sliding window, a step of 0, or a store that is not
    /// empty; [`Error::Mismatch`] for a store of another shape.
    pub fn new(spec: LayerSpec, store: S, step: usize) -> Result<Self> {
        let Some(window) = spec.shape.window.filter(|&window| window > 0) else {
            let got = format!("{:?}", spec.shape.window);
            return Err(Error::setting("window of the layer", "at least 1", got));
        };
        if step == 0 {
            return Err(Error::setting("step", "at least 1", step));
        }
        if store.shape() != &spec.shape {
            let (expected, got) = (format!("{:?}", spec.shape), format!("{:?}", store.shape()));
            return Err(Error::mismatch("the store's shape", expected, got));
        }
        match store.seqs().len() {
            0 => Ok(Self { spec, store, window, step, seen: BTreeMap::new() }),
            n => Err(Error::setting("store", "an empty store", format!("{n} sequences"))),
        }
    }

    /// Returns the store.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Attention of the tokens of a call before they are appended to the store.
    fn attend_with_past(&self, step: &Step<'_>, q: &Tensor, k: &Tensor) -> Result<AttentionState> {
        let past = |seq: SeqId| self.store.len(seq).min(self.window - 1);
        if step.batch.seqs().iter().all(|&seq| past(seq) == 0) {
            return attention::attend(step.batch, q, k, step.v, &self.spec.shape);
        }
        match step.batch.tokens() == step.batch.seqs().len() {
            true => self.attend_one_each(step, q, k),
            false => self.attend_with_past_tensors(step, q, k),
        }
    }

    /// One query per sequence: every query sees the same part of the past, which is read in place.
    fn attend_one_each(&self, step: &Step<'_>, q: &Tensor, k: &Tensor) -> Result<AttentionState> {
        let reach = self.window - 1;
        let lens = step.batch.seqs().iter().map(|&seq| match self.store.lens(seq) {
            lens if lens.is_empty() => vec![0; self.spec.shape.kv_heads],
            lens => lens,
        });
        let lens: Vec<_> = lens.flatten().collect();
        let own = attention::attend(step.batch, q, k, step.v, &self.spec.shape)?;
        let past = match lens.iter().all(|&len| len <= reach) {
            true => self.store.attend(step.batch, q, Mask::Full)?,
            false => {
                let range = |len: usize| match len {
                    0 => Vec::new(),
                    len => std::iter::once(len.saturating_sub(reach)..len).collect(),
                };
                let ranges = EntryRanges::new(lens.into_iter().map(range).collect())?;
                self.store.attend(step.batch, q, Mask::Entries(&ranges))?
            }
        };
        AttentionState::merge(&[own, past])
    }

    /// Several queries of a sequence see different parts of the past. The past is read as tensors
    /// and prepended to the tokens of the call, with zero queries whose output is discarded.
    fn attend_with_past_tensors(
        &self,
        step: &Step<'_>,
        q: &Tensor,
        k: &Tensor,
    ) -> Result<AttentionState> {
        let (mut qs, mut ks, mut vs) = (Vec::new(), Vec::new(), Vec::new());
        let (mut lens, mut rows, mut end) = (Vec::new(), Vec::new(), 0);
        for (seq, own) in step.batch.iter() {
            let (keys, values) = self.newest(seq)?;
            let past = keys.dim(0)?;
            let part = |x: &Tensor| x.narrow(0, own.start, own.len());
            let like = |x: Tensor, own: &Tensor| x.to_device(own.device())?.to_dtype(own.dtype());
            let (_, heads, d) = q.dims3()?;
            qs.extend([Tensor::zeros((past, heads, d), q.dtype(), q.device())?, part(q)?]);
            ks.extend([like(keys, k)?, part(k)?]);
            vs.extend([like(values, step.v)?, part(step.v)?]);
            lens.push((seq, past + own.len()));
            rows.extend((end + past..end + past + own.len()).map(|row| row as u32));
            end += past + own.len();
        }
        let joined = |parts: &[Tensor]| Tensor::cat(parts, 0);
        let (q, k, v) = (joined(&qs)?, joined(&ks)?, joined(&vs)?);
        let state = attention::attend(&Batch::new(&lens)?, &q, &k, &v, &self.spec.shape)?;
        let rows = Tensor::new(rows, state.out.device())?;
        let own = |x: &Tensor| x.contiguous()?.index_select(&rows, 0);
        Ok(AttentionState { out: own(&state.out)?, lse: own(&state.lse)? })
    }

    /// Returns the newest tokens that the next token may see: keys `[tokens, kv_heads, head_dim]`
    /// and values.
    fn newest(&self, seq: SeqId) -> Result<(Tensor, Tensor)> {
        let shape = &self.spec.shape;
        let len = self.store.len(seq);
        let range = len.saturating_sub(self.window - 1)..len;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for head in 0..shape.kv_heads {
            let (k, v) = match range.is_empty() {
                true => {
                    let none = |d| Tensor::zeros((0, d), DType::F32, &Device::Cpu);
                    (none(shape.head_dim)?, none(shape.value_dim)?)
                }
                false => self.store.read_range(seq, head, range.clone())?,
            };
            keys.push(k);
            values.push(v);
        }
        Ok((Tensor::stack(&keys, 1)?, Tensor::stack(&values, 1)?))
    }

    /// Appends the tokens of a call. Of a new sequence, only those that later tokens may see.
    fn append(&mut self, step: &Step<'_>, k: &Tensor) -> Result<()> {
        let skipped = |seq, tokens: usize| match self.seen(seq) {
            0 => tokens.saturating_sub(self.window),
            _ => 0,
        };
        if step.batch.iter().all(|(seq, own)| skipped(seq, own.len()) == 0) {
            return self.store.append(step.batch, k, step.v);
        }
        let kept = |(seq, own): (SeqId, std::ops::Range<usize>)| {
            let newest = skipped(seq, own.len()) as u32..own.len() as u32;
            Selection::uniform(self.spec.shape.kv_heads, newest.collect())
        };
        let kept: Vec<_> = step.batch.iter().map(kept).collect();
        self.store.append_selected(step.batch, k, step.v, &kept)
    }

    /// Counts a call's tokens as seen and drops entries that have left the window.
    fn advance(&mut self, batch: &Batch) -> Result<()> {
        for (seq, tokens) in batch.iter() {
            *self.seen.entry(seq).or_default() += tokens.len();
        }
        for &seq in batch.seqs() {
            let len = self.store.len(seq);
            let gone = len.saturating_sub(self.window) / self.step * self.step;
            if gone == 0 {
                continue;
            }
            let newest = (gone as u32..len as u32).collect();
            let keep = Selection::uniform(self.spec.shape.kv_heads, newest);
            // Dropping may need blocks for copies of shared ones. Without room for them the entries
            // stay until the next call.
            match self.store.retain(seq, &keep) {
                Err(Error::PoolFull { .. }) => {}
                other => other?,
            }
        }
        Ok(())
    }
}

impl<S: KvStore> KvCache for WindowCache<S> {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        let (q, k) = step.rotate(&self.spec, |seq| self.seen(seq))?;
        let state = self.attend_with_past(step, &q, &k)?;
        let out = self.spec.output(state, step.q.dtype())?;
        self.append(step, &k)?;
        self.advance(step.batch)?;
        Ok(out)
    }

    fn append_prompt(&mut self, step: &Step<'_>, _: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        check_unseen(self, step.batch)?;
        let (_, k) = step.rotate(&self.spec, |_| 0)?;
        self.append(step, &k)?;
        self.advance(step.batch)
    }

    fn needs_lse(&self) -> bool {
        false
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.store.fork(from, to)?;
        self.seen.insert(to, self.seen(from));
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let seen = *self.seen.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        let held = self.store.len(seq);
        check_window_truncate(seq, seen, held, Some(self.window), len)?;
        match len < seen {
            true => self.store.check_truncate(seq, len - (seen - held)),
            false => Ok(()),
        }
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let seen = self.seen(seq);
        if len < seen {
            self.store.truncate(seq, len - (seen - self.store.len(seq)))?;
        }
        self.seen.insert(seq, len);
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.store.remove(seq);
        self.seen.remove(&seq).is_some()
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.seen.keys().copied().collect()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.seen.get(&seq).copied().unwrap_or(0)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.store.len(seq)
    }

    /// A new sequence with more tokens than the window needs room only for the window.
    fn can_append(&self, batch: &Batch) -> bool {
        let appended = |(seq, own): (SeqId, std::ops::Range<usize>)| match self.seen(seq) {
            0 => (seq, own.len().min(self.window)),
            _ => (seq, own.len()),
        };
        let appended: Vec<_> = batch.iter().map(appended).collect();
        Batch::new(&appended).is_ok_and(|batch| self.store.can_append(&batch))
    }

    fn footprint(&self) -> Footprint {
        self.store.footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.store.seq_footprint(seq)
    }

    fn clear(&mut self) {
        self.store.clear();
        self.seen.clear();
    }
}
