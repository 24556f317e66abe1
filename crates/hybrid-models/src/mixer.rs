//! The mixer interface: the function of a layer on its normalised input.

use std::fmt::Debug;

use crate::attention::Attention;
use crate::norm::Norm;
use crate::workspace::Workspace;
#[cfg(feature = "cuda")]
use longctx_core::Result;

/// The input rows of a mixer, `[tokens, width]`: the concatenated tokens of some sequences.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    pub x: &'a [f32],
    /// The tokens of each sequence, in the order of the rows. Together they cover all rows.
    pub spans: &'a [Span],
}

/// Tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Row of the first token.
    pub row: usize,
    pub tokens: usize,
    /// Number of earlier tokens of the sequence.
    pub position: usize,
}

impl Input<'_> {
    pub fn rows(&self) -> usize {
        self.spans.iter().map(|span| span.tokens).sum()
    }
}

/// One array of a mixer's state, for one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct StateArray {
    pub name: &'static str,
    pub shape: Vec<usize>,
    /// The initial value of its elements.
    pub start: f32,
    /// If set, the rows of the matrix are stored in the host's memory in blocks of this many (the
    /// last may be smaller), each transposed.
    pub block: Option<usize>,
}

impl StateArray {
    pub fn new(name: &'static str, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec(), start: 0.0, block: None }
    }

    pub fn in_blocks(name: &'static str, shape: [usize; 2], block: usize) -> Self {
        Self { block: Some(block), ..Self::new(name, &shape) }
    }

    pub fn size(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the shape with a batch dimension, `[1, …]`.
    #[cfg(feature = "cuda")]
    pub fn shape_of_one(&self) -> Vec<usize> {
        [&[1], self.shape.as_slice()].concat()
    }

    /// Appends a sequence's elements in the order of the host's memory.
    pub fn append_host_layout(&self, numbers: &[f32], into: &mut Vec<f32>) {
        match self.block {
            Some(block) => into.extend(transposed(numbers, block, self.shape[1])),
            None => into.extend(numbers),
        }
    }

    /// Appends a sequence's elements, given in the order of the host's memory, row by row.
    pub fn read_host_layout(&self, host_layout: &[f32], into: &mut Vec<f32>) {
        let Some(block) = self.block else { return into.extend(host_layout) };
        for block in host_layout.chunks(block * self.shape[1]) {
            let rows = block.len() / self.shape[1];
            into.extend(transposed(block, self.shape[1], rows));
        }
    }
}

/// Iterates over a matrix with `columns` columns in blocks of `block` rows, each transposed.
pub fn transposed(x: &[f32], block: usize, columns: usize) -> impl Iterator<Item = f32> + '_ {
    x.chunks(block * columns).flat_map(move |block| {
        let rows = block.len() / columns;
        (0..block.len()).map(move |i| block[i % rows * columns + i / rows])
    })
}

/// A mixer with a state of fixed size. A feed-forward layer has an empty state.
pub trait Recurrent: Debug + Send + Sync {
    /// Returns the arrays of the state, in order.
    fn state(&self) -> Vec<StateArray>;

    /// Returns the number of elements of a sequence's state.
    fn state_size(&self) -> usize {
        self.state().iter().map(StateArray::size).sum()
    }

    /// Reads `x` and the sequences' states, updates each state to that after its sequence's last
    /// token, and writes `out` `[tokens, hidden]`.
    fn forward(
        &self,
        x: Input<'_>,
        states: &mut [&mut [f32]],
        workspace: &mut Workspace,
        out: &mut [f32],
    );

    /// Returns the same mixer with its weights on a device, with the same arrays of state.
    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>>;
}

/// A residual layer `x + mixer(norm(x))`.
#[derive(Debug)]
pub struct ResidualBlock {
    /// Index of the model's layer that it belongs to.
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
