//! Bytes held, beside those of f16.

use base_models::Pretrained;
use longctx_core::{CausalLm, SeqId};

pub struct Size {
    /// Keys' and values' numbers.
    numbers: usize,
    /// Bytes of everything that the sequences hold. Not what a pool has set aside for later.
    bytes: usize,
}

impl Size {
    /// Of sequences that hold `len` tokens each, or a window of them.
    pub fn new(llm: &Pretrained, session: &dyn CausalLm, seqs: &[SeqId], len: usize) -> Self {
        let c = llm.model.config();
        let window = |layer| c.windows.get(layer).copied().flatten().unwrap_or(usize::MAX);
        let tokens: usize = (0..c.layers).map(|layer| window(layer).min(len)).sum();
        let numbers = 2 * c.kv_heads * c.head_dim * tokens * seqs.len();
        let bytes = seqs.iter().map(|&seq| session.seq_footprint(seq).total()).sum();
        Self { numbers, bytes }
    }

    pub fn bits_a_number(&self) -> f64 {
        8.0 * self.bytes as f64 / self.numbers as f64
    }

    /// Bytes in f16 over bytes held.
    pub fn compression(&self) -> f64 {
        16.0 / self.bits_a_number()
    }
}
