//! The structure of a model without its weights.

use crate::mixer::Part;
use longctx_core::LayerSpec;

/// The sizes of a model, and the state of each block.
#[derive(Debug)]
pub struct Outline {
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
    pub kept: Kept,
}

/// The memory of a residual layer.
#[derive(Debug)]
pub enum Kept {
    /// Arrays of fixed size.
    State(Vec<Part>),
    /// Keys and values, in a cache chosen by the caller.
    Cache(LayerSpec),
}

impl Outline {
    /// Returns the layers with caches.
    pub fn caches(&self) -> impl Iterator<Item = &LayerSpec> {
        self.blocks.iter().filter_map(|block| match &block.kept {
            Kept::Cache(spec) => Some(spec),
            Kept::State(_) => None,
        })
    }

    /// Returns the arrays of a sequence's state in order, each with the name of its block.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &Part)> {
        self.blocks.iter().flat_map(|block| {
            let parts = match &block.kept {
                Kept::State(parts) => parts.as_slice(),
                Kept::Cache(_) => &[],
            };
            parts.iter().map(|part| (block.name.as_str(), part))
        })
    }

    /// Returns the number of elements of a sequence's state over all blocks.
    pub fn state_size(&self) -> usize {
        self.parts().map(|(_, part)| part.size()).sum()
    }
}
