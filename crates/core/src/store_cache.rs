//! A cache over one store. Exact, windowed and latent caches share this code.

use crate::store::had_room;
use crate::{
    Batch, Error, Footprint, KvCache, KvStore, LayerSpec, Mask, PreparedDecode, Result, SeenTokens,
    Selection, SeqId, Step, StepLists, check_unseen,
};
use candle_core::Tensor;

/// How a [`StoreCache`] attends, and which entries it keeps.
///
/// The queries and keys of a [`Step`] are already rotated. The step fits the layer. A strategy has
/// no state, so it is not notified of forks, truncations and removals.
pub trait CacheStrategy<S: KvStore>: Send {
    /// Appends the tokens of a call and returns their attention output in the dtype of `q`
    /// ([`LayerSpec::output`]).
    ///
    /// # Errors
    /// Those of the store. The cache removes what was appended before the error.
    fn attend(&self, spec: &LayerSpec, store: &mut S, step: &Step<'_>) -> Result<Tensor>;

    /// Appends the tokens of new sequences without attention. The default implementation appends
    /// all of them to the store.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    fn append_prompt(&self, _: &LayerSpec, store: &mut S, step: &Step<'_>) -> Result<()> {
        store.append(step.batch, step.k, step.v)
    }

    /// Drops entries after the tokens of a batch were appended. In a layer with a sliding window it
    /// drops the oldest ones only.
    ///
    /// # Errors
    /// Those of the store. [`Error::PoolFull`] postpones the eviction: dropping entries of blocks
    /// that forks share needs room for copies. The cache then keeps the entries until a later call,
    /// and this call succeeds. After any other error the call fails, but its tokens stay in the
    /// cache.
    fn evict(&self, spec: &LayerSpec, store: &mut S, batch: &Batch) -> Result<()>;

    /// Returns whether the store has room for a batch. The default implementation asks the store,
    /// as for a strategy that appends every token.
    fn can_append(&self, store: &S, batch: &Batch) -> bool {
        store.can_append(batch)
    }

    /// Returns whether [`prepare_decode`](Self::prepare_decode) is possible with the store as it is.
    fn prepares_decode(&self, _: &LayerSpec, _: &S) -> bool {
        false
    }

    /// The store's part of [`PreparedDecode::prepare_decode`]. In the prepared step
    /// [`attend`](Self::attend) only launches kernels, and [`evict`](Self::evict) is not called.
    ///
    /// # Errors
    /// [`Error::Unsupported`] unless [`prepares_decode`](Self::prepares_decode); errors of the store.
    fn prepare_decode(&self, _: &LayerSpec, _: &mut S, _: &Batch, _: &mut StepLists) -> Result<()> {
        Err(Error::Unsupported("a prepared decode step".into()))
    }
}

/// A cache over one store. It counts the tokens of each sequence; a [`CacheStrategy`] does the
/// rest.
///
/// ```
/// use candle_core::{DType, Tensor};
/// use longctx_core::*;
///
/// /// Attends to everything, then keeps the first 4 and the newest 60 entries.
/// struct Sinks;
///
/// impl CacheStrategy<DenseStore> for Sinks {
///     fn attend(&self, spec: &LayerSpec, store: &mut DenseStore, step: &Step) -> Result<Tensor> {
///         store.append(step.batch, step.k, step.v)?;
///         let state = store.attend(step.batch, step.q, Mask::Causal)?;
///         spec.output(state, step.q.dtype())
///     }
///
///     fn evict(&self, spec: &LayerSpec, store: &mut DenseStore, batch: &Batch) -> Result<()> {
///         for &seq in batch.seqs() {
///             let len = store.len(seq) as u32;
///             if len > 64 {
///                 let keep = (0..4).chain(len - 60..len).collect();
///                 store.retain(seq, &Selection::uniform(spec.shape.kv_heads, keep))?;
///             }
///         }
///         Ok(())
///     }
/// }
///
/// let spec = LayerSpec::new(AttentionShape::new(4, 2, 32)?);
/// let store = DenseStore::new(spec.shape, DType::F16)?;
/// let mut cache = StoreCache::with_strategy(spec, store, Sinks)?;
/// let x = |heads| Tensor::randn(0f32, 1., (100, heads, 32), &candle_core::Device::Cpu);
/// let batch = Batch::single(0, 100)?;
/// cache.attend(&Step { batch: &batch, q: &x(4)?, k: &x(2)?, v: &x(2)? })?;
/// assert_eq!((cache.seen(0), cache.held(0)), (100, 64));
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StoreCache<S, C> {
    spec: LayerSpec,
    store: S,
    strategy: C,
    seen: SeenTokens,
    /// Offset of the positions in the lists of the last prepared step.
    positions: u64,
}

impl<S: KvStore, C: CacheStrategy<S>> StoreCache<S, C> {
    /// Creates a cache over an empty store.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a store of another shape; [`Error::Setting`] for one that holds
    /// sequences.
    pub fn with_strategy(spec: LayerSpec, store: S, strategy: C) -> Result<Self> {
        if store.shape() != &spec.shape {
            let (expected, got) = (format!("{:?}", spec.shape), format!("{:?}", store.shape()));
            return Err(Error::mismatch("the store's shape", expected, got));
        }
        match store.seqs().len() {
            0 => Ok(Self { spec, store, strategy, seen: SeenTokens::default(), positions: 0 }),
            n => Err(Error::setting("store", "an empty store", format!("{n} sequences"))),
        }
    }

    /// Returns the store.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Removes the tokens of a failed call from the store. Tokens that cannot be removed count as
    /// seen: a caller that truncates the sequence then gets the store's error.
    fn roll_back(&mut self, batch: &Batch, lens: &[usize]) {
        for ((seq, tokens), &len) in batch.iter().zip(lens) {
            if self.store.len(seq) == len {
                continue;
            }
            match self.seen.get(seq) {
                None => drop(self.store.remove(seq)),
                Some(seen) if self.store.truncate(seq, len).is_err() => {
                    self.seen.set(seq, seen + tokens.len());
                }
                Some(_) => {}
            }
        }
    }

    /// Launches the attention of a prepared step.
    #[cfg(feature = "cuda")]
    #[allow(unsafe_code)]
    fn attend_prepared(&mut self, step: &Step<'_>, lists: u64) -> Result<Tensor> {
        // SAFETY: the lists are those that `prepare_decode` has made for this batch, as the caller of
        // `Batch::with_prepared` guarantees. They have a position for each token at this offset.
        let (q, k) = unsafe { step.rotate_at(&self.spec, lists + self.positions) }?;
        self.strategy.attend(&self.spec, &mut self.store, &Step { q: &q, k: &k, ..*step })
    }

    /// Counts the tokens of a batch as seen, and drops entries if there is room for the copies of
    /// shared blocks.
    fn advance(&mut self, batch: &Batch) -> Result<()> {
        self.seen.advance(batch);
        had_room(self.strategy.evict(&self.spec, &mut self.store, batch)).map(drop)
    }

    /// Returns the number of entries of each sequence of a batch.
    fn lens(&self, batch: &Batch) -> Vec<usize> {
        batch.seqs().iter().map(|&seq| self.store.len(seq)).collect()
    }
}

impl<S: KvStore, C: CacheStrategy<S>> KvCache for StoreCache<S, C> {
    fn spec(&self) -> &LayerSpec {
        &self.spec
    }

    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        step.check(&self.spec)?;
        #[cfg(feature = "cuda")]
        if let Some(prepared) = step.batch.prepared() {
            return self.attend_prepared(step, prepared.lists);
        }
        let (q, k) = step.rotate(&self.spec, |seq| self.seen(seq))?;
        let rotated = Step { q: &q, k: &k, ..*step };
        let lens = self.lens(step.batch);
        match self.strategy.attend(&self.spec, &mut self.store, &rotated) {
            Ok(out) => self.advance(step.batch).map(|()| out),
            Err(error) => {
                self.roll_back(step.batch, &lens);
                Err(error)
            }
        }
    }

    fn append_prompt(&mut self, step: &Step<'_>, _: Option<&Tensor>) -> Result<()> {
        step.check(&self.spec)?;
        check_unseen(self, step.batch)?;
        let (_, k) = step.rotate(&self.spec, |_| 0)?;
        let rotated = Step { k: &k, ..*step };
        let lens = self.lens(step.batch);
        match self.strategy.append_prompt(&self.spec, &mut self.store, &rotated) {
            Ok(()) => self.advance(step.batch),
            Err(error) => {
                self.roll_back(step.batch, &lens);
                Err(error)
            }
        }
    }

    fn prepared_decode(&mut self, batch: &Batch) -> Option<&mut dyn PreparedDecode> {
        let prepares = batch.check_decode().is_ok()
            && self.spec.rotates_on_cuda()
            && self.strategy.prepares_decode(&self.spec, &self.store);
        prepares.then_some(self)
    }

    fn needs_lse(&self) -> bool {
        false
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        let seen = self.seen.check_fork(from, to)?;
        self.store.fork(from, to)?;
        self.seen.set(to, seen);
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let seen = self.seen.check_truncate(seq, len)?;
        if len == seen {
            return Ok(());
        }
        // The remaining entries must fill the window of the next token. Without a window, all
        // entries must remain.
        let dropped = seen - self.store.len(seq);
        let reach = self.spec.shape.window.map_or(len, |window| window.saturating_sub(1));
        if dropped > len.saturating_sub(reach) {
            let what = format!("truncating sequence {seq} to {len} tokens: {dropped} were dropped");
            return Err(Error::Unsupported(what));
        }
        self.store.check_truncate(seq, len - dropped)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let seen = self.seen(seq);
        if len < seen {
            self.store.truncate(seq, len - (seen - self.store.len(seq)))?;
            self.seen.set(seq, len);
        }
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.store.remove(seq);
        self.seen.remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.seen.seqs()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.seen.get(seq).unwrap_or(0)
    }

    fn held(&self, seq: SeqId) -> usize {
        self.store.len(seq)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        self.strategy.can_append(&self.store, batch)
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

impl<S: KvStore, C: CacheStrategy<S>> PreparedDecode for StoreCache<S, C> {
    fn prepare_decode(&mut self, batch: &Batch, lists: &mut StepLists) -> Result<()> {
        self.strategy.prepare_decode(&self.spec, &mut self.store, batch, lists)?;
        self.positions = lists.push_positions(batch, |seq| self.seen(seq));
        self.seen.advance(batch);
        Ok(())
    }
}

/// Appends the tokens of a call, and returns their attention output over all entries in the dtype of
/// `q`. The queries and keys are rotated.
///
/// # Errors
/// Those of the store. The tokens may have been appended then.
pub fn append_and_attend<S: KvStore>(
    spec: &LayerSpec,
    store: &mut S,
    step: &Step<'_>,
) -> Result<Tensor> {
    store.append(step.batch, step.k, step.v)?;
    let dtype = step.q.dtype();
    match spec.sink_logits {
        None => store.attend_output(step.batch, step.q, Mask::Causal, dtype),
        Some(_) => spec.output(store.attend(step.batch, step.q, Mask::Causal)?, dtype),
    }
}

/// Drops the first `count` entries of every head.
///
/// Dropping may need blocks for copies of shared ones. Without room for them the entries stay until
/// the next call.
pub(crate) fn drop_oldest<S: KvStore>(store: &mut S, seq: SeqId, count: usize) -> Result<()> {
    let newest = (count as u32..store.len(seq) as u32).collect();
    let keep = Selection::uniform(store.shape().kv_heads, newest);
    had_room(store.retain(seq, &keep)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionShape, DenseStore};
    use candle_core::{DType, Device};

    /// Attends to everything and keeps the newest `newest` entries. Fails after appending while
    /// `broken`.
    struct Newest {
        newest: usize,
        broken: bool,
    }

    impl CacheStrategy<DenseStore> for Newest {
        fn attend(
            &self,
            spec: &LayerSpec,
            store: &mut DenseStore,
            step: &Step<'_>,
        ) -> Result<Tensor> {
            self.append_prompt(spec, store, step)?;
            spec.output(store.attend(step.batch, step.q, Mask::Causal)?, step.q.dtype())
        }

        fn append_prompt(
            &self,
            _: &LayerSpec,
            store: &mut DenseStore,
            step: &Step<'_>,
        ) -> Result<()> {
            store.append(step.batch, step.k, step.v)?;
            match self.broken {
                true => Err(Error::Unsupported("attention".into())),
                false => Ok(()),
            }
        }

        fn evict(&self, spec: &LayerSpec, store: &mut DenseStore, batch: &Batch) -> Result<()> {
            for &seq in batch.seqs() {
                let len = store.len(seq);
                let newest = (len.saturating_sub(self.newest) as u32..len as u32).collect();
                store.retain(seq, &Selection::uniform(spec.shape.kv_heads, newest))?;
            }
            Ok(())
        }
    }

    fn cache(newest: usize, bytes: usize) -> StoreCache<DenseStore, Newest> {
        let spec = LayerSpec::new(AttentionShape::new(4, 2, 32).unwrap());
        let store = DenseStore::with_capacity(spec.shape, DType::F32, bytes).unwrap();
        StoreCache::with_strategy(spec, store, Newest { newest, broken: false }).unwrap()
    }

    /// Queries, keys and values of a batch.
    fn random(batch: &Batch) -> [Tensor; 3] {
        [4, 2, 2].map(|heads| {
            Tensor::randn(0f32, 1., (batch.tokens(), heads, 32), &Device::Cpu).unwrap()
        })
    }

    fn numbers(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_failed_call_changes_nothing() {
        let (mut cache, mut whole) = (cache(100, usize::MAX), cache(100, usize::MAX));
        // The second call has a new sequence, too.
        for (i, parts) in [&[(0, 9)][..], &[(0, 3), (1, 5)]].into_iter().enumerate() {
            let batch = Batch::new(parts).unwrap();
            let [q, k, v] = random(&batch);
            let step = Step { batch: &batch, q: &q, k: &k, v: &v };
            cache.strategy.broken = true;
            let before = (cache.seen(0), cache.store.len(0));
            assert!(cache.attend(&step).is_err());
            assert!(cache.append_prompt(&step, None).is_err());
            assert_eq!((cache.seen(0), cache.store.len(0)), before, "call {i}");
            assert_eq!((cache.seen(1), cache.store.len(1)), (0, 0), "call {i}");
            cache.strategy.broken = false;
            let (got, want) = (cache.attend(&step).unwrap(), whole.attend(&step).unwrap());
            assert_eq!(numbers(&got), numbers(&want), "call {i}");
        }
    }

    #[test]
    fn an_eviction_without_room_is_postponed() {
        // Blocks of 32 entries of one head in f32. Two heads of 64 entries have 4 blocks; the next
        // entry takes 2 more, and copies of the 4 shared ones do not fit.
        const BLOCK: usize = 32 * (32 + 32) * 4;
        let mut cache = cache(64, 7 * BLOCK);
        let attend = |cache: &mut StoreCache<_, _>, tokens| {
            let batch = Batch::single(0, tokens).unwrap();
            let [q, k, v] = random(&batch);
            cache.attend(&Step { batch: &batch, q: &q, k: &k, v: &v }).unwrap();
            (cache.seen(0), cache.held(0))
        };
        assert_eq!(attend(&mut cache, 64), (64, 64));
        cache.fork(0, 1).unwrap();
        assert_eq!(attend(&mut cache, 1), (65, 65));
        cache.remove(1);
        assert_eq!(attend(&mut cache, 1), (66, 64));
    }
}
