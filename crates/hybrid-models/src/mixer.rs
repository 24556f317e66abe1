//! What a layer does with its normalised input.

use std::fmt::Debug;

use crate::attention::Attention;
use crate::norm::Norm;
use crate::workspace::Workspace;

/// Rows that a mixer reads: `[batch, tokens, width]`.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub x: &'a [f32],
    pub batch: usize,
    pub tokens: usize,
}

impl Input<'_> {
    pub fn rows(&self) -> usize {
        self.batch * self.tokens
    }
}

/// One array of a mixer's state, of one batch entry.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    pub name: &'static str,
    pub shape: Vec<usize>,
    /// What it holds before the first token.
    pub start: f32,
}

impl Part {
    pub fn new(name: &'static str, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec(), start: 0.0 }
    }

    pub fn size(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A mixer whose memory of the tokens before is a state of fixed size; a feed-forward block is one without any.
pub trait Recurrent: Debug + Send + Sync {
    /// The arrays of the state, in the order in which they lie in it.
    fn state(&self) -> Vec<Part>;

    /// Reads `x` and the state `[batch, size]`, leaves the state after the last token and writes `out` `[batch, tokens, hidden]`.
    fn forward(&self, x: Input<'_>, state: &mut [f32], workspace: &mut Workspace, out: &mut [f32]);
}

/// `x + mixer(norm(x))`.
#[derive(Debug)]
pub struct Residual {
    /// Which layer of the model it belongs to.
    pub layer: usize,
    /// Its name in that layer, for saved states.
    pub name: &'static str,
    pub norm: Norm,
    pub mixer: Mixer,
}

#[derive(Debug)]
pub enum Mixer {
    Recurrent(Box<dyn Recurrent>),
    Attention(Attention),
}
