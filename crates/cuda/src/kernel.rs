//! A loaded kernel and its launches.
#![allow(unsafe_code)]

use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC;
use cudarc::driver::{
    CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
};

/// A kernel for thread blocks of a fixed size.
#[derive(Debug, Clone)]
pub struct Kernel {
    function: CudaFunction,
    threads: u32,
    shared_bytes: u32,
    blocks_per_multiprocessor: Arc<OnceLock<usize>>,
}

impl Kernel {
    pub(crate) fn new(
        function: CudaFunction,
        threads: u32,
        shared_bytes: u32,
    ) -> Result<Self, DriverError> {
        // All block sizes share one function, so the limit is only raised.
        if function.get_attribute(DYNAMIC)? < shared_bytes as i32 {
            function.set_attribute(DYNAMIC, shared_bytes as i32)?;
        }
        Ok(Self { function, threads, shared_bytes, blocks_per_multiprocessor: Arc::default() })
    }

    pub(crate) fn is(&self, threads: u32, shared_bytes: u32) -> bool {
        (self.threads, self.shared_bytes) == (threads, shared_bytes)
    }

    /// Returns the number of thread blocks that a multiprocessor runs concurrently. Only the first
    /// call asks the driver.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn blocks_per_multiprocessor(&self) -> Result<usize, DriverError> {
        if let Some(&blocks) = self.blocks_per_multiprocessor.get() {
            return Ok(blocks);
        }
        let (threads, shared) = (self.threads, self.shared_bytes as usize);
        let blocks =
            self.function.occupancy_max_active_blocks_per_multiprocessor(threads, shared, None)?;
        Ok(*self.blocks_per_multiprocessor.get_or_init(|| blocks as usize))
    }

    /// Launches the kernel over a grid of thread blocks. An empty grid does nothing.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Safety
    /// `args` must be the kernel's argument struct, with values that match the grid. Its addresses
    /// must be those of arrays on the stream's device, of the sizes that the kernel documents,
    /// until the launched work has finished.
    pub unsafe fn launch<A: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        grid: [usize; 3],
        args: &A,
    ) -> Result<(), DriverError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.launch_with::<A, A>(stream, grid, args, &[]) }
    }

    /// Like [`launch`](Self::launch), for a kernel with more parameters after its struct.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Safety
    /// As [`launch`](Self::launch); `more` must be the kernel's further parameters.
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
        let mut launch = stream.launch_builder(&self.function);
        launch.arg(args);
        for arg in more {
            launch.arg(arg);
        }
        // SAFETY: guaranteed by the caller.
        unsafe { launch.launch(self.config(grid)) }?;
        Ok(())
    }

    /// Like [`launch`](Self::launch), for a kernel whose thread blocks wait for each other: all run
    /// at the same time.
    ///
    /// # Errors
    /// Errors of the driver, also if the device cannot run all thread blocks at the same time.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub unsafe fn launch_cooperative<A: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        grid: [usize; 3],
        args: &A,
    ) -> Result<(), DriverError> {
        let mut launch = stream.launch_builder(&self.function);
        launch.arg(args);
        // SAFETY: guaranteed by the caller.
        unsafe { launch.launch_cooperative(self.config(grid)) }?;
        Ok(())
    }

    fn config(&self, grid: [usize; 3]) -> LaunchConfig {
        LaunchConfig {
            grid_dim: grid.map(|blocks| blocks as u32).into(),
            block_dim: (self.threads, 1, 1),
            shared_mem_bytes: self.shared_bytes,
        }
    }
}
