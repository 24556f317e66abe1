//! What a device can do.

use cudarc::driver::sys::CUdevice_attribute::{self, *};
use cudarc::driver::{CudaContext, DriverError};

fn attribute(context: &CudaContext, which: CUdevice_attribute) -> Result<u32, DriverError> {
    Ok(context.attribute(which)?.max(0) as u32)
}

/// Major and minor.
///
/// # Errors
/// The driver's.
pub fn compute_capability(context: &CudaContext) -> Result<(u32, u32), DriverError> {
    let major = attribute(context, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok((major, attribute(context, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?))
}

/// Multiprocessors of the device.
///
/// # Errors
/// The driver's.
pub fn multiprocessors(context: &CudaContext) -> Result<usize, DriverError> {
    Ok(attribute(context, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize)
}

/// The most bytes of shared memory that a block may have.
///
/// # Errors
/// The driver's.
pub fn most_shared_bytes(context: &CudaContext) -> Result<u32, DriverError> {
    attribute(context, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
}
