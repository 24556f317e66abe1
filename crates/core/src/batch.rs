//! The sequences of one call and the number of tokens of each.

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::{Error, PreparedStep, Result};
use candle_core::{Device, Tensor};

/// A sequence's identifier, chosen by the engine.
pub type SeqId = u64;

/// The sequences that one call advances, each by its own number of tokens.
///
/// The tokens of all sequences are concatenated, as in FlashAttention's varlen calls: sequence `i`
/// has the tokens `cu_seqlens[i]..cu_seqlens[i + 1]`. A batch is made once per step and shared by
/// all layers. A clone is cheap.
///
/// ```
/// use longctx_core::Batch;
///
/// // Sequence 7 brings a prompt of five tokens, sequence 9 one decoded token.
/// let batch = Batch::new(&[(7, 5), (9, 1)])?;
/// assert_eq!(batch.cu_seqlens(), [0, 5, 6]);
/// assert_eq!(batch.iter().collect::<Vec<_>>(), [(7, 0..5), (9, 5..6)]);
/// assert!(Batch::new(&[(7, 1), (7, 1)]).is_err());
/// # Ok::<(), longctx_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Batch {
    inner: Arc<Inner>,
    prepared: Option<PreparedStep>,
    #[cfg(feature = "cuda")]
    after_step: Option<Arc<crate::cuda::AfterStep>>,
}

#[derive(Debug)]
struct Inner {
    seqs: Vec<SeqId>,
    cu_seqlens: Vec<usize>,
    /// `cu_seqlens` on the first device for which it was requested.
    on_device: OnceLock<Tensor>,
    /// See [`Batch::shared`]; the newest last.
    shared: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

/// The largest number of tokens of a batch. Kernels count tokens in u32, and sizes in bytes that
/// are computed from this number do not overflow.
const MAX_TOKENS: usize = u32::MAX as usize;

/// Number of values that [`Batch::shared`] keeps. A model alternates between a few kinds of layers,
/// so a few values suffice.
const MAX_SHARED: usize = 8;

impl Batch {
    /// Creates a batch from sequences and their numbers of tokens.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is no sequence, a sequence has no tokens, one is listed twice,
    /// or there are more than 2^32 - 1 tokens.
    pub fn new(seqs: &[(SeqId, usize)]) -> Result<Self> {
        if seqs.is_empty() {
            return Err(Error::mismatch("sequences of a batch", "at least one", 0));
        }
        let mut ids: Vec<_> = seqs.iter().map(|(seq, _)| *seq).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::mismatch("sequences of a batch", "distinct ones", pair[0]));
        }
        let mut cu_seqlens = vec![0usize];
        for &(seq, tokens) in seqs {
            if tokens == 0 {
                let what = format!("tokens of sequence {seq}");
                return Err(Error::mismatch(what, "at least one", 0));
            }
            let end = cu_seqlens[cu_seqlens.len() - 1].saturating_add(tokens);
            if end > MAX_TOKENS {
                let expected = format!("at most {MAX_TOKENS}");
                return Err(Error::mismatch("tokens of a batch", expected, end));
            }
            cu_seqlens.push(end);
        }
        let seqs = seqs.iter().map(|(seq, _)| *seq).collect();
        let (on_device, shared) = (OnceLock::new(), Mutex::default());
        let inner = Arc::new(Inner { seqs, cu_seqlens, on_device, shared });
        Ok(Self {
            inner,
            prepared: None,
            #[cfg(feature = "cuda")]
            after_step: None,
        })
    }

    /// Creates a batch of one sequence with `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if `tokens` is 0.
    pub fn single(seq: SeqId, tokens: usize) -> Result<Self> {
        Self::new(&[(seq, tokens)])
    }

    /// Creates a batch of one token for each sequence: a decode step.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn decode(seqs: &[SeqId]) -> Result<Self> {
        Self::new(&seqs.iter().map(|&seq| (seq, 1)).collect::<Vec<_>>())
    }

    /// Returns the batch of a decode step whose lists have been
    /// [prepared](crate::PreparedDecode::prepare_decode).
    ///
    /// # Safety
    /// The caches and stores that receive the batch have prepared their last step for these
    /// sequences, in this order. `step` has the device addresses of that step's lists, and of a
    /// workspace and reserved memory of at least the sizes that its
    /// [`StepLists`](crate::StepLists) require. The memory lives until the launches of the batch
    /// have run, and nothing else uses it until then.
    #[must_use]
    #[allow(unsafe_code)]
    pub unsafe fn with_prepared(&self, step: PreparedStep) -> Self {
        Self { prepared: Some(step), ..self.clone() }
    }

    /// Returns the batch of a prepared step whose caches may defer launches to the end of the step.
    #[cfg(feature = "cuda")]
    pub(crate) fn with_after_step(&self, after: Arc<crate::cuda::AfterStep>) -> Self {
        Self { after_step: Some(after), ..self.clone() }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn after_step(&self) -> Option<&crate::cuda::AfterStep> {
        self.after_step.as_deref()
    }

    /// Returns the memory of a prepared step. If there is one, caches only launch kernels.
    pub fn prepared(&self) -> Option<PreparedStep> {
        self.prepared
    }

    /// Returns the memory of a prepared step, for a store that has prepared a step of `seqs`
    /// sequences; `None` if the batch is not prepared.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the store has prepared none, or one of another number of sequences.
    pub fn prepared_for(&self, seqs: Option<usize>) -> Result<Option<PreparedStep>> {
        match self.prepared {
            Some(_) if seqs != Some(self.seqs().len()) => {
                let (expected, got) = (self.seqs().len(), seqs.unwrap_or(0));
                Err(Error::mismatch("sequences of the prepared step", expected, got))
            }
            prepared => Ok(prepared),
        }
    }

    /// Returns the sequences, in the order of their tokens.
    pub fn seqs(&self) -> &[SeqId] {
        &self.inner.seqs
    }

    /// Returns the cumulative lengths, `[sequences + 1]`: the first token of each sequence, and the
    /// total.
    pub fn cu_seqlens(&self) -> &[usize] {
        &self.inner.cu_seqlens
    }

    /// Returns [`cu_seqlens`](Self::cu_seqlens) as a u32 tensor on `device`, created once per
    /// device.
    ///
    /// # Errors
    /// If candle cannot create the tensor.
    pub fn cu_seqlens_on(&self, device: &Device) -> Result<Tensor> {
        let make = || -> Result<Tensor> {
            let ends: Vec<u32> = self.cu_seqlens().iter().map(|&end| end as u32).collect();
            Ok(Tensor::from_vec(ends, self.cu_seqlens().len(), device)?)
        };
        match self.inner.on_device.get() {
            Some(tensor) if tensor.device().same_device(device) => Ok(tensor.clone()),
            Some(_) => make(),
            None => {
                let tensor = make()?;
                Ok(self.inner.on_device.get_or_init(|| tensor).clone())
            }
        }
    }

    /// Returns a value that several layers share, for example a plan of attention, which depends
    /// only on the lengths of the sequences. Returns the newest value of type `T` for which `fits`
    /// returns true, or creates one with `make`.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn shared<T: Any + Send + Sync>(
        &self,
        fits: impl Fn(&T) -> bool,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let lock = || self.inner.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let of_type = |value: &Arc<dyn Any + Send + Sync>| value.clone().downcast::<T>().ok();
        let found = lock().iter().rev().filter_map(of_type).find(|value| fits(value));
        if let Some(found) = found {
            return Ok(found);
        }
        let made = Arc::new(make()?);
        let mut values = lock();
        if values.len() == MAX_SHARED {
            values.remove(0);
        }
        values.push(made.clone());
        Ok(made)
    }

    /// Iterates over the sequences and their token ranges.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (SeqId, Range<usize>)> + '_ {
        let ranges = self.inner.cu_seqlens.windows(2).map(|ends| ends[0]..ends[1]);
        self.inner.seqs.iter().copied().zip(ranges)
    }

    /// Returns the total number of tokens.
    pub fn tokens(&self) -> usize {
        self.inner.cu_seqlens[self.inner.seqs.len()]
    }

    /// Returns the number of tokens of the longest sequence of the batch.
    pub fn max_seqlen(&self) -> usize {
        self.iter().map(|(_, tokens)| tokens.len()).max().unwrap_or(0)
    }

    /// Checks that the batch has one token of each sequence, as a decode step has.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the largest number of tokens.
    pub fn check_decode(&self) -> Result<()> {
        match self.max_seqlen() {
            1 => Ok(()),
            tokens => Err(Error::mismatch("tokens of a sequence of a decode step", 1, tokens)),
        }
    }

    /// Checks the token ids of a batch: one per token, each below `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the count or the first id that does not fit.
    pub fn check_ids(&self, ids: &[u32], vocab_size: usize) -> Result<()> {
        if ids.len() != self.tokens() {
            return Err(Error::mismatch("token ids", self.tokens(), ids.len()));
        }
        match ids.iter().position(|&id| id as usize >= vocab_size) {
            Some(at) => {
                let what = format!("token id {at} of the batch");
                Err(Error::mismatch(what, format!("an id below {vocab_size}"), ids[at]))
            }
            None => Ok(()),
        }
    }

    /// Returns the position of each token. `seen` returns the number of tokens before a sequence's
    /// first token of this batch.
    pub fn positions(&self, seen: impl Fn(SeqId) -> usize) -> Vec<i64> {
        let mut positions = Vec::with_capacity(self.tokens());
        for (seq, tokens) in self.iter() {
            let first = seen(seq) as i64;
            positions.extend(first..first + tokens.len() as i64);
        }
        positions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_of_too_many_tokens_are_errors() {
        assert!(Batch::new(&[(0, MAX_TOKENS - 1), (1, 1)]).is_ok());
        for seqs in [&[(0, MAX_TOKENS), (1, 1)][..], &[(0, usize::MAX)], &[(0, 9), (1, usize::MAX)]]
        {
            let error = Batch::new(seqs).unwrap_err().to_string();
            assert!(error.starts_with("tokens of a batch: expected at most 4294967295"), "{error}");
        }
    }

    #[test]
    fn a_decode_step_has_one_token_of_each_sequence() {
        assert!(Batch::decode(&[3, 5]).unwrap().check_decode().is_ok());
        let error = Batch::new(&[(3, 1), (5, 2)]).unwrap().check_decode().unwrap_err().to_string();
        assert_eq!(error, "tokens of a sequence of a decode step: expected 1, got 2");
    }

    #[test]
    fn a_shared_value_is_made_once_for_each_type_and_condition() {
        let batch = Batch::decode(&[3, 5]).unwrap();
        let made = |wanted: u32| {
            let mut count = 0;
            let make = || {
                count += 1;
                Ok(wanted)
            };
            assert_eq!(*batch.shared(|&value| value == wanted, make).unwrap(), wanted);
            count
        };
        assert_eq!([made(1), made(1), made(2), made(1), made(2)], [1, 0, 1, 0, 0]);
        assert_eq!(*batch.shared(|_: &&str| true, || Ok("another type")).unwrap(), "another type");
        let refused = batch.shared(|_: &u32| false, || Err(Error::UnknownSequence(3)));
        assert!(refused.is_err());
        // The oldest values are dropped.
        (10..10 + MAX_SHARED as u32).for_each(|value| assert_eq!(made(value), 1));
        assert_eq!(made(1), 1);
    }
}
