//! Several lists in one copy to the device.
#![allow(unsafe_code)]

use std::sync::Arc;

use crate::staging;
use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, DriverError};

/// Lists that are copied to a device together, because each copy has a cost of its own.
#[derive(Debug, Default)]
pub struct Upload {
    words: Vec<u64>,
}

impl Upload {
    /// Adds a list. Returns its offset in bytes from the start of the copy, a multiple of 8.
    ///
    /// The elements are numbers or [`args!`](crate::args) structs of at most 8 bytes' alignment.
    pub fn push<T: DeviceRepr + Copy>(&mut self, list: &[T]) -> u64 {
        const { assert!(align_of::<T>() <= 8) };
        let (first, bytes) = (self.words.len(), size_of_val(list));
        self.words.resize(first + bytes.div_ceil(8), 0);
        // SAFETY: the words from `first` on have room for the bytes, and the two do not overlap.
        unsafe {
            let to = self.words.as_mut_ptr().add(first).cast::<u8>();
            std::ptr::copy_nonoverlapping(list.as_ptr().cast::<u8>(), to, bytes);
        }
        8 * first as u64
    }

    /// Copies the lists, without waiting for the stream's work. Returns `None` if all are empty.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn copy(&self, stream: &Arc<CudaStream>) -> Result<Option<CudaSlice<u64>>, DriverError> {
        match self.words.is_empty() {
            true => Ok(None),
            false => staging::copy(stream, &self.words).map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Upload;

    #[test]
    fn lists_follow_each_other_at_multiples_of_eight() {
        let mut upload = Upload::default();
        assert_eq!(upload.push(&[1u32, 2, 3]), 0);
        assert_eq!(upload.push::<u64>(&[]), 16);
        assert_eq!(upload.push(&[7u64, 8]), 16);
        assert_eq!(upload.push(&[1.0f32]), 32);
        let low = u64::from(1.0f32.to_bits());
        assert_eq!(upload.words, [1 | 2 << 32, 3, 7, 8, low]);
    }
}
