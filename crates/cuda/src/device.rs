//! What a device can do.

use cudarc::driver::result::{device, mem_pool};
use cudarc::driver::sys::CUdevice_attribute::{self, *};
use cudarc::driver::sys::CUmemPool_attribute;
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
pub fn max_shared_bytes(context: &CudaContext) -> Result<u32, DriverError> {
    attribute(context, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
}

/// Has the device's memory pool keep what this process frees for its later allocations.
///
/// By default the pool gives all of it back whenever the process waits for the device, and maps it
/// anew afterwards: a millisecond for the activations of a layer's prefill.
///
/// # Errors
/// The driver's.
#[allow(unsafe_code)]
pub fn keep_freed_memory(context: &CudaContext) -> Result<(), DriverError> {
    let mut bytes = u64::MAX;
    let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the context's device exists, its pool lives as long, and the attribute is a u64.
    unsafe {
        let pool = device::get_default_mem_pool(context.cu_device())?;
        mem_pool::set_attribute(pool, threshold, (&raw mut bytes).cast())
    }
}
