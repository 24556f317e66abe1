//! What there is to know of a model without its weights.

use crate::mixer::Part;
use longctx_core::LayerSpec;

/// Sizes, and what each block remembers.
#[derive(Debug)]
pub struct Outline {
    pub family: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub vocab: usize,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
    pub blocks: Vec<Block>,
}

/// A residual block.
#[derive(Debug)]
pub struct Block {
    /// Its full name, for saved states.
    pub name: String,
    pub kept: Kept,
}

/// What a residual block remembers.
#[derive(Debug)]
pub enum Kept {
    /// Arrays of fixed size.
    State(Vec<Part>),
    /// Keys and values, in a cache of the caller's choice.
    Cache(LayerSpec),
}

impl Outline {
    /// The layers that remember through caches.
    pub fn caches(&self) -> impl Iterator<Item = &LayerSpec> {
        self.blocks.iter().filter_map(|block| match &block.kept {
            Kept::Cache(spec) => Some(spec),
            Kept::State(_) => None,
        })
    }

    /// The arrays of a sequence's state, in the order in which they lie, each with its block's name.
    pub fn parts(&self) -> impl Iterator<Item = (&str, &Part)> {
        self.blocks.iter().flat_map(|block| {
            let parts = match &block.kept {
                Kept::State(parts) => parts.as_slice(),
                Kept::Cache(_) => &[],
            };
            parts.iter().map(|part| (block.name.as_str(), part))
        })
    }

    /// Numbers of a sequence's state, of all blocks.
    pub fn state_size(&self) -> usize {
        self.parts().map(|(_, part)| part.size()).sum()
    }
}
