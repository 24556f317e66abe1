//! Reusable buffers, so that a decode step allocates nothing.

/// A pool of buffers.
#[derive(Debug, Default)]
pub struct Workspace {
    free: Vec<Vec<f32>>,
    /// RWKV-7's values of the first layer for the current rows, which later layers mix in.
    pub first_values: Vec<f32>,
}

impl Workspace {
    /// Returns a buffer of `len` numbers with undefined contents.
    pub fn acquire(&mut self, len: usize) -> Vec<f32> {
        let mut buffer = self.free.pop().unwrap_or_default();
        buffer.resize(len, 0.0);
        buffer
    }

    /// Returns a buffer to the pool. If layers return buffers in reverse order, the next pass finds
    /// buffers of the right size.
    pub fn release(&mut self, buffer: Vec<f32>) {
        self.free.push(buffer);
    }
}
