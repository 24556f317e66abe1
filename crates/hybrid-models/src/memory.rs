//! The recurrent states of sequences.

use std::collections::BTreeMap;

use crate::outline::Outline;
use crate::state::State;
use candle_core::Device;
use longctx_core::{Error, Result, SeqId};

/// The recurrent state of one sequence: the arrays of all blocks.
pub enum Memory {
    /// All arrays, concatenated.
    Host(Vec<f32>),
    /// One tensor `[1, …]` for each array.
    #[cfg(feature = "cuda")]
    OnDevice(Vec<candle_core::Tensor>),
}

impl Memory {
    /// Returns the state before the first token.
    pub fn start(outline: &Outline, device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let array = |(_, part): (_, &crate::mixer::Part)| {
                candle_core::Tensor::full(part.start, part.shape_of_one(), device)
            };
            return Ok(Self::OnDevice(outline.parts().map(array).collect::<Result<_, _>>()?));
        }
        let _ = device;
        let array =
            |(_, part): (_, &crate::mixer::Part)| std::iter::repeat_n(part.start, part.size());
        Ok(Self::Host(outline.parts().flat_map(array).collect()))
    }

    /// Returns the arrays of a state on the host.
    pub fn into_host(self) -> Vec<f32> {
        match self {
            Self::Host(arrays) => arrays,
            #[cfg(feature = "cuda")]
            Self::OnDevice(_) => unreachable!("a model on the host keeps its states there"),
        }
    }

    /// Loads a saved state.
    pub fn load(state: &State, outline: &Outline, device: &Device) -> Result<Self> {
        let arrays = outline.parts().map(|(block, part)| Ok((part, state.array(block, part)?)));
        let arrays = arrays.collect::<Result<Vec<_>>>()?;
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let tensors = arrays.into_iter().map(|(part, numbers)| {
                candle_core::Tensor::from_slice(numbers, part.shape_of_one(), device)
            });
            return Ok(Self::OnDevice(tensors.collect::<Result<_, _>>()?));
        }
        let _ = device;
        let mut data = Vec::new();
        arrays.into_iter().for_each(|(part, numbers)| part.lay_out(numbers, &mut data));
        Ok(Self::Host(data))
    }

    /// Converts the state to a value that can be saved.
    pub fn save(&self, outline: &Outline, seen: usize) -> Result<State> {
        let mut state = State::new(outline.family, seen);
        match self {
            Self::Host(data) => {
                let mut rest = data.as_slice();
                for (block, part) in outline.parts() {
                    let (array, after) = rest.split_at(part.size());
                    let mut numbers = Vec::with_capacity(part.size());
                    part.read(array, &mut numbers);
                    state.insert(block, part, numbers);
                    rest = after;
                }
            }
            #[cfg(feature = "cuda")]
            Self::OnDevice(arrays) => {
                for ((block, part), array) in outline.parts().zip(arrays) {
                    state.insert(block, part, array.flatten_all()?.to_vec1()?);
                }
            }
        }
        Ok(state)
    }
}

/// The recurrent states of all sequences of a session.
pub enum Memories {
    Host(BTreeMap<SeqId, Vec<f32>>),
    #[cfg(feature = "cuda")]
    OnDevice(crate::cuda::Groups),
}

impl Memories {
    pub fn new(device: &Device) -> Self {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Self::OnDevice(crate::cuda::Groups::default());
        }
        let _ = device;
        Self::Host(BTreeMap::new())
    }

    /// Returns a copy of a sequence's state.
    pub fn copy(&self, seq: SeqId) -> Result<Memory> {
        match self {
            Self::Host(states) => {
                states.get(&seq).cloned().map(Memory::Host).ok_or(Error::UnknownSequence(seq))
            }
            #[cfg(feature = "cuda")]
            Self::OnDevice(groups) => groups.copy(seq).map(Memory::OnDevice),
        }
    }

    /// Sets a sequence's state to a copy of the given one.
    pub fn put(&mut self, seq: SeqId, memory: &Memory) -> Result<()> {
        match (self, memory) {
            (Self::Host(states), Memory::Host(state)) => drop(states.insert(seq, state.clone())),
            #[cfg(feature = "cuda")]
            (Self::OnDevice(groups), Memory::OnDevice(arrays)) => groups.put(seq, arrays)?,
            #[cfg(feature = "cuda")]
            _ => unreachable!("all memories of a session are where its model is"),
        }
        Ok(())
    }

    /// Sets the state of a sequence on the host.
    pub fn replace(&mut self, seq: SeqId, state: Vec<f32>) {
        match self {
            Self::Host(states) => drop(states.insert(seq, state)),
            #[cfg(feature = "cuda")]
            Self::OnDevice(_) => unreachable!("the states are on a device"),
        }
    }

    pub fn remove(&mut self, seq: SeqId) {
        match self {
            Self::Host(states) => drop(states.remove(&seq)),
            #[cfg(feature = "cuda")]
            Self::OnDevice(groups) => groups.remove(seq),
        }
    }

    pub fn clear(&mut self) {
        match self {
            Self::Host(states) => states.clear(),
            #[cfg(feature = "cuda")]
            Self::OnDevice(groups) => groups.clear(),
        }
    }
}
