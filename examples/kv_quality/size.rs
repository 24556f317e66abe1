//! Bytes held, beside those of f16.

use base_models::Pretrained;

pub struct Size {
    /// Keys' and values' numbers.
    numbers: usize,
    /// Bytes of everything that is held.
    bytes: usize,
}

impl Size {
    pub fn new(llm: &Pretrained, tokens: usize, bytes: usize) -> Self {
        let c = llm.model.config();
        Self { numbers: 2 * c.layers * c.kv_heads * c.head_dim * tokens, bytes }
    }

    pub fn bits_a_number(&self) -> f64 {
        8.0 * self.bytes as f64 / self.numbers as f64
    }

    /// Bytes in f16 over bytes held.
    pub fn compression(&self) -> f64 {
        16.0 / self.bits_a_number()
    }
}
