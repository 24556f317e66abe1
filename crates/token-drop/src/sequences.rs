//! The per-sequence state that all caches of this crate share.

use std::collections::BTreeMap;

use crate::prompt::Prompt;
use longctx_core::{Batch, Error, Result, SeqId};

/// The sequences of a cache. `T` is the cache's own state of a sequence.
#[derive(Debug)]
pub struct Sequences<T> {
    known: BTreeMap<SeqId, Sequence<T>>,
    /// Prompt lengths declared before a sequence's first call.
    expected: BTreeMap<SeqId, usize>,
}

/// One sequence.
#[derive(Debug, Clone)]
pub struct Sequence<T> {
    /// Number of tokens seen.
    pub seen: usize,
    pub prompt: Prompt,
    pub state: T,
    /// The error of a call that failed midway; `None` unless the sequence is poisoned.
    poisoned: Option<String>,
}

impl<T> Default for Sequences<T> {
    fn default() -> Self {
        Self { known: BTreeMap::new(), expected: BTreeMap::new() }
    }
}

impl<T: Clone> Sequences<T> {
    /// Declares that the first `tokens` tokens of a sequence are its prompt.
    pub fn expect_prompt(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        let seen = self.seen(seq);
        if tokens <= seen {
            let what = format!("tokens of the prompt of sequence {seq}");
            return Err(Error::mismatch(what, format!("more than the {seen} seen"), tokens));
        }
        match self.known.get_mut(&seq) {
            Some(sequence) => sequence.prompt = Prompt::new(Some(tokens)),
            None => drop(self.expected.insert(seq, tokens)),
        }
        Ok(())
    }

    /// Checks that no sequence of a batch is poisoned.
    pub fn check(&self, batch: &Batch) -> Result<()> {
        let known = |&seq: &SeqId| self.known.get(&seq).map_or(Ok(()), |known| known.check(seq));
        batch.seqs().iter().try_for_each(known)
    }

    pub fn get(&self, seq: SeqId) -> Option<&Sequence<T>> {
        self.known.get(&seq)
    }

    /// Returns a known sequence that is not poisoned.
    pub fn known(&self, seq: SeqId) -> Result<&Sequence<T>> {
        let sequence = self.known.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        sequence.check(seq)?;
        Ok(sequence)
    }

    pub fn get_mut(&mut self, seq: SeqId) -> Option<&mut Sequence<T>> {
        self.known.get_mut(&seq)
    }

    /// Returns the prompt of a sequence, known or new, after a call of `tokens` more tokens.
    pub fn prompt_with(&self, seq: SeqId, tokens: usize) -> Prompt {
        self.prompt(seq).grown(tokens, self.seen(seq).saturating_add(tokens))
    }

    pub fn prompt(&self, seq: SeqId) -> Prompt {
        let new = || Prompt::new(self.expected.get(&seq).copied());
        self.known.get(&seq).map_or_else(new, |sequence| sequence.prompt)
    }

    /// Returns a sequence, created if it is unknown.
    pub fn begin(&mut self, seq: SeqId, new: impl FnOnce() -> T) -> &mut Sequence<T> {
        let prompt = self.prompt(seq);
        let make = || Sequence { seen: 0, prompt, state: new(), poisoned: None };
        self.known.entry(seq).or_insert_with(make)
    }

    /// Removes a sequence that was just created.
    pub fn forget(&mut self, seq: SeqId) {
        self.known.remove(&seq);
    }

    /// Counts the tokens of a call.
    pub fn advance(&mut self, seq: SeqId, tokens: usize) {
        self.advance_part(seq, tokens, tokens);
    }

    /// Counts `part` of a call's `tokens` tokens.
    pub fn advance_part(&mut self, seq: SeqId, part: usize, tokens: usize) {
        if let Some(sequence) = self.known.get_mut(&seq) {
            sequence.seen += part;
            sequence.prompt = sequence.prompt.grown(tokens, sequence.seen);
        }
        self.expected.remove(&seq);
    }

    /// Poisons sequences of a call that failed midway, and returns its error.
    pub fn poison(&mut self, seqs: &[SeqId], error: Error) -> Error {
        for seq in seqs {
            if let Some(sequence) = self.known.get_mut(seq) {
                sequence.poisoned.get_or_insert(error.to_string());
            }
        }
        error
    }

    /// Checks that `to` can become a copy of `from`.
    pub fn check_fork(&self, from: SeqId, to: SeqId) -> Result<()> {
        self.known(from)?;
        match self.known.contains_key(&to) {
            true => Err(Error::mismatch("sequence to fork to", "a new one", to)),
            false => Ok(()),
        }
    }

    /// Copies a sequence. [`check_fork`](Self::check_fork) has been called before.
    pub fn fork(&mut self, from: SeqId, to: SeqId) {
        if let Some(sequence) = self.known.get(&from) {
            self.known.insert(to, sequence.clone());
            self.expected.remove(&to);
        }
    }

    /// Returns a sequence that has at least `len` tokens and is not poisoned.
    pub fn check_truncate(&self, seq: SeqId, len: usize) -> Result<&Sequence<T>> {
        let sequence = self.known(seq)?;
        if len > sequence.seen {
            let what = format!("tokens of sequence {seq} to keep");
            return Err(Error::mismatch(what, format!("at most {}", sequence.seen), len));
        }
        Ok(sequence)
    }

    pub fn remove(&mut self, seq: SeqId) -> bool {
        self.expected.remove(&seq);
        self.known.remove(&seq).is_some()
    }

    pub fn ids(&self) -> Vec<SeqId> {
        self.known.keys().copied().collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (SeqId, &Sequence<T>)> {
        self.known.iter().map(|(&seq, sequence)| (seq, sequence))
    }

    pub fn seen(&self, seq: SeqId) -> usize {
        self.known.get(&seq).map_or(0, |sequence| sequence.seen)
    }

    pub fn clear(&mut self) {
        self.known.clear();
        self.expected.clear();
    }
}

impl<T> Sequence<T> {
    fn check(&self, seq: SeqId) -> Result<()> {
        match &self.poisoned {
            Some(reason) => Err(Error::Poisoned { seq, reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// Counts only the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.seen = len;
        self.prompt = self.prompt.truncated(len);
    }
}
