use std::collections::BTreeMap;

use crate::{Batch, Error, Result, SeqId};

/// The sequences of a cache, and the number of tokens that each has seen. For
/// [`KvCache`](crate::KvCache)s over stores.
#[derive(Debug, Clone, Default)]
pub struct SeenTokens(BTreeMap<SeqId, usize>);

impl SeenTokens {
    /// Returns the number of tokens of a sequence; `None` for an unknown sequence.
    pub fn get(&self, seq: SeqId) -> Option<usize> {
        self.0.get(&seq).copied()
    }

    /// Returns the ids of all sequences, in ascending order.
    pub fn seqs(&self) -> Vec<SeqId> {
        self.0.keys().copied().collect()
    }

    /// Counts the tokens of a batch.
    pub fn advance(&mut self, batch: &Batch) {
        for (seq, tokens) in batch.iter() {
            *self.0.entry(seq).or_default() += tokens.len();
        }
    }

    /// Sets the number of tokens of a sequence, known or new.
    pub fn set(&mut self, seq: SeqId, tokens: usize) {
        self.0.insert(seq, tokens);
    }

    /// Checks that a new sequence `to` can become a copy of `from`, and returns the number of
    /// tokens of `from`.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`] for `from`; [`Error::Mismatch`] if `to` is known.
    pub fn check_fork(&self, from: SeqId, to: SeqId) -> Result<usize> {
        let seen = self.get(from).ok_or(Error::UnknownSequence(from))?;
        match self.get(to) {
            None => Ok(seen),
            Some(_) => Err(Error::mismatch("sequence to fork to", "a new one", to)),
        }
    }

    /// Checks that a sequence has at least `len` tokens, and returns the number of its tokens.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Mismatch`] if it has fewer tokens.
    pub fn check_truncate(&self, seq: SeqId, len: usize) -> Result<usize> {
        let seen = self.get(seq).ok_or(Error::UnknownSequence(seq))?;
        if len > seen {
            let what = format!("tokens of sequence {seq} to keep");
            return Err(Error::mismatch(what, format!("at most {seen}"), len));
        }
        Ok(seen)
    }

    /// Removes a sequence. Returns whether it was known.
    pub fn remove(&mut self, seq: SeqId) -> bool {
        self.0.remove(&seq).is_some()
    }

    /// Removes all sequences.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}
