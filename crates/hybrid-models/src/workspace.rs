//! Buffers that are used again, so that a decode step allocates nothing.

/// Buffers that layers borrow and give back.
#[derive(Debug, Default)]
pub struct Workspace {
    free: Vec<Vec<f32>>,
    /// RWKV-7's values of the first layer, which the layers above mix in, for the rows that are on their way through the layers.
    pub first_values: Vec<f32>,
}

impl Workspace {
    /// A buffer of `len` numbers, whatever they are.
    pub fn take(&mut self, len: usize) -> Vec<f32> {
        let mut buffer = self.free.pop().unwrap_or_default();
        buffer.resize(len, 0.0);
        buffer
    }

    /// Takes a buffer back. Layers that give back in the reverse order find a buffer of the right size the next time.
    pub fn give(&mut self, buffer: Vec<f32>) {
        self.free.push(buffer);
    }
}
