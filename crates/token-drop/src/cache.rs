//! The frame: one layer's cache that lets a policy say what stays in its store.

mod judge;

use crate::{Budget, check::check_step, ledger::Ledger};
use candle_core::Tensor;
use longctx_core::{
    Error, EvictionPolicy, Footprint, KvCache, KvStore, Mass, Partial, Protected, Result,
    Selection, Step, Visible, attention,
};

/// Which calls of several tokens are followed by compression.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Prefill {
    /// Each: a prompt in chunks never holds more than the budget and one chunk, and a chunk sees what earlier compression left.
    #[default]
    EveryCall,
    /// The first alone, as kvpress does it; what comes later stays, unless the cache evicts while decoding.
    FirstCall,
}

/// A cache that keeps, in any store, what a policy selects within a budget.
///
/// Attention among the tokens of one call is exact: tokens are evicted after it, and their memory given back. A decoded token joins
/// the store before it attends. Keys keep the rotation of their true positions unless the policy
/// [rerotates](EvictionPolicy::rerotates).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::{AttentionShape, DenseStore, KvCache, Rope, RopeScaling, Step};
/// use token_drop::{Budget, PolicyCache, SnapKv};
///
/// let shape = AttentionShape::new(8, 2, 64)?;
/// let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None)?;
/// let store = DenseStore::new(shape, DType::F16)?;
/// let mut cache = PolicyCache::new(store, SnapKv::new(32)?, Budget::Ratio(0.25))?;
/// let q = Tensor::randn(0f32, 1., (1, 8, 400, 64), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1., (1, 2, 400, 64), &Device::Cpu)?;
/// cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape, rope: &rope })?;
/// assert_eq!((cache.seen(), cache.held()), (400, 100));
/// assert!(cache.positions()[0].ends_with(&[397, 398, 399]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct PolicyCache<S, P> {
    store: S,
    policy: P,
    budget: Budget,
    extra: Protected,
    prefill: Prefill,
    decode_step: Option<usize>,
    /// The budget in tokens, not rounded, as the last call of several tokens settled it.
    allowed: f64,
    ledger: Ledger,
    /// The newest queries before the rotary embedding, if the policy needs several of them while decoding.
    queries: Option<Tensor>,
    seen: usize,
}

/// One call's rotated tensors; `kv` unless the store has them already.
struct Call<'a> {
    step: &'a Step<'a>,
    q: &'a Tensor,
    kv: Option<(&'a Tensor, &'a Tensor)>,
    lse: &'a Tensor,
}

impl<S: KvStore, P: EvictionPolicy> PolicyCache<S, P> {
    /// An empty cache over `store`.
    ///
    /// # Errors
    /// [`Error::Setting`] if the budget is no token, a ratio outside (0, 1), or smaller than what the policy protects, if it is
    /// [`Budget::Policy`] for a policy that does not bound its heads itself or another for one that does, or if the store holds something; [`Error::Unsupported`] if the layer has a sliding window.
    pub fn new(store: S, policy: P, budget: Budget) -> Result<Self> {
        if store.shape().window.is_some() {
            let what = "an eviction policy in a layer that has a sliding window of its own";
            return Err(Error::Unsupported(what.into()));
        }
        if !store.is_empty() {
            return Err(Error::setting("store", "an empty store", store.len()));
        }
        let decode_step = policy.decode_step();
        Self {
            store,
            policy,
            budget,
            extra: Protected::default(),
            prefill: Prefill::default(),
            decode_step,
            allowed: 0.0,
            ledger: Ledger::default(),
            queries: None,
            seen: 0,
        }
        .checked()
    }

    /// Keeps the first `sinks` and the newest `recent` tokens beside what the policy protects.
    ///
    /// # Errors
    /// [`Error::Setting`] if they are more than the budget.
    pub fn with_protected(mut self, extra: Protected) -> Result<Self> {
        self.extra = extra;
        self.checked()
    }

    /// Which calls of several tokens are compressed; by default each.
    #[must_use]
    pub fn with_prefill(mut self, prefill: Prefill) -> Self {
        self.prefill = prefill;
        self
    }

    /// Gives up `step` tokens at a time while decoding, so that from `budget - step + 1` to `budget` are held; `None` keeps all decoded
    /// tokens. The policy has a [default](EvictionPolicy::decode_step).
    ///
    /// # Errors
    /// [`Error::Setting`] if the step is 0.
    pub fn with_decode_step(mut self, step: Option<usize>) -> Result<Self> {
        self.decode_step = step;
        self.checked()
    }

    fn checked(self) -> Result<Self> {
        let bounds_heads = self.policy.bounds_heads();
        self.budget.check(bounds_heads, |budget| self.protected(budget).total())?;
        if self.decode_step == Some(0) {
            return Err(Error::setting("decode step", "at least 1 token", 0));
        }
        if let Some(Mass::Newest { queries, .. }) = self.policy.needs().mass
            && queries > 1
            && self.policy.protects(usize::MAX).recent < queries
        {
            let expected = format!("at least the {queries} tokens whose queries are observed");
            let got = self.policy.protects(usize::MAX).recent;
            return Err(Error::setting("protected recent tokens", expected, got));
        }
        Ok(self)
    }

    /// The store.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// The policy.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// The positions in the text of each kv head's entries, `[batch * kv_heads]` lists.
    pub fn positions(&self) -> &[Vec<u32>] {
        self.ledger.positions()
    }

    fn protected(&self, budget: usize) -> Protected {
        self.policy.protects(budget).union(self.extra)
    }

    /// Each head's budget, and what is protected within it.
    fn budgets(&self) -> (Vec<usize>, Protected) {
        let heads = self.ledger.heads();
        let protected = self.protected(self.allowed as usize);
        let mut budgets = self.policy.budgets(self.allowed, self.seen, heads);
        budgets.iter_mut().for_each(|b| *b = (*b).max(protected.total()));
        (budgets, protected)
    }

    /// Where the next token goes: a rerotating cache has no gaps.
    fn next_position(&self) -> usize {
        if self.policy.rerotates() { self.held() } else { self.seen }
    }

    /// Checks a call before anything changes; gives its tokens.
    fn check(&self, step: &Step<'_>) -> Result<usize> {
        let batch = self.ledger.heads() / self.store.shape().kv_heads;
        let (_, tokens) = check_step(step, self.store.shape(), (batch > 0).then_some(batch))?;
        Ok(tokens)
    }

    /// Exact attention among several tokens, and over what was kept.
    fn attend_many(&self, step: &Step<'_>, q: &Tensor, k: &Tensor) -> Result<Partial> {
        let mut parts = vec![attention::attend(q, k, step.v, step.shape, Visible::Causal)?];
        if !self.store.is_empty() {
            parts.push(self.store.attend(q, Visible::All)?);
        }
        Partial::merge(&parts)
    }

    /// Takes in several tokens that have attended, and compresses.
    fn take_many(
        &mut self,
        step: &Step<'_>,
        q: &Tensor,
        k: &Tensor,
        whole: &Partial,
    ) -> Result<()> {
        let (batch, tokens) = step.shape.check_q(step.q)?;
        let first = self.seen == 0;
        self.seen += tokens;
        self.allowed = self.budget.of(self.seen);
        self.ledger.add(batch * step.shape.kv_heads, self.seen - tokens..self.seen);
        self.remember_queries(step.q)?;
        let call = Call { step, q, kv: Some((k, step.v)), lse: &whole.lse };
        let (budgets, protected) = self.budgets();
        let compress = (first || self.prefill == Prefill::EveryCall)
            && self.policy.is_over(&self.ledger.lens(), &budgets);
        let keep = self.judge(&call, compress.then_some(&budgets), protected)?;
        match keep {
            Some(keep) => self.keep_with_new(step, k, &keep),
            None => self.store.append(k, step.v),
        }
    }

    /// One token: it joins the store, attends, and perhaps has others evicted.
    fn take_one(&mut self, step: &Step<'_>, q: &Tensor, k: &Tensor) -> Result<Partial> {
        self.store.append(k, step.v)?;
        let whole = self.store.attend(q, Visible::Causal)?;
        self.seen += 1;
        self.ledger.add(self.store.lens().len(), self.seen - 1..self.seen);
        self.remember_queries(step.q)?;
        let call = Call { step, q, kv: None, lse: &whole.lse };
        let (mut budgets, protected) = self.budgets();
        let over = self.policy.is_over(&self.ledger.lens(), &budgets);
        let evict = self.decode_step.filter(|_| over);
        let (step_size, least) = (evict.unwrap_or(1), protected.total().max(1));
        budgets.iter_mut().for_each(|b| *b = b.saturating_sub(step_size - 1).max(least));
        if let Some(keep) = self.judge(&call, evict.map(|_| &budgets), protected)? {
            self.store.retain(&keep)?;
            self.ledger.retain(&keep);
            self.close_gaps(step, &keep)?;
        }
        Ok(whole)
    }

    /// Keeps what is selected among the store's entries and the call's tokens, which come after them.
    fn keep_with_new(&mut self, step: &Step<'_>, k: &Tensor, keep: &Selection) -> Result<()> {
        let mut lens = self.store.lens();
        lens.resize(keep.heads().len(), 0);
        let split = |(list, len): (&Vec<u32>, &usize)| {
            let (old, new) = list.split_at(list.partition_point(|&entry| (entry as usize) < *len));
            (old.to_vec(), new.iter().map(|entry| entry - *len as u32).collect())
        };
        let (old, new): (Vec<_>, Vec<_>) = keep.heads().iter().zip(&lens).map(split).unzip();
        if !self.store.is_empty() {
            self.store.retain(&Selection::new(old))?;
        }
        self.store.append_selected(k, step.v, &Selection::new(new))?;
        self.ledger.retain(keep);
        self.close_gaps(step, keep)
    }

    /// For policies that rerotate: entries lay without gaps, entry i at position i; those kept are turned to close the gaps between them.
    fn close_gaps(&mut self, step: &Step<'_>, keep: &Selection) -> Result<()> {
        if !self.policy.rerotates() {
            return Ok(());
        }
        let (shape, lens) = (*self.store.shape(), self.store.lens());
        if lens.iter().any(|len| *len != lens[0]) {
            let what = "new rotations where heads keep different numbers of entries";
            return Err(Error::Unsupported(what.into()));
        }
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (head, kept) in keep.heads().iter().enumerate() {
            let (k, v) = self.store.read(head / shape.kv_heads, head % shape.kv_heads)?;
            let moves: Vec<_> = (0..).zip(kept).map(|(to, &from)| to - i64::from(from)).collect();
            keys.push(step.rope.apply_at(&k.unsqueeze(0)?.unsqueeze(0)?, &moves)?);
            values.push(v);
        }
        let dims = (lens.len() / shape.kv_heads, shape.kv_heads, lens[0], shape.head_dim);
        let device = step.k.device();
        self.store.reset();
        self.store.append(
            &Tensor::cat(&keys, 0)?.reshape(dims)?.to_device(device)?,
            &Tensor::stack(&values, 0)?.reshape(dims)?.to_device(device)?,
        )
    }
}

impl<S: KvStore, P: EvictionPolicy> KvCache for PolicyCache<S, P> {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let tokens = self.check(step)?;
        let q = step.rope.apply(step.q, self.next_position())?;
        let k = step.rope.apply(step.k, self.next_position())?;
        let whole = match tokens {
            1 if !self.store.is_empty() => self.take_one(step, &q, &k)?,
            _ => {
                let whole = self.attend_many(step, &q, &k)?;
                self.take_many(step, &q, &k, &whole)?;
                whole
            }
        };
        whole.into_output(step.q.dtype())
    }

    fn take_prompt(&mut self, step: &Step<'_>, whole: &Partial) -> Result<()> {
        self.check(step)?;
        if self.seen > 0 {
            return Err(Error::mismatch("tokens seen before a prompt", 0, self.seen));
        }
        let (q, k) = (step.rope.apply(step.q, 0)?, step.rope.apply(step.k, 0)?);
        self.take_many(step, &q, &k, whole)
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn held(&self) -> usize {
        self.store.len()
    }

    fn footprint(&self) -> Footprint {
        let queries =
            self.queries.as_ref().map_or(0, |q| q.elem_count() * q.dtype().size_in_bytes());
        let bookkeeping = self.ledger.bytes() + queries;
        self.store.footprint() + Footprint { bookkeeping, ..Default::default() }
    }

    fn reset(&mut self) {
        self.store.reset();
        self.ledger = Ledger::default();
        self.queries = None;
        self.seen = 0;
    }
}
