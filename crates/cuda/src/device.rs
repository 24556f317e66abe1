//! Properties of a device.

use cudarc::driver::result::{device, mem_pool};
use cudarc::driver::sys::CUdevice_attribute::{self, *};
use cudarc::driver::sys::CUmemPool_attribute;
use cudarc::driver::{CudaContext, DriverError};

fn attribute(context: &CudaContext, which: CUdevice_attribute) -> Result<u32, DriverError> {
    Ok(context.attribute(which)?.max(0) as u32)
}

/// Returns the compute capability: major and minor version.
///
/// # Errors
/// Errors of the driver.
pub fn compute_capability(context: &CudaContext) -> Result<(u32, u32), DriverError> {
    let major = attribute(context, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok((major, attribute(context, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?))
}

/// Returns the number of multiprocessors.
///
/// # Errors
/// Errors of the driver.
pub fn multiprocessors(context: &CudaContext) -> Result<usize, DriverError> {
    Ok(attribute(context, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize)
}

/// Returns the largest number of bytes of shared memory per thread block.
///
/// # Errors
/// Errors of the driver.
pub fn max_shared_bytes(context: &CudaContext) -> Result<u32, DriverError> {
    attribute(context, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
}

/// Makes the device's memory pool keep freed memory for later allocations of this process.
///
/// By default the pool returns free memory to the system whenever the process synchronizes with the
/// device, and maps it again later. This takes a millisecond for the activations of a layer's
/// prefill.
///
/// # Errors
/// Errors of the driver.
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
