//! The recurrent states of sequences.

use std::collections::BTreeMap;

use crate::model_spec::ModelSpec;
use crate::state::State;
use candle_core::Device;
use longctx_core::{Error, Result, SeqId};

/// The recurrent state of one sequence: the arrays of all blocks. Tensors of a clone share memory.
#[derive(Clone)]
pub enum RecurrentState {
    /// All arrays, concatenated.
    Host(Vec<f32>),
    /// One tensor `[1, …]` for each array.
    #[cfg(feature = "cuda")]
    OnDevice(Vec<candle_core::Tensor>),
}

impl RecurrentState {
    /// Returns the state before the first token.
    pub fn start(spec: &ModelSpec, device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let array = |(_, part): (_, &crate::mixer::StateArray)| {
                candle_core::Tensor::full(part.start, part.shape_of_one(), device)
            };
            return Ok(Self::OnDevice(spec.arrays().map(array).collect::<Result<_, _>>()?));
        }
        let _ = device;
        let array = |(_, part): (_, &crate::mixer::StateArray)| {
            std::iter::repeat_n(part.start, part.size())
        };
        Ok(Self::Host(spec.arrays().flat_map(array).collect()))
    }

    /// Returns the arrays of a state on the host.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a state on a device.
    pub fn into_host(self) -> Result<Vec<f32>> {
        match self {
            Self::Host(arrays) => Ok(arrays),
            #[cfg(feature = "cuda")]
            Self::OnDevice(_) => Err(other_place()),
        }
    }

    /// Loads a saved state.
    pub fn load(state: &State, spec: &ModelSpec, device: &Device) -> Result<Self> {
        let arrays = spec.arrays().map(|(block, part)| Ok((part, state.array(block, part)?)));
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
        arrays.into_iter().for_each(|(part, numbers)| part.append_host_layout(numbers, &mut data));
        Ok(Self::Host(data))
    }

    /// Converts the state to a value that can be saved.
    pub fn save(&self, spec: &ModelSpec, seen: usize) -> Result<State> {
        let mut state = State::new(spec.family, seen);
        match self {
            Self::Host(data) => {
                let mut rest = data.as_slice();
                for (block, part) in spec.arrays() {
                    let (array, after) = rest.split_at(part.size());
                    let mut numbers = Vec::with_capacity(part.size());
                    part.read_host_layout(array, &mut numbers);
                    state.insert(block, part, numbers);
                    rest = after;
                }
            }
            #[cfg(feature = "cuda")]
            Self::OnDevice(arrays) => {
                for ((block, part), array) in spec.arrays().zip(arrays) {
                    state.insert(block, part, array.flatten_all()?.to_vec1()?);
                }
            }
        }
        Ok(state)
    }
}

/// The recurrent states of all sequences of a session.
pub enum SequenceStates {
    Host(BTreeMap<SeqId, Vec<f32>>),
    #[cfg(feature = "cuda")]
    OnDevice(crate::cuda::StatePool),
}

impl SequenceStates {
    pub fn new(device: &Device) -> Self {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            return Self::OnDevice(crate::cuda::StatePool::default());
        }
        let _ = device;
        Self::Host(BTreeMap::new())
    }

    /// Returns a copy of a sequence's state.
    pub fn copy(&self, seq: SeqId) -> Result<RecurrentState> {
        match self {
            Self::Host(states) => states
                .get(&seq)
                .cloned()
                .map(RecurrentState::Host)
                .ok_or(Error::UnknownSequence(seq)),
            #[cfg(feature = "cuda")]
            Self::OnDevice(pool) => pool.copy(seq).map(RecurrentState::OnDevice),
        }
    }

    /// Returns the states on a device.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for states on the host.
    #[cfg(feature = "cuda")]
    pub fn on_device(&mut self) -> Result<&mut crate::cuda::StatePool> {
        match self {
            Self::Host(_) => Err(other_place()),
            Self::OnDevice(pool) => Ok(pool),
        }
    }

    /// Sets a sequence's state. A state on a device is copied.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for a state in another place.
    pub fn set(&mut self, seq: SeqId, state: RecurrentState) -> Result<()> {
        match (self, state) {
            (Self::Host(states), RecurrentState::Host(state)) => drop(states.insert(seq, state)),
            #[cfg(feature = "cuda")]
            (Self::OnDevice(pool), RecurrentState::OnDevice(arrays)) => pool.set(seq, &arrays)?,
            #[cfg(feature = "cuda")]
            _ => return Err(other_place()),
        }
        Ok(())
    }

    pub fn remove(&mut self, seq: SeqId) {
        match self {
            Self::Host(states) => drop(states.remove(&seq)),
            #[cfg(feature = "cuda")]
            Self::OnDevice(pool) => pool.remove(seq),
        }
    }

    pub fn clear(&mut self) {
        match self {
            Self::Host(states) => states.clear(),
            #[cfg(feature = "cuda")]
            Self::OnDevice(pool) => pool.clear(),
        }
    }
}

#[cfg(feature = "cuda")]
fn other_place() -> Error {
    Error::mismatch("device of a state", "that of the model", "another")
}
