//! A model at work.

use crate::memory::Memory;
use crate::model::{Model, Weights};
use crate::outline::{Block, Kept};
use crate::state::State;
use crate::workspace::Workspace;
use candle_core::{DType, Device, Tensor};
use longctx_core::{CausalLm, Error, Footprint, Logits, Result};

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
        for (block, memory) in self.model.outline.blocks.iter().zip(&self.memories) {
            if let Kept::State(parts) = &block.kept {
                memory.save(&mut state, &block.name, parts)?;
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
        let device = self.model.device();
        let load = |block: &Block| match &block.kept {
            Kept::State(parts) => Memory::load(state, &block.name, parts, device),
            Kept::Cache(_) => unreachable!("attention is refused"),
        };
        let memories = self.model.outline.blocks.iter().map(load).collect::<Result<_>>()?;
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
        for (block, memory) in self.model.outline.blocks.iter().zip(&mut self.memories) {
            if let Kept::State(parts) = &block.kept {
                *memory = Memory::start(parts, batch, self.model.device())?;
            }
        }
        Ok(())
    }
}

impl CausalLm for Session {
    fn forward(&mut self, tokens: &Tensor, logits: Logits) -> Result<Tensor> {
        let (ids, batch) = ids(tokens, self.vocab_size())?;
        self.start(batch)?;
        let count = ids.len() / batch;
        let wanted = match logits {
            Logits::Last => 1,
            Logits::All => count,
        };
        let (seen, memories) = (self.seen, &mut self.memories);
        let logits = match &self.model.weights {
            Weights::Host(model) => {
                let workspace = &mut self.workspace;
                let logits = model.forward(&ids, batch, wanted, seen, memories, workspace)?;
                Tensor::from_vec(logits, (batch, wanted, self.vocab_size()), &Device::Cpu)?
            }
            #[cfg(feature = "cuda")]
            Weights::Cuda(model) => model.forward(&ids, batch, wanted, seen, memories)?,
        };
        self.seen += count;
        Ok(logits)
    }

    fn reset(&mut self) {
        self.memories.iter_mut().for_each(Memory::reset);
        self.batch = None;
        self.seen = 0;
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn footprint(&self) -> Footprint {
        self.memories.iter().map(Memory::footprint).sum()
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
        self.model.device()
    }
}

/// The ids of `tokens`, row by row, and the batch, if shape, dtype and ids are right.
fn ids(tokens: &Tensor, vocab: usize) -> Result<(Vec<u32>, usize)> {
    let mismatch = |got: String| {
        let expected = format!("u32 [batch, tokens] with at least one token, ids below {vocab}");
        Error::mismatch("tokens", expected, got)
    };
    match tokens.dims() {
        &[batch, count] if tokens.dtype() == DType::U32 && batch * count > 0 => {
            let ids: Vec<u32> = tokens.flatten_all()?.to_vec1()?;
            match ids.iter().find(|&&id| id as usize >= vocab) {
                Some(id) => Err(mismatch(format!("the id {id}"))),
                None => Ok((ids, batch)),
            }
        }
        dims => Err(mismatch(format!("{} {dims:?}", tokens.dtype().as_str()))),
    }
}
