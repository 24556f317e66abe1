//! Copies of lists to the device.
#![allow(unsafe_code)]

use std::sync::Arc;

use crate::staging;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError};

/// Lists on a device, in memory of the stream's pool.
#[derive(Debug)]
pub struct Uploaded {
    /// `None` if there are no bytes.
    bytes: Option<CudaSlice<u8>>,
    address: u64,
}

impl Uploaded {
    fn new(stream: &Arc<CudaStream>, bytes: &[u8]) -> Result<Self, DriverError> {
        if bytes.is_empty() {
            return Ok(Self { bytes: None, address: 0 });
        }
        let bytes = staging::copy(stream, bytes)?;
        let address = bytes.device_ptr(stream).0;
        Ok(Self { bytes: Some(bytes), address })
    }

    /// Returns the device address of the first list; 0 if all lists are empty.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Returns the number of bytes.
    pub fn len(&self) -> usize {
        self.bytes.as_ref().map_or(0, CudaSlice::len)
    }

    /// Returns whether all lists are empty.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_none()
    }
}

/// Copies a list to the device, without waiting for the stream's work.
///
/// The elements are numbers or [`args!`](crate::args) structs.
///
/// # Errors
/// Errors of the driver.
pub fn upload<T: DeviceRepr + Copy>(
    stream: &Arc<CudaStream>,
    list: &[T],
) -> Result<Uploaded, DriverError> {
    Uploaded::new(stream, bytes_of(list))
}

/// Lists that are copied to a device together, because each copy has a cost of its own.
#[derive(Debug, Default)]
pub struct Upload {
    bytes: Vec<u8>,
}

impl Upload {
    /// Adds a list. Returns its offset in bytes from the start of the copy, a multiple of 8.
    ///
    /// The elements are numbers or [`args!`](crate::args) structs of at most 8 bytes' alignment.
    pub fn push<T: DeviceRepr + Copy>(&mut self, list: &[T]) -> u64 {
        const { assert!(align_of::<T>() <= 8) };
        let first = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(first, 0);
        self.bytes.extend_from_slice(bytes_of(list));
        first as u64
    }

    /// Copies the lists, without waiting for the stream's work.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn copy(&self, stream: &Arc<CudaStream>) -> Result<Uploaded, DriverError> {
        Uploaded::new(stream, &self.bytes)
    }
}

/// Returns the bytes of a list of numbers or [`args!`](crate::args) structs.
pub fn bytes_of<T: DeviceRepr + Copy>(list: &[T]) -> &[u8] {
    // SAFETY: the elements are numbers or `args!` structs, which have no padding, so all bytes are
    // initialized. The slice borrows the list.
    unsafe { std::slice::from_raw_parts(list.as_ptr().cast(), size_of_val(list)) }
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
        let words = |from: usize| u64::from_ne_bytes(upload.bytes[from..][..8].try_into().unwrap());
        assert_eq!([words(0), words(8), words(16), words(24)], [1 | 2 << 32, 3, 7, 8]);
        assert_eq!(upload.bytes[32..], 1.0f32.to_ne_bytes());
    }
}
