//! A session of a transformer: shared weights, and one cache per layer for many sequences.

use std::collections::BTreeMap;

use crate::decoder::Transformer;
use candle_core::{Device, Tensor};
#[cfg(feature = "cuda")]
use longctx_core::cuda::DecodeGraphs;
use longctx_core::{
    Batch, CausalLm, Error, Footprint, Greedy, KvCache, LayerCaches, Logits, Result, SeqId,
};

/// A transformer with its caches, one per layer, for many sequences.
///
/// If a layer fails in the middle of a call, the layers before it are rolled back. If a cache
/// cannot be rolled back, the sequence is poisoned: its calls return [`Error::Poisoned`] until it
/// is removed.
pub struct Session {
    model: Transformer,
    caches: LayerCaches,
    sequences: BTreeMap<SeqId, Sequence>,
    #[cfg(feature = "cuda")]
    graphs: Option<DecodeGraphs>,
}

#[derive(Debug, Clone, Default)]
struct Sequence {
    seen: usize,
    /// The error after which the layers have different tokens.
    poisoned: Option<String>,
}

impl Session {
    pub(crate) fn new(model: Transformer, caches: Vec<Box<dyn KvCache>>) -> Result<Self> {
        for (index, cache) in caches.iter().enumerate() {
            if cache.spec().rope.is_none() {
                let name = format!("rope of layer {index}'s cache");
                return Err(Error::setting(name, "the layer's rotary embedding", "none"));
            }
        }
        Ok(Self {
            model,
            caches: LayerCaches::new(caches),
            sequences: BTreeMap::new(),
            #[cfg(feature = "cuda")]
            graphs: None,
        })
    }

    /// Captures decode steps of at most `max_seqs` sequences in CUDA graphs, one for each number of
    /// sequences, and replays them. Models in f32, and steps whose caches or layers do not support
    /// it, run as usual.
    ///
    /// A call waits for evictions of the step before, also on another thread. Forks, truncations and
    /// removals do not: make them on the thread of the last step.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the model is not on a CUDA device.
    #[cfg(feature = "cuda")]
    pub fn with_cuda_graphs(self, max_seqs: usize) -> Result<Self> {
        let graphs = Some(DecodeGraphs::new(self.model.device(), max_seqs)?);
        Ok(Self { graphs, ..self })
    }

    /// Returns the number of decode steps that were replayed from a CUDA graph.
    #[cfg(feature = "cuda")]
    pub fn replayed_steps(&self) -> u64 {
        self.graphs.as_ref().map_or(0, DecodeGraphs::replayed)
    }

    /// Feeds tokens, and returns what `read` returns for the logits.
    fn forward_and_read<T>(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        logits: Logits,
        read: impl FnOnce(Tensor) -> T,
    ) -> Result<T> {
        #[cfg(feature = "cuda")]
        self.poison_after_panic();
        self.check(batch, ids)?;
        let out = self.run(batch, ids, logits, read);
        match &out {
            Ok(_) => {
                for (seq, tokens) in batch.iter() {
                    self.sequences.entry(seq).or_default().seen += tokens.len();
                }
            }
            Err(error) => self.roll_back(batch, error),
        }
        out
    }

    /// Runs the model on ids that have been checked.
    fn run<T>(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        logits: Logits,
        read: impl FnOnce(Tensor) -> T,
    ) -> Result<T> {
        let model = &self.model;
        #[cfg(feature = "cuda")]
        if let Some(graphs) = &mut self.graphs {
            if model.is_half()
                && batch.max_seqlen() == 1
                && batch.seqs().iter().all(|seq| self.sequences.contains_key(seq))
            {
                let mut forward = |caches: &mut [Box<dyn KvCache>], batch: &Batch, ids: &Tensor| {
                    model.forward(caches, batch, ids, logits)
                };
                return graphs.step(batch, ids, &mut self.caches, &[], &mut forward, read);
            }
            graphs.wait()?;
        }
        let ids = Tensor::new(ids, model.device())?;
        Ok(read(model.forward(&mut self.caches, batch, &ids, logits)?))
    }

    /// Returns the weights.
    pub fn model(&self) -> &Transformer {
        &self.model
    }

    /// Returns the caches, one per layer.
    pub fn caches(&self) -> &[Box<dyn KvCache>] {
        &self.caches
    }

    /// Returns a sequence that exists and is not poisoned.
    fn checked(&self, seq: SeqId) -> Result<&Sequence> {
        let sequence = self.sequences.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        match &sequence.poisoned {
            None => Ok(sequence),
            Some(reason) => Err(Error::Poisoned { seq, reason: reason.clone() }),
        }
    }

    fn check(&self, batch: &Batch, ids: &[u32]) -> Result<()> {
        batch.check_ids(ids, self.vocab_size())?;
        if let Some(longest) = self.model.longest_sequence() {
            let after = batch.iter().map(|(seq, own)| (seq, self.seen(seq) + own.len()));
            if let Some((seq, tokens)) = after.into_iter().find(|&(_, n)| n > longest) {
                let what = format!("tokens of sequence {seq}");
                let expected = format!("at most the {longest} that the model was opened for");
                return Err(Error::mismatch(what, expected, tokens));
            }
        }
        let known = batch.seqs().iter().filter(|seq| self.sequences.contains_key(seq));
        known.copied().try_for_each(|seq| self.checked(seq).map(drop))
    }

    /// Poisons the sequences of a replayed step that a panic has ended: the layers have counted
    /// tokens that the session has not.
    #[cfg(feature = "cuda")]
    fn poison_after_panic(&mut self) {
        if !self.graphs.as_mut().is_some_and(DecodeGraphs::take_incomplete) {
            return;
        }
        for (&seq, sequence) in &mut self.sequences {
            if self.caches.iter().any(|cache| cache.seen(seq) != sequence.seen) {
                let reason = || "a panic ended a step; a layer may lack an entry".into();
                sequence.poisoned.get_or_insert_with(reason);
            }
        }
    }

    /// Rolls all layers back to the tokens before a failed call.
    fn roll_back(&mut self, batch: &Batch, error: &Error) {
        #[cfg(feature = "cuda")]
        if self.graphs.as_mut().is_some_and(DecodeGraphs::take_incomplete) {
            for seq in batch.seqs() {
                if let Some(sequence) = self.sequences.get_mut(seq) {
                    sequence.poisoned = Some(format!("{error}; a layer may lack an entry"));
                }
            }
            return;
        }
        for &seq in batch.seqs() {
            let Some(sequence) = self.sequences.get_mut(&seq) else {
                self.caches.remove(seq);
                continue;
            };
            if let Err(why) = self.caches.roll_back(seq, sequence.seen) {
                sequence.poisoned = Some(format!("{error}; a layer cannot be rolled back: {why}"));
            }
        }
    }
}

impl CausalLm for Session {
    fn forward(&mut self, batch: &Batch, ids: &[u32], logits: Logits) -> Result<Tensor> {
        self.forward_and_read(batch, ids, logits, |logits| logits)
    }

    fn forward_greedy(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        greedy: &mut Greedy,
    ) -> Result<Vec<Result<u32>>> {
        self.forward_and_read(batch, ids, Logits::Last, |logits| greedy.start(&logits))??.wait()
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        let sequence = self.checked(from)?.clone();
        if self.sequences.contains_key(&to) {
            let what = format!("sequence {to} to fork into");
            return Err(Error::mismatch(what, "an id that is not in use", "an id in use"));
        }
        self.caches.fork(from, to)?;
        self.sequences.insert(to, sequence);
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let seen = self.checked(seq)?.seen;
        if len > seen {
            let what = format!("tokens of sequence {seq} to keep");
            return Err(Error::mismatch(what, format!("at most {seen}"), len));
        }
        self.caches.check_truncate(seq, len)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let done = self.caches.truncate(seq, len);
        let sequence = self.sequences.entry(seq).or_default();
        match &done {
            Ok(()) => sequence.seen = len,
            Err(error) => sequence.poisoned = Some(error.to_string()),
        }
        done
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.caches.remove(seq);
        self.sequences.remove(&seq).is_some()
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.sequences.keys().copied().collect()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.sequences.get(&seq).map_or(0, |sequence| sequence.seen)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        self.caches.can_append(batch)
    }

    fn footprint(&self) -> Footprint {
        self.caches.footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.caches.seq_footprint(seq)
    }

    fn clear(&mut self) {
        self.caches.clear();
        self.sequences.clear();
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn context_length(&self) -> Option<usize> {
        Some(self.model.config().context_length)
    }

    fn model_type(&self) -> &str {
        &self.model.config().family
    }

    fn device(&self) -> &Device {
        self.model.device()
    }
}
