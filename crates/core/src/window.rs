//! A cache with a sliding window over any store.

use std::ops::Range;

use crate::store_cache::drop_oldest;
use crate::{
    AttentionState, Batch, CacheStrategy, EntryRanges, Error, KvCache, KvStore, LayerSpec, Mask,
    Result, Selection, SeqId, Step, StoreCache, attention,
};
use candle_core::{DType, Device, Tensor};

/// Returns a function that makes the caches of a model with two kinds of layers: `windowed` for
/// layers with a sliding window, `full` for the others. It returns the errors of the two.
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
/// Attention is exact among the tokens of a call. For earlier tokens it uses the keys and values as
/// stored, for example quantized.
pub type WindowCache<S> = StoreCache<S, WindowStrategy>;

/// The strategy of a [`WindowCache`].
#[derive(Debug, Clone, Copy)]
pub struct WindowStrategy {
    window: usize,
    step: usize,
}

impl<S: KvStore> StoreCache<S, WindowStrategy> {
    /// Creates an empty cache.
    ///
    /// # Errors
    /// [`Error::Setting`] for a layer without a sliding window or a step of 0; errors of
    /// [`with_strategy`](StoreCache::with_strategy).
    pub fn new(spec: LayerSpec, store: S, step: usize) -> Result<Self> {
        let Some(window) = spec.shape.window.filter(|&window| window > 0) else {
            let got = format!("{:?}", spec.shape.window);
            return Err(Error::setting("window of the layer", "at least 1", got));
        };
        if step == 0 {
            return Err(Error::setting("step", "at least 1", step));
        }
        Self::with_strategy(spec, store, WindowStrategy { window, step })
    }
}

/// One call: its layer, its store and its tokens, with rotated queries and keys.
struct Call<'a, S> {
    spec: &'a LayerSpec,
    store: &'a S,
    window: usize,
    step: &'a Step<'a>,
}

impl<S: KvStore> Call<'_, S> {
    /// Attention of the tokens of a call before they are appended to the store.
    fn attend(&self) -> Result<AttentionState> {
        let (step, Step { q, k, .. }) = (self.step, *self.step);
        let past = |seq: SeqId| self.store.len(seq).min(self.window - 1);
        if step.batch.seqs().iter().all(|&seq| past(seq) == 0) {
            return attention::attend(step.batch, q, k, step.v, &self.spec.shape);
        }
        match step.batch.tokens() == step.batch.seqs().len() {
            true => self.attend_one_each(),
            false => self.attend_with_past_tensors(),
        }
    }

    /// One query per sequence: every query sees the same part of the past, which is read in place.
    fn attend_one_each(&self) -> Result<AttentionState> {
        let (step, Step { q, k, .. }) = (self.step, *self.step);
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
    fn attend_with_past_tensors(&self) -> Result<AttentionState> {
        let (step, Step { q, k, .. }) = (self.step, *self.step);
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
}

impl WindowStrategy {
    /// Returns how many of a sequence's tokens of a call are not appended: those of a new sequence
    /// that no later token sees.
    fn skipped<S: KvStore>(&self, store: &S, seq: SeqId, tokens: usize) -> usize {
        match store.len(seq) {
            0 => tokens.saturating_sub(self.window),
            _ => 0,
        }
    }
}

impl<S: KvStore> CacheStrategy<S> for WindowStrategy {
    fn attend(&self, spec: &LayerSpec, store: &mut S, step: &Step<'_>) -> Result<Tensor> {
        let state = Call { spec, store: &*store, window: self.window, step }.attend()?;
        let out = spec.output(state, step.q.dtype())?;
        self.append_prompt(spec, store, step)?;
        Ok(out)
    }

    fn append_prompt(&self, spec: &LayerSpec, store: &mut S, step: &Step<'_>) -> Result<()> {
        let first = |(seq, own): (SeqId, Range<usize>)| self.skipped(store, seq, own.len());
        if step.batch.iter().all(|tokens| first(tokens) == 0) {
            return store.append(step.batch, step.k, step.v);
        }
        let newest = |(seq, own): (SeqId, Range<usize>)| {
            let newest = self.skipped(store, seq, own.len()) as u32..own.len() as u32;
            Selection::uniform(spec.shape.kv_heads, newest.collect())
        };
        let newest: Vec<_> = step.batch.iter().map(newest).collect();
        store.append_selected(step.batch, step.k, step.v, &newest)
    }

    /// Drops entries that have left the window.
    fn evict(&self, _: &LayerSpec, store: &mut S, batch: &Batch) -> Result<()> {
        for &seq in batch.seqs() {
            let left = store.len(seq).saturating_sub(self.window) / self.step * self.step;
            if left > 0 {
                drop_oldest(store, seq, left)?;
            }
        }
        Ok(())
    }

    /// A new sequence with more tokens than the window needs room only for the window.
    fn can_append(&self, store: &S, batch: &Batch) -> bool {
        let appended = |(seq, own): (SeqId, Range<usize>)| {
            (seq, own.len() - self.skipped(store, seq, own.len()))
        };
        let appended: Vec<_> = batch.iter().map(appended).collect();
        Batch::new(&appended).is_ok_and(|batch| store.can_append(&batch))
    }
}
