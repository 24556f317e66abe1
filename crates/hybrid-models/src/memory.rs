//! What a residual block of a session remembers.

use crate::mixer::Part;
use crate::state::State;
use candle_core::Device;
use longctx_core::{Footprint, KvCache, Result};

pub enum Memory {
    /// A state before the first tokens.
    Empty,
    /// `[batch, size]`: an entry's arrays one after the other.
    State(Vec<f32>),
    /// One tensor `[batch, …]` for each array.
    #[cfg(feature = "cuda")]
    OnDevice(Vec<candle_core::Tensor>),
    Cache(Box<dyn KvCache>),
}

impl Memory {
    /// The state of `parts` before the first tokens.
    pub fn start(parts: &[Part], batch: usize, device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let array = |part: &Part| {
                let shape = [&[batch], part.shape.as_slice()].concat();
                candle_core::Tensor::full(part.start, shape, device)
            };
            return Ok(Self::OnDevice(parts.iter().map(array).collect::<Result<_, _>>()?));
        }
        let _ = device;
        let entry = parts.iter().flat_map(|part| std::iter::repeat_n(part.start, part.size()));
        let entry: Vec<f32> = entry.collect();
        Ok(Self::State(entry.repeat(batch)))
    }

    /// The state of `parts` that a value holds under the name of the block.
    pub fn load(state: &State, name: &str, parts: &[Part], device: &Device) -> Result<Self> {
        let arrays =
            parts.iter().map(|part| state.array(name, part)).collect::<Result<Vec<_>>>()?;
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let array = |(part, numbers): (&Part, &[f32])| {
                let shape = [&[state.batch()], part.shape.as_slice()].concat();
                candle_core::Tensor::from_slice(numbers, shape, device)
            };
            let arrays = parts.iter().zip(arrays).map(array).collect::<Result<_, _>>()?;
            return Ok(Self::OnDevice(arrays));
        }
        let _ = device;
        let mut data = Vec::new();
        for entry in 0..state.batch() {
            for (part, numbers) in parts.iter().zip(&arrays) {
                part.lay_out(&numbers[entry * part.size()..][..part.size()], &mut data);
            }
        }
        Ok(Self::State(data))
    }

    /// Puts a state of `parts` into a value; a cache is the caller's.
    pub fn save(&self, state: &mut State, name: &str, parts: &[Part]) -> Result<()> {
        match self {
            Self::Cache(_) => {}
            Self::Empty => parts.iter().for_each(|part| state.insert(name, part, Vec::new())),
            Self::State(data) => {
                let size: usize = parts.iter().map(Part::size).sum();
                let mut start = 0;
                for part in parts {
                    let mut numbers = Vec::with_capacity(state.batch() * part.size());
                    for entry in data.chunks_exact(size.max(1)) {
                        part.read(&entry[start..start + part.size()], &mut numbers);
                    }
                    state.insert(name, part, numbers);
                    start += part.size();
                }
            }
            #[cfg(feature = "cuda")]
            Self::OnDevice(arrays) => {
                for (part, array) in parts.iter().zip(arrays) {
                    state.insert(name, part, array.flatten_all()?.to_vec1()?);
                }
            }
        }
        Ok(())
    }

    /// Forgets all.
    pub fn reset(&mut self) {
        match self {
            Self::Cache(cache) => cache.reset(),
            state => *state = Self::Empty,
        }
    }

    /// Bytes held.
    pub fn footprint(&self) -> Footprint {
        let payload = |numbers: usize| Footprint {
            payload: numbers * size_of::<f32>(),
            ..Default::default()
        };
        match self {
            Self::Empty => Footprint::default(),
            Self::State(data) => payload(data.len()),
            #[cfg(feature = "cuda")]
            Self::OnDevice(arrays) => payload(arrays.iter().map(|array| array.elem_count()).sum()),
            Self::Cache(cache) => cache.footprint(),
        }
    }
}
