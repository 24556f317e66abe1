//! A loaded kernel and its launches.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC;
use cudarc::driver::{
    CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
};

/// A kernel, for blocks of one size.
#[derive(Debug, Clone)]
pub struct Kernel {
    function: CudaFunction,
    threads: u32,
    shared_bytes: u32,
}

impl Kernel {
    pub(crate) fn new(
        function: CudaFunction,
        threads: u32,
        shared_bytes: u32,
    ) -> Result<Self, DriverError> {
        // The function is one for all sizes of block: its limit only grows.
        if function.get_attribute(DYNAMIC)? < shared_bytes as i32 {
            function.set_attribute(DYNAMIC, shared_bytes as i32)?;
        }
        Ok(Self { function, threads, shared_bytes })
    }

    pub(crate) fn is(&self, threads: u32, shared_bytes: u32) -> bool {
        (self.threads, self.shared_bytes) == (threads, shared_bytes)
    }

    /// Blocks that a multiprocessor runs at a time.
    ///
    /// # Errors
    /// The driver's.
    pub fn blocks_per_multiprocessor(&self) -> Result<usize, DriverError> {
        let (threads, shared) = (self.threads, self.shared_bytes as usize);
        let blocks =
            self.function.occupancy_max_active_blocks_per_multiprocessor(threads, shared, None)?;
        Ok(blocks as usize)
    }

    /// Launches it over a grid of blocks. A grid without blocks does nothing.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `args` must be the struct that the kernel takes, and right for the grid. Its addresses must
    /// be those of arrays on the stream's device, of the sizes that the kernel documents, until the
    /// launched work has ended.
    pub unsafe fn launch<A: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        grid: [usize; 3],
        args: &A,
    ) -> Result<(), DriverError> {
        // SAFETY: the caller's.
        unsafe { self.launch_with::<A, A>(stream, grid, args, &[]) }
    }

    /// [`launch`](Self::launch) of a kernel that takes more parameters after its struct.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for `launch`, with `more` the other parameters that the kernel takes.
    pub unsafe fn launch_with<A: DeviceRepr, B: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        grid: [usize; 3],
        args: &A,
        more: &[B],
    ) -> Result<(), DriverError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let config = LaunchConfig {
            grid_dim: grid.map(|blocks| blocks as u32).into(),
            block_dim: (self.threads, 1, 1),
            shared_mem_bytes: self.shared_bytes,
        };
        let mut launch = stream.launch_builder(&self.function);
        launch.arg(args);
        for arg in more {
            launch.arg(arg);
        }
        // SAFETY: the caller's.
        unsafe { launch.launch(config) }?;
        Ok(())
    }
}
