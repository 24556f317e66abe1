//! Compiled kernels, and the contexts that they are loaded into.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{Error, Result};
use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda::cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use candle_core::cuda::cudarc::nvrtc::Ptx;

/// A compiled file of kernels, loaded into each context that asks for one of them.
pub struct Image {
    binary: &'static [u8],
    loaded: Mutex<Vec<(Arc<CudaContext>, Arc<CudaModule>)>>,
}

impl Image {
    pub const fn new(binary: &'static [u8]) -> Self {
        Self { binary, loaded: Mutex::new(Vec::new()) }
    }

    /// The kernel of a name.
    pub fn function(&self, context: &Arc<CudaContext>, name: &str) -> Result<CudaFunction> {
        self.module(context)?.load_function(name).map_err(driver)
    }

    fn module(&self, context: &Arc<CudaContext>) -> Result<Arc<CudaModule>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, module)) = loaded.iter().find(|(of, _)| of == context) {
            return Ok(module.clone());
        }
        let module = context.load_module(Ptx::from_binary(self.binary.to_vec())).map_err(driver)?;
        loaded.push((context.clone(), module.clone()));
        Ok(module)
    }
}

/// Major and minor.
pub fn compute_capability(context: &CudaContext) -> Result<(i32, i32)> {
    use CUdevice_attribute::*;
    let attribute = |which| context.attribute(which).map_err(driver);
    let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok((major, attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?))
}

/// The driver's error as one of this crate.
pub fn driver(error: DriverError) -> Error {
    candle_core::Error::wrap(error).into()
}
