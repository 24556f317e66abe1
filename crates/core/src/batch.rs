//! The sequences of one call, and how many tokens each brings.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// A sequence's number. The engine chooses it.
pub type SeqId = u64;

/// The sequences that one call advances, each by its own number of tokens.
///
/// Tokens of all sequences lie one after the other, as in FlashAttention's varlen calls: sequence
/// `i` owns the tokens `cu_seqlens[i]..cu_seqlens[i + 1]`. A batch is made once a step and shared
/// by all layers. A clone is cheap.
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
}

#[derive(Debug)]
struct Inner {
    seqs: Vec<SeqId>,
    cu_seqlens: Vec<usize>,
    /// `cu_seqlens` on the device that first asked for it.
    on_device: OnceLock<Tensor>,
}

impl Batch {
    /// Sequences and their numbers of tokens.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for no sequences, a sequence without tokens, or one that comes twice.
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
            let end = cu_seqlens[cu_seqlens.len() - 1].checked_add(tokens);
            let overflow = || Error::mismatch("tokens of a batch", "a countable number", "more");
            cu_seqlens.push(end.ok_or_else(overflow)?);
        }
        let seqs = seqs.iter().map(|(seq, _)| *seq).collect();
        Ok(Self { inner: Arc::new(Inner { seqs, cu_seqlens, on_device: OnceLock::new() }) })
    }

    /// One sequence that brings `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for no tokens.
    pub fn single(seq: SeqId, tokens: usize) -> Result<Self> {
        Self::new(&[(seq, tokens)])
    }

    /// One token for each of the sequences.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn decode(seqs: &[SeqId]) -> Result<Self> {
        Self::new(&seqs.iter().map(|&seq| (seq, 1)).collect::<Vec<_>>())
    }

    /// The sequences, in the order of their tokens.
    pub fn seqs(&self) -> &[SeqId] {
        &self.inner.seqs
    }

    /// Where each sequence's tokens begin, and where the last one's end: `[sequences + 1]`.
    pub fn cu_seqlens(&self) -> &[usize] {
        &self.inner.cu_seqlens
    }

    /// [`cu_seqlens`](Self::cu_seqlens) as a u32 tensor, made once for a device.
    ///
    /// # Errors
    /// If the tensor can't be made.
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

    /// The sequences and their ranges of tokens.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (SeqId, Range<usize>)> + '_ {
        let ranges = self.inner.cu_seqlens.windows(2).map(|ends| ends[0]..ends[1]);
        self.inner.seqs.iter().copied().zip(ranges)
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.inner.cu_seqlens[self.inner.seqs.len()]
    }

    /// Tokens of the sequence that brings the most.
    pub fn longest(&self) -> usize {
        self.iter().map(|(_, tokens)| tokens.len()).max().unwrap_or(0)
    }

    /// Each token's position, if a sequence's tokens follow the `seen` ones before them.
    pub fn positions(&self, seen: impl Fn(SeqId) -> usize) -> Vec<i64> {
        let of_seq = |(seq, tokens): (SeqId, Range<usize>)| {
            let first = seen(seq) as i64;
            (first..).take(tokens.len())
        };
        self.iter().flat_map(of_seq).collect()
    }
}
