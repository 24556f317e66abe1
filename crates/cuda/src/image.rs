//! Compiled kernels, loaded per context.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::{Kernel, compute_capability};
use cudarc::driver::{CudaContext, CudaModule, DriverError};
use cudarc::nvrtc::Ptx;

/// A compiled file of kernels. It is loaded once per context, when the first of its kernels is
/// requested.
#[derive(Debug)]
pub struct Image {
    binary: &'static [u8],
    loaded: Mutex<Vec<Loaded>>,
}

#[derive(Debug)]
struct Loaded {
    context: Arc<CudaContext>,
    module: Arc<CudaModule>,
    kernels: HashMap<String, Kernel>,
}

/// Returns the [`Image`] of a file that `build::compile` compiled for the crate.
#[macro_export]
macro_rules! image {
    ($name:literal) => {
        $crate::Image::new(include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")))
    };
}

impl Image {
    /// Creates an image from a binary that the driver can load: a fatbin or a cubin.
    pub const fn new(binary: &'static [u8]) -> Self {
        Self { binary, loaded: Mutex::new(Vec::new()) }
    }

    /// Returns the kernel `name`, for thread blocks of `threads` threads with `shared_bytes` bytes
    /// of dynamic shared memory. The first call in a context loads the image, which is not allowed
    /// during stream capture.
    ///
    /// # Errors
    /// Errors of the driver, for example if the kernel does not exist or the device has less shared
    /// memory.
    pub fn kernel(
        &self,
        context: &Arc<CudaContext>,
        name: &str,
        threads: u32,
        shared_bytes: u32,
    ) -> Result<Kernel, DriverError> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let place = match loaded.iter().position(|loaded| &loaded.context == context) {
            Some(place) => place,
            None => {
                let module = context.load_module(Ptx::from_binary(self.binary.to_vec()))?;
                loaded.push(Loaded { context: context.clone(), module, kernels: HashMap::new() });
                loaded.len() - 1
            }
        };
        let Loaded { module, kernels, .. } = &mut loaded[place];
        if let Some(kernel) = kernels.get(name).filter(|kernel| kernel.is(threads, shared_bytes)) {
            return Ok(kernel.clone());
        }
        let programmatic = compute_capability(context)? >= (9, 0);
        let function = module.load_function(name)?;
        let kernel = Kernel::new(function, threads, shared_bytes, programmatic)?;
        kernels.insert(name.into(), kernel.clone());
        Ok(kernel)
    }
}
