//! Sessions: a model and its memory of many sequences.

#[cfg(feature = "cuda")]
mod device;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::host_model::{HostModel, SequenceCall};
use crate::model::{Model, Weights};
use crate::recurrent_state::{RecurrentState, SequenceStates};
use crate::state::State;
use crate::workspace::Workspace;
use candle_core::{Device, Tensor};
use longctx_core::{
    Batch, CausalLm, Error, Footprint, KvCache, LayerCaches, Logits, Result, SeqId,
};

/// A model with its memory of many sequences: for each sequence a state of fixed size per recurrent
/// layer, and for all sequences a cache per attention layer.
///
/// A recurrent state cannot be rolled back. [`truncate`](CausalLm::truncate) is possible to the
/// current length, to length 0, and to snapshots ([`with_snapshots`](Self::with_snapshots)).
///
/// After an error in a call:
///
/// - On the CPU, states are unchanged, because a call works on copies of them. Attention layers
///   that have advanced are truncated.
/// - If a cache cannot be truncated, and on a device, where states are updated in place, the
///   sequences of the call are poisoned: calls return [`Error::Poisoned`] until they are removed.
pub struct Session {
    model: Model,
    states: SequenceStates,
    /// The caches of the attention layers.
    caches: LayerCaches,
    sequences: BTreeMap<SeqId, Sequence>,
    snapshots: Option<Snapshots>,
    workspace: Workspace,
    #[cfg(feature = "cuda")]
    graphs: Option<longctx_core::cuda::DecodeGraphs>,
}

/// The interval of snapshots, and the number of snapshots kept per sequence.
#[derive(Debug, Clone, Copy)]
struct Snapshots {
    every: usize,
    keep: usize,
}

impl Snapshots {
    /// Returns the positions, in increasing order, at which a sequence's next tokens leave
    /// snapshots.
    fn positions(self, seen: usize, tokens: usize) -> Vec<usize> {
        let positions = seen / self.every + 1..=(seen + tokens) / self.every;
        let first = positions.clone().count().saturating_sub(self.keep);
        positions.skip(first).map(|position| position * self.every).collect()
    }
}

#[derive(Clone, Default)]
struct Sequence {
    seen: usize,
    /// The newest copies of its state with their positions, in increasing order.
    snapshots: Vec<(usize, Arc<RecurrentState>)>,
    /// The error after which it cannot continue.
    poisoned: Option<String>,
}

impl Session {
    pub(crate) fn new(model: Model, caches: Vec<Box<dyn KvCache>>) -> Self {
        let states = SequenceStates::new(model.device());
        let (sequences, workspace) = (BTreeMap::new(), Workspace::default());
        let caches = LayerCaches::new(caches);
        Self {
            model,
            states,
            caches,
            sequences,
            snapshots: None,
            workspace,
            #[cfg(feature = "cuda")]
            graphs: None,
        }
    }

    /// Captures decode steps of at most `max_seqs` sequences in CUDA graphs, one for each number of
    /// sequences, and replays them while the same sequences decode. Models in f32, and attention
    /// layers whose caches do not support it, run as usual.
    ///
    /// A call waits for evictions of the step before, also on another thread. Forks, truncations and
    /// removals do not: make them on the thread of the last step.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the model is not on a CUDA device.
    #[cfg(feature = "cuda")]
    pub fn with_cuda_graphs(self, max_seqs: usize) -> Result<Self> {
        let graphs = Some(longctx_core::cuda::DecodeGraphs::new(self.model.device(), max_seqs)?);
        Ok(Self { graphs, ..self })
    }

    /// Returns the number of decode steps that were replayed from a CUDA graph.
    #[cfg(feature = "cuda")]
    pub fn replayed_steps(&self) -> u64 {
        self.graphs.as_ref().map_or(0, |graphs| graphs.replayed())
    }

    /// Copies each sequence's state after every `every` tokens and keeps the newest `keep` copies
    /// (snapshots), so that [`truncate`](CausalLm::truncate) can go back to them. After a
    /// truncation to [`last_snapshot`](Self::last_snapshot), feed the tokens from there again.
    ///
    /// # Errors
    /// [`Error::Setting`] if `every` or `keep` is 0.
    pub fn with_snapshots(self, every: usize, keep: usize) -> Result<Self> {
        for (name, value) in [("every", every), ("keep", keep)] {
            if value == 0 {
                return Err(Error::setting(name, "at least 1", value));
            }
        }
        Ok(Self { snapshots: Some(Snapshots { every, keep }), ..self })
    }

    /// Returns the position of a sequence's newest snapshot.
    pub fn last_snapshot(&self, seq: SeqId) -> Option<usize> {
        self.sequences.get(&seq)?.snapshots.last().map(|&(seen, _)| seen)
    }

    /// Returns the weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Returns the caches of the attention layers.
    pub fn caches(&self) -> &[Box<dyn KvCache>] {
        &self.caches
    }

    /// Returns the state of a sequence as a value.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Unsupported`] for a model with attention layers, whose
    /// caches are the caller's.
    pub fn state(&self, seq: SeqId) -> Result<State> {
        self.refuse_attention()?;
        let seen = self.checked(seq)?.seen;
        self.states.copy(seq)?.save(&self.model.spec, seen)
    }

    /// Sets the state of a sequence to one from a session on the same model. It replaces the state
    /// of a known sequence.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the part that does not fit the model; nothing has changed then.
    /// [`Error::Unsupported`] for a model with attention layers.
    pub fn restore(&mut self, seq: SeqId, state: &State) -> Result<()> {
        self.refuse_attention()?;
        state.check_family(self.model.model_type())?;
        let loaded = RecurrentState::load(state, &self.model.spec, self.model.device())?;
        self.states.set(seq, loaded)?;
        self.sequences.insert(seq, Sequence { seen: state.seen(), ..Default::default() });
        Ok(())
    }

    fn refuse_attention(&self) -> Result<()> {
        match self.model.has_attention() {
            true => Err(Error::Unsupported("the state of a model with attention layers".into())),
            false => Ok(()),
        }
    }

    /// Returns a known sequence that is not poisoned.
    fn checked(&self, seq: SeqId) -> Result<&Sequence> {
        let sequence = self.sequences.get(&seq).ok_or(Error::UnknownSequence(seq))?;
        match &sequence.poisoned {
            None => Ok(sequence),
            Some(reason) => Err(Error::Poisoned { seq, reason: reason.clone() }),
        }
    }

    fn check(&self, batch: &Batch, ids: &[u32]) -> Result<()> {
        batch.check_ids(ids, self.vocab_size())?;
        let known = batch.seqs().iter().filter(|seq| self.sequences.contains_key(seq));
        known.copied().try_for_each(|seq| self.checked(seq).map(drop))
    }

    /// Returns a copy of a sequence's state, or the initial state.
    fn recurrent_state(&self, seq: SeqId) -> Result<RecurrentState> {
        match self.sequences.contains_key(&seq) {
            true => self.states.copy(seq),
            false => RecurrentState::start(&self.model.spec, self.model.device()),
        }
    }

    /// Returns the positions at which the sequence's next tokens leave snapshots.
    fn snapshot_positions(&self, seq: SeqId, tokens: usize) -> Vec<usize> {
        self.snapshots
            .map_or_else(Vec::new, |snapshots| snapshots.positions(self.seen(seq), tokens))
    }

    /// Counts a sequence's tokens as seen, and stores their snapshots.
    fn advance(&mut self, seq: SeqId, tokens: usize, new: Vec<(usize, RecurrentState)>) {
        let sequence = self.sequences.entry(seq).or_default();
        sequence.seen += tokens;
        sequence.snapshots.extend(new.into_iter().map(|(seen, copy)| (seen, Arc::new(copy))));
        let keep = self.snapshots.map_or(0, |snapshots| snapshots.keep);
        let old = sequence.snapshots.len().saturating_sub(keep);
        sequence.snapshots.drain(..old);
    }

    fn forward_on_host(
        &mut self,
        model: &HostModel,
        batch: &Batch,
        ids: &[u32],
        logits: Logits,
    ) -> Result<Tensor> {
        let call = |(seq, rows): (SeqId, Range<usize>)| -> Result<SequenceCall> {
            let positions = self.snapshot_positions(seq, rows.len()).into_iter();
            let snapshots = positions.map(|position| (position, Vec::new())).collect();
            let state = self.recurrent_state(seq)?.into_host()?;
            Ok(SequenceCall { position: self.seen(seq), rows, state, snapshots })
        };
        let mut calls = batch.iter().map(call).collect::<Result<Vec<_>>>()?;
        let (caches, workspace) = (&mut self.caches, &mut self.workspace);
        let numbers = model.forward(batch, ids, logits, &mut calls, caches, workspace)?;
        for (&seq, SequenceCall { rows, state, snapshots, .. }) in batch.seqs().iter().zip(calls) {
            let snapshots =
                snapshots.into_iter().map(|(at, copy)| (at, RecurrentState::Host(copy)));
            self.advance(seq, rows.len(), snapshots.collect());
            self.states.set(seq, RecurrentState::Host(state))?;
        }
        let vocab = self.vocab_size();
        Ok(Tensor::from_vec(numbers, ((), vocab), &Device::Cpu)?)
    }

    /// Poisons the sequences of a replayed step that a panic has ended: the layers have counted
    /// tokens that the session has not.
    #[cfg(feature = "cuda")]
    fn poison_after_panic(&mut self) {
        if !self.graphs.as_mut().is_some_and(|graphs| graphs.take_incomplete()) {
            return;
        }
        for (&seq, sequence) in &mut self.sequences {
            if self.caches.iter().any(|cache| cache.seen(seq) != sequence.seen) {
                let reason = || "a panic ended a step; a layer may lack an entry".into();
                sequence.poisoned.get_or_insert_with(reason);
            }
        }
    }

    /// Truncates the caches that have advanced to their lengths before a failed call.
    fn roll_back(&mut self, batch: &Batch, error: &Error) {
        // Sequences on a device are poisoned, whether the step was incomplete or not.
        #[cfg(feature = "cuda")]
        if let Some(graphs) = &mut self.graphs {
            graphs.take_incomplete();
        }
        for &seq in batch.seqs() {
            let Some(sequence) = self.sequences.get_mut(&seq) else {
                self.states.remove(seq);
                self.caches.remove(seq);
                continue;
            };
            if !self.model.device().is_cpu() {
                sequence.poisoned = Some(error.to_string());
            } else if let Err(why) = self.caches.roll_back(seq, sequence.seen) {
                sequence.poisoned = Some(format!("{error}; a layer cannot be rolled back: {why}"));
            }
        }
    }
}

impl CausalLm for Session {
    fn forward(&mut self, batch: &Batch, ids: &[u32], logits: Logits) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        self.poison_after_panic();
        self.check(batch, ids)?;
        let out = match self.model.weights.clone() {
            Weights::Host(model) => self.forward_on_host(&model, batch, ids, logits),
            #[cfg(feature = "cuda")]
            Weights::Cuda(model) => self.forward_on_device(&model, batch, ids, logits),
        };
        if let Err(error) = &out {
            self.roll_back(batch, error);
        }
        out
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        let sequence = self.checked(from)?.clone();
        if self.sequences.contains_key(&to) {
            let what = format!("sequence {to} to fork into");
            return Err(Error::mismatch(what, "an id that is not in use", "an id in use"));
        }
        let state = self.states.copy(from)?;
        self.caches.fork(from, to)?;
        if let Err(error) = self.states.set(to, state) {
            self.caches.remove(to);
            return Err(error);
        }
        self.sequences.insert(to, sequence);
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        let sequence = self.checked(seq)?;
        if len > sequence.seen {
            let what = format!("tokens of sequence {seq} to keep");
            return Err(Error::mismatch(what, format!("at most {}", sequence.seen), len));
        }
        let known = len == sequence.seen
            || len == 0
            || self.model.spec.state_size() == 0
            || sequence.snapshots.iter().any(|&(at, _)| at == len);
        if !known {
            let what = format!("truncating sequence {seq} to {len} tokens");
            let why = "a recurrent state can be restored only at a snapshot, and none is there";
            return Err(Error::Unsupported(format!("{what}: {why}")));
        }
        self.caches.check_truncate(seq, len)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        let sequence = self.checked(seq)?;
        if len == sequence.seen {
            return Ok(());
        }
        let kept = sequence.snapshots.iter().find(|&&(at, _)| at == len);
        let state = match kept {
            Some((_, copy)) => RecurrentState::clone(copy),
            None => RecurrentState::start(&self.model.spec, self.model.device())?,
        };
        let done = self.caches.truncate(seq, len).and_then(|()| self.states.set(seq, state));
        let sequence = self.sequences.entry(seq).or_default();
        match &done {
            Ok(()) => {
                sequence.seen = len;
                sequence.snapshots.retain(|&(at, _)| at <= len);
            }
            Err(error) => sequence.poisoned = Some(error.to_string()),
        }
        done
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.caches.remove(seq);
        self.states.remove(seq);
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
        let states = self.sequences.keys().map(|&seq| self.states_footprint(seq));
        states.chain([self.caches.footprint()]).sum()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.caches.seq_footprint(seq) + self.states_footprint(seq)
    }

    fn clear(&mut self) {
        self.caches.clear();
        self.states.clear();
        self.sequences.clear();
    }

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn context_length(&self) -> Option<usize> {
        None
    }

    fn model_type(&self) -> &str {
        self.model.model_type()
    }

    fn device(&self) -> &Device {
        self.model.device()
    }
}

impl Session {
    /// Returns the bytes of a sequence's state and of its snapshots. A fork shares the snapshots of
    /// its original.
    fn states_footprint(&self, seq: SeqId) -> Footprint {
        let Some(sequence) = self.sequences.get(&seq) else { return Footprint::default() };
        let copies = 1 + sequence.snapshots.len();
        let payload = copies * self.model.spec.state_size() * size_of::<f32>();
        Footprint { payload, ..Default::default() }
    }
}
