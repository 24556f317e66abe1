//! What there is to know of a model without its weights.

use crate::mixer::Part;
use longctx_core::AttentionShape;

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
    /// Which layer of the model it belongs to.
    pub layer: usize,
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
    Cache(AttentionShape),
}

impl Outline {
    pub fn has_attention(&self) -> bool {
        self.blocks.iter().any(|block| matches!(block.kept, Kept::Cache(_)))
    }
}
