//! Bytes that sequences hold, compared with f16.

use base_models::Pretrained;
use longctx_core::{CausalLm, SeqId};

pub struct Size {
    /// The count of numbers in keys and values.
    numbers: usize,
    /// Bytes of everything that the sequences hold, without a pool's spare memory.
    bytes: usize,
}

impl Size {
    /// Returns the size of sequences that hold `len` tokens each, or a window of them.
    pub fn new(llm: &Pretrained, session: &dyn CausalLm, seqs: &[SeqId], len: usize) -> Self {
        let c = llm.model.config();
        let window = |layer| c.windows.get(layer).copied().flatten().unwrap_or(usize::MAX);
        let tokens: usize = (0..c.layers).map(|layer| window(layer).min(len)).sum();
        let numbers = 2 * c.kv_heads * c.head_dim * tokens * seqs.len();
        let bytes = seqs.iter().map(|&seq| session.seq_footprint(seq).total()).sum();
        Self { numbers, bytes }
    }

    pub fn bits_per_number(&self) -> f64 {
        8.0 * self.bytes as f64 / self.numbers as f64
    }

    /// Returns the bytes in f16 divided by the bytes held.
    pub fn compression(&self) -> f64 {
        16.0 / self.bits_per_number()
    }
}
