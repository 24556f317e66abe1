//! A model at work.

use std::ops::Range;

use crate::model::{BLOCK, Model};
use crate::state::State;
use crate::workspace::Workspace;
use candle_core::{DType, Device, Tensor};
use longctx_core::{CausalLm, Error, Footprint, KvCache, Logits, Result};

/// A model with its memory: a state of fixed size per recurrent layer, a cache per attention layer.
///
/// After an error in the middle of a forward call, the layers have not all seen the same tokens: reset the session.
pub struct Session {
    model: Model,
    memories: Vec<Memory>,
    workspace: Workspace,
    /// Entries of the batch, from the first tokens on.
    batch: Option<usize>,
    seen: usize,
}

/// What one residual block remembers.
pub(crate) enum Memory {
    /// `[batch, size]`, empty before the first tokens.
    State(Vec<f32>),
    Cache(Box<dyn KvCache>),
}

impl Session {
    pub(crate) fn new(model: Model, memories: Vec<Memory>) -> Self {
        Self { model, memories, workspace: Workspace::default(), batch: None, seen: 0 }
    }

    /// The weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// All that the model remembers, as a value.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model with attention layers, whose caches are the caller's.
    pub fn state(&self) -> Result<State> {
        self.refuse_attention()?;
        let mut state = State::new(self.model.family(), self.batch.unwrap_or(0), self.seen);
        for ((name, parts), memory) in self.model.inner.state_parts().zip(&self.memories) {
            if let Memory::State(data) = memory {
                state.take_in(&name, &parts, data);
            }
        }
        Ok(state)
    }

    /// Goes on from a state that a session on the same model gave.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming what does not fit the model; nothing is changed then. [`Error::Unsupported`] for a model with attention layers.
    pub fn restore(&mut self, state: &State) -> Result<()> {
        self.refuse_attention()?;
        state.check_family(self.model.family())?;
        let memories = self
            .model
            .inner
            .state_parts()
            .map(|(name, parts)| Ok(Memory::State(state.give_out(&name, &parts)?)))
            .collect::<Result<_>>()?;
        self.memories = memories;
        self.batch = Some(state.batch()).filter(|&batch| batch > 0);
        self.seen = state.seen();
        Ok(())
    }

    fn refuse_attention(&self) -> Result<()> {
        match self.model.has_attention() {
            true => Err(Error::Unsupported("the state of a model with attention layers".into())),
            false => Ok(()),
        }
    }

    /// Makes the states for a batch at its first tokens; afterwards, checks that it has not changed.
    fn start(&mut self, batch: usize) -> Result<()> {
        match self.batch {
            Some(old) if old != batch => return Err(Error::mismatch("batch", old, batch)),
            Some(_) => return Ok(()),
            None => self.batch = Some(batch),
        }
        for ((_, parts), memory) in self.model.inner.state_parts().zip(&mut self.memories) {
            if let Memory::State(state) = memory {
                state.clear();
                for _ in 0..batch {
                    for part in &parts {
                        state.resize(state.len() + part.size(), part.start);
                    }
                }
            }
        }
        Ok(())
    }
}

impl CausalLm for Session {
    fn forward(&mut self, tokens: &Tensor, logits: Logits) -> Result<Tensor> {
        let model = self.model.inner.clone();
        let (batch, count) = check_tokens(tokens, self.vocab_size())?;
        self.start(batch)?;
        let ids: Vec<u32> = tokens.flatten_all()?.to_vec1()?;
        let wanted = match logits {
            Logits::Last => 1,
            Logits::All => count,
        };
        let hidden = model.hidden;
        let mut top = self.workspace.take(batch * wanted * hidden);
        for (entries, span) in spans(batch, count, model.has_attention()) {
            let mut x = self.workspace.take(entries.len() * span.len() * hidden);
            let of_span = entries.clone().flat_map(|e| span.clone().map(move |t| e * count + t));
            model.embed(of_span.map(|i| ids[i]), &mut x);
            model.run(&mut x, batch, entries.clone(), &mut self.memories, &mut self.workspace)?;
            for (entry, x) in entries.zip(x.chunks_exact(span.len() * hidden)) {
                let first = span.start.max(count - wanted);
                if first < span.end {
                    let x = &x[(first - span.start) * hidden..];
                    let at = (entry * wanted + first - (count - wanted)) * hidden;
                    top[at..at + x.len()].copy_from_slice(x);
                }
            }
            self.workspace.give(x);
        }
        self.seen += count;
        let logits = model.logits(&mut top);
        self.workspace.give(top);
        Ok(Tensor::from_vec(logits, (batch, wanted, self.vocab_size()), &Device::Cpu)?)
    }

    fn reset(&mut self) {
        for memory in &mut self.memories {
            match memory {
                Memory::State(state) => *state = Vec::new(),
                Memory::Cache(cache) => cache.reset(),
            }
        }
        self.batch = None;
        self.seen = 0;
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn footprint(&self) -> Footprint {
        let footprint = |memory: &Memory| match memory {
            Memory::State(state) => {
                Footprint { payload: size_of_val(state.as_slice()), ..Default::default() }
            }
            Memory::Cache(cache) => cache.footprint(),
        };
        self.memories.iter().map(footprint).sum()
    }

    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }

    fn context_length(&self) -> Option<usize> {
        None
    }

    fn family(&self) -> &str {
        self.model.family()
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }
}

/// The pieces of a forward call that go through all layers at a time: (entries, tokens). Without attention, memory is that of one
/// block; attention layers take the whole prompt in one call, so that a cache may compress it after exact attention.
fn spans(batch: usize, count: usize, whole: bool) -> Vec<(Range<usize>, Range<usize>)> {
    if whole || count == 1 {
        return vec![(0..batch, 0..count)];
    }
    let blocks = move |entry| {
        let block = move |start| (entry..entry + 1, start..count.min(start + BLOCK));
        (0..count).step_by(BLOCK).map(block)
    };
    (0..batch).flat_map(blocks).collect()
}

/// Checks the shape, the dtype and the largest id; gives the batch and the number of tokens.
fn check_tokens(tokens: &Tensor, vocab: usize) -> Result<(usize, usize)> {
    let expected = || format!("u32 [batch, tokens] with at least one token, ids below {vocab}");
    match tokens.dims() {
        &[batch, count] if tokens.dtype() == DType::U32 && batch * count > 0 => {
            let largest = tokens.flatten_all()?.max(0)?.to_scalar::<u32>()?;
            if largest as usize >= vocab {
                return Err(Error::mismatch("tokens", expected(), format!("the id {largest}")));
            }
            Ok((batch, count))
        }
        dims => {
            let got = format!("{} {dims:?}", tokens.dtype().as_str());
            Err(Error::mismatch("tokens", expected(), got))
        }
    }
}
