//! The device of a model: its kernels, and the dtype of the weights.

use std::sync::Arc;

use super::kernels::{Kernel, Kernels, Rows};
use candle_core::{CudaDevice, DType, Device, Tensor};
use longctx_core::Result;

/// A device, and the dtype of the weights on it.
#[derive(Debug)]
pub struct DeviceContext {
    pub device: Device,
    pub dtype: DType,
    kernels: Arc<Kernels>,
}

impl DeviceContext {
    pub fn new(device: &CudaDevice, dtype: DType) -> Result<Self> {
        let kernels = Arc::new(Kernels::new(device)?);
        Ok(Self { device: Device::Cuda(device.clone()), dtype, kernels })
    }

    /// Returns a kernel for the dtype of the weights, with `threads` threads per block.
    pub fn kernel(&self, name: &str, threads: u32) -> Result<Kernel> {
        self.kernel_with_shared(name, threads, 0)
    }

    /// Returns a kernel with `shared` bytes of shared memory.
    pub fn kernel_with_shared(&self, name: &str, threads: u32, shared: usize) -> Result<Kernel> {
        self.kernels.get(name, self.dtype, threads, shared as u32)
    }

    /// Returns a kernel if the device has `shared` bytes of shared memory per thread block.
    pub fn kernel_if_fits(&self, name: &str, threads: u32, shared: u32) -> Result<Option<Kernel>> {
        let fits = shared <= self.kernels.max_shared;
        fits.then(|| self.kernel_with_shared(name, threads, shared as usize)).transpose()
    }

    /// Returns whether kernels for compute capability 9.0 only can be launched.
    pub fn hopper(&self) -> bool {
        self.kernels.hopper
    }

    /// Returns a kernel for many tokens, if there is one for the dtype of the weights and the
    /// device has enough shared memory.
    pub fn chunk_kernel(
        &self,
        name: &str,
        threads: u32,
        shared: u32,
    ) -> Result<Option<ChunkKernel>> {
        if self.dtype == DType::F32 {
            return Ok(None);
        }
        Ok(self.kernel_if_fits(name, threads, shared)?.map(ChunkKernel))
    }

    /// Returns a kernel for many tokens in f32, if that is the dtype of the weights.
    pub fn in_f32(&self, name: &str, threads: u32) -> Result<Option<ChunkKernel>> {
        (self.dtype == DType::F32).then(|| self.kernel(name, threads).map(ChunkKernel)).transpose()
    }

    /// Returns the number of multiprocessors of the device.
    pub fn processors(&self) -> usize {
        self.kernels.processors
    }

    /// Copies f32 numbers to the device.
    pub fn vector(&self, numbers: &[f32]) -> Result<Tensor> {
        Ok(Tensor::new(numbers, &self.device)?)
    }
}

/// A kernel that is faster for many tokens.
#[derive(Debug)]
pub struct ChunkKernel(Kernel);

impl ChunkKernel {
    const MIN_TOKENS: usize = 16;

    /// Returns the kernel if it is faster for this number of tokens and supports these rows.
    pub fn select<'a>(this: &'a Option<Self>, tokens: usize, rows: &[Rows]) -> Option<&'a Kernel> {
        let fits = |_: &&Self| {
            tokens >= Self::MIN_TOKENS && rows.iter().all(|rows| rows.is_vectorizable())
        };
        this.as_ref().filter(fits).map(|ChunkKernel(kernel)| kernel)
    }
}
