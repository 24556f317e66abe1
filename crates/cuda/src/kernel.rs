//! A loaded kernel and its launches.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC;
use cudarc::driver::sys::CUlaunchAttributeID::{
    CU_LAUNCH_ATTRIBUTE_COOPERATIVE, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
};
use cudarc::driver::{
    CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig, PushKernelArg, sys,
};

/// A kernel for thread blocks of a fixed size.
#[derive(Debug, Clone)]
pub struct Kernel {
    function: CudaFunction,
    threads: u32,
    shared_bytes: u32,
    /// Whether the device has programmatic dependent launches.
    programmatic: bool,
    blocks_per_multiprocessor: Arc<OnceLock<usize>>,
    clusters: Arc<OnceLock<usize>>,
}

impl Kernel {
    pub(crate) fn new(
        function: CudaFunction,
        threads: u32,
        shared_bytes: u32,
        programmatic: bool,
    ) -> Result<Self, DriverError> {
        // All block sizes share one function, so the limit is only raised.
        if function.get_attribute(DYNAMIC)? < shared_bytes as i32 {
            function.set_attribute(DYNAMIC, shared_bytes as i32)?;
        }
        Ok(Self {
            function,
            threads,
            shared_bytes,
            programmatic,
            blocks_per_multiprocessor: Arc::default(),
            clusters: Arc::default(),
        })
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

    /// Returns the number of clusters that the device runs concurrently, for a kernel that is compiled
    /// for clusters of `size` thread blocks. Only the first call asks the driver.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn clusters(&self, stream: &CudaStream, size: usize) -> Result<usize, DriverError> {
        if let Some(&clusters) = self.clusters.get() {
            return Ok(clusters);
        }
        let clusters = self
            .function
            .occupancy_max_active_clusters(self.config([1024 * size, 1, 1]), stream)?;
        Ok(*self.clusters.get_or_init(|| clusters as usize))
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

    /// Like [`launch`](Self::launch), by programmatic dependent launch on compute capability 9.0 or
    /// later: the kernel may start before the kernel before it in the stream has ended.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Safety
    /// As [`launch`](Self::launch). The kernel must wait (`griddepcontrol.wait`) before it reads what
    /// earlier kernels write, and before it writes.
    pub unsafe fn launch_dependent<A: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        grid: [usize; 3],
        args: &A,
    ) -> Result<(), DriverError> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.launch_dependent_with::<A, A>(stream, grid, args, &[]) }
    }

    /// Like [`launch_dependent`](Self::launch_dependent), for a kernel with more parameters after its
    /// struct.
    ///
    /// # Errors
    /// Errors of the driver.
    ///
    /// # Safety
    /// As [`launch_dependent`](Self::launch_dependent); `more` must be the kernel's further parameters.
    pub unsafe fn launch_dependent_with<A: DeviceRepr, B: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        grid: [usize; 3],
        args: &A,
        more: &[B],
    ) -> Result<(), DriverError> {
        let pointer = |arg: *const c_void| arg.cast_mut();
        let mut params = vec![pointer(std::ptr::from_ref(args).cast())];
        params.extend(more.iter().map(|arg| pointer(std::ptr::from_ref(arg).cast())));
        // SAFETY: guaranteed by the caller.
        unsafe { self.launch_extended(stream, grid, &mut params, (true, false)) }
    }

    /// Like [`launch`](Self::launch), for a kernel whose thread blocks wait for each other: all run
    /// at the same time. `dependent`: as [`launch_dependent`](Self::launch_dependent).
    ///
    /// # Errors
    /// Errors of the driver, also if the device cannot run all thread blocks at the same time.
    ///
    /// # Safety
    /// As [`launch`](Self::launch); if `dependent`, as [`launch_dependent`](Self::launch_dependent).
    pub unsafe fn launch_cooperative<A: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        grid: [usize; 3],
        args: &A,
        dependent: bool,
    ) -> Result<(), DriverError> {
        let mut params = [std::ptr::from_ref(args).cast_mut().cast()];
        // SAFETY: guaranteed by the caller.
        unsafe { self.launch_extended(stream, grid, &mut params, (dependent, true)) }
    }

    /// Launches with attributes. `params`: pointers to the kernel's parameters.
    ///
    /// # Safety
    /// As [`launch_dependent`](Self::launch_dependent) and
    /// [`launch_cooperative`](Self::launch_cooperative).
    unsafe fn launch_extended(
        &self,
        stream: &Arc<CudaStream>,
        grid: [usize; 3],
        params: &mut [*mut c_void],
        (dependent, cooperative): (bool, bool),
    ) -> Result<(), DriverError> {
        if grid.contains(&0) {
            return Ok(());
        }
        stream.context().bind_to_thread()?;
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let programmatic =
            sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
        let together = sys::CUlaunchAttributeValue { cooperative: 1 };
        let known = [
            (
                dependent && self.programmatic,
                attribute(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, programmatic),
            ),
            (cooperative, attribute(CU_LAUNCH_ATTRIBUTE_COOPERATIVE, together)),
        ];
        let mut attributes: Vec<_> =
            known.into_iter().filter_map(|(wanted, of)| wanted.then_some(of)).collect();
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0] as u32,
            gridDimY: grid[1] as u32,
            gridDimZ: grid[2] as u32,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the configuration and the parameters outlive the call, which copies them; the caller
        // guarantees the rest.
        unsafe {
            let function = self.function.cu_function();
            let params = params.as_mut_ptr();
            sys::cuLaunchKernelEx(&raw const config, function, params, std::ptr::null_mut())
                .result()
        }
    }

    fn config(&self, grid: [usize; 3]) -> LaunchConfig {
        LaunchConfig {
            grid_dim: grid.map(|blocks| blocks as u32).into(),
            block_dim: (self.threads, 1, 1),
            shared_mem_bytes: self.shared_bytes,
        }
    }
}
