//! Compiled kernels, and the contexts that they are loaded into.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Kernel;
use cudarc::driver::{CudaContext, CudaModule, DriverError};
use cudarc::nvrtc::Ptx;

/// A compiled file of kernels, loaded once into each context that asks for one of them.
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

/// The [`Image`] of a file that `build::compile` has compiled for the crate.
#[macro_export]
macro_rules! image {
    ($name:literal) => {
        $crate::Image::new(include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".fatbin")))
    };
}

impl Image {
    /// An image of a binary in a format that the driver loads: fatbin, cubin.
    pub const fn new(binary: &'static [u8]) -> Self {
        Self { binary, loaded: Mutex::new(Vec::new()) }
    }

    /// The kernel of a name, for blocks of so many threads with so many bytes of dynamic shared
    /// memory. The first one in a context loads the image, which a stream's capture does not allow.
    ///
    /// # Errors
    /// The driver's: no such kernel, more shared memory than the device has.
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
        let kernel = Kernel::new(module.load_function(name)?, threads, shared_bytes)?;
        kernels.insert(name.into(), kernel.clone());
        Ok(kernel)
    }
}
