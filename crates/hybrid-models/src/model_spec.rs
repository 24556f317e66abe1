//! The structure of a model without its weights.

use crate::mixer::StateArray;
use longctx_core::LayerSpec;

/// The sizes of a model, and the state of each block.
#[derive(Debug)]
pub struct ModelSpec {
    pub family: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub vocab: usize,
    /// End-of-text tokens.
    pub eos: Vec<u32>,
    pub blocks: Vec<Block>,
}

/// A residual layer.
#[derive(Debug)]
pub struct Block {
    /// Its full name, for saved states.
    pub name: String,
    pub state: BlockState,
}

/// The memory of a residual layer.
#[derive(Debug)]
pub enum BlockState {
    /// Arrays of fixed size.
    Recurrent(Vec<StateArray>),
    /// Keys and values, in a cache chosen by the caller.
    Cache(LayerSpec),
}

impl ModelSpec {
    /// Returns the layers with caches.
    pub fn caches(&self) -> impl Iterator<Item = &LayerSpec> {
        self.blocks.iter().filter_map(|block| match &block.state {
            BlockState::Cache(spec) => Some(spec),
            BlockState::Recurrent(_) => None,
        })
    }

    /// Returns the arrays of a sequence's state in order, each with the name of its block.
    pub fn arrays(&self) -> impl Iterator<Item = (&str, &StateArray)> {
        self.blocks.iter().flat_map(|block| {
            let arrays = match &block.state {
                BlockState::Recurrent(arrays) => arrays.as_slice(),
                BlockState::Cache(_) => &[],
            };
            arrays.iter().map(|array| (block.name.as_str(), array))
        })
    }

    /// Returns the number of elements of a sequence's state over all blocks.
    pub fn state_size(&self) -> usize {
        self.arrays().map(|(_, array)| array.size()).sum()
    }
}
