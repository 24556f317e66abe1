//! The device that a model goes to: its kernels, and the format of weights there.

use std::sync::Arc;

use super::kernels::{Kernel, Kernels, Rows};
use candle_core::{CudaDevice, DType, Device, Tensor};
use longctx_core::Result;

/// A device, and the format in which weights are held there.
#[derive(Debug)]
pub struct Target {
    pub device: Device,
    pub dtype: DType,
    kernels: Arc<Kernels>,
}

impl Target {
    pub fn new(device: &CudaDevice, dtype: DType) -> Result<Self> {
        let kernels = Arc::new(Kernels::new(device)?);
        Ok(Self { device: Device::Cuda(device.clone()), dtype, kernels })
    }

    /// A kernel for the format of the weights, by blocks of so many threads.
    pub fn kernel(&self, name: &str, threads: u32) -> Result<Kernel> {
        self.kernel_sharing(name, threads, 0)
    }

    /// The same with so many bytes of shared memory.
    pub fn kernel_sharing(&self, name: &str, threads: u32, shared: usize) -> Result<Kernel> {
        self.kernels.get(name, self.dtype, threads, shared as u32)
    }

    /// The same where the device has so much shared memory for a block.
    pub fn kernel_where_it_fits(
        &self,
        name: &str,
        threads: u32,
        shared: u32,
    ) -> Result<Option<Kernel>> {
        let fits = shared <= self.kernels.most_shared;
        fits.then(|| self.kernel_sharing(name, threads, shared as usize)).transpose()
    }

    /// Whether kernels for compute capability 9.0 alone can be launched.
    pub fn hopper(&self) -> bool {
        self.kernels.hopper
    }

    /// A kernel for many tokens, where there is one for the format of the weights and the device has so much shared memory.
    pub fn in_chunks(&self, name: &str, threads: u32, shared: u32) -> Result<Option<InChunks>> {
        if self.dtype == DType::F32 {
            return Ok(None);
        }
        Ok(self.kernel_where_it_fits(name, threads, shared)?.map(InChunks))
    }

    /// A kernel that is worth it for many tokens in f32, if that is the format of the weights.
    pub fn in_f32(&self, name: &str, threads: u32) -> Result<Option<InChunks>> {
        (self.dtype == DType::F32).then(|| self.kernel(name, threads).map(InChunks)).transpose()
    }

    /// Multiprocessors of the device.
    pub fn processors(&self) -> usize {
        self.kernels.processors
    }

    /// Numbers in f32.
    pub fn vector(&self, numbers: &[f32]) -> Result<Tensor> {
        Ok(Tensor::new(numbers, &self.device)?)
    }
}

/// A kernel that is worth it for many tokens.
#[derive(Debug)]
pub struct InChunks(Kernel);

impl InChunks {
    const FEWEST_TOKENS: usize = 16;

    /// The kernel, if it is worth it for so many tokens and can read these rows.
    pub fn fitting<'a>(this: &'a Option<Self>, tokens: usize, rows: &[Rows]) -> Option<&'a Kernel> {
        let fits =
            |_: &&Self| tokens >= Self::FEWEST_TOKENS && rows.iter().all(|rows| rows.in_eights());
        this.as_ref().filter(fits).map(|InChunks(kernel)| kernel)
    }
}
