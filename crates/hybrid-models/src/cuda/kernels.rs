//! Which kernels there are, and how they are launched.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use candle_core::cuda::cudarc::driver::{
    CudaFunction, CudaModule, CudaStream, DevicePtr, DeviceRepr, DriverError, LaunchConfig,
    PushKernelArg,
};
use candle_core::cuda::cudarc::nvrtc::Ptx;
use candle_core::{CudaDevice, DType, Storage, Tensor};
use half::{bf16, f16};
use longctx_core::{Error, Result};

/// Compute capability, times ten, from which on there are kernels.
const OLDEST: i32 = 80;

/// The compiled kernels/*.cu. What a file holds has names that begin with the file's.
const IMAGES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/images.rs"));

// Bytes of dynamic shared memory and of scratch, as in kernels/args.cuh.
include!(concat!(env!("OUT_DIR"), "/sizes.rs"));

/// The kernels, loaded into a device's context.
#[derive(Debug)]
pub struct Kernels {
    modules: Vec<(&'static str, Arc<CudaModule>)>,
    stream: Arc<CudaStream>,
    /// The most bytes of shared memory that a block may have.
    pub most_shared: u32,
    /// Multiprocessors of the device.
    pub processors: u32,
    /// Whether the device has the instructions of compute capability 9.0 that later ones lack.
    pub hopper: bool,
}

impl Kernels {
    /// # Errors
    /// [`Error::Unsupported`] for a device older than the kernels.
    pub fn load(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let attribute = |a| context.attribute(a).map_err(wrap);
        use CUdevice_attribute::*;
        let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if 10 * major + minor < OLDEST {
            let reason = "there are kernels for 8.0 and newer";
            let place = format!("a CUDA device of compute capability {major}.{minor}");
            return Err(Error::Unsupported(format!("{place}: {reason}")));
        }
        let load = |&(name, image): &(&'static str, &[u8])| {
            let module = context.load_module(Ptx::from_binary(image.to_vec())).map_err(wrap)?;
            Ok((name, module))
        };
        let modules = IMAGES.iter().map(load).collect::<Result<_>>()?;
        let most_shared = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        let processors = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let hopper = (major, minor) == (9, 0);
        Ok(Self { modules, stream, most_shared, processors, hopper })
    }

    /// The kernel of a name for inputs and outputs of a format, by blocks of so many threads with so many bytes of dynamic shared memory.
    pub fn get(&self, name: &str, dtype: DType, threads: u32, shared: u32) -> Result<Kernel> {
        let entry = format!("{name}_{}", dtype.as_str());
        let holds = |(file, _): &&(&str, _)| name.starts_with(file);
        let (_, module) = (self.modules.iter().find(holds))
            .ok_or_else(|| Error::Unsupported(format!("{name} on a CUDA device: no kernel")))?;
        let function = module.load_function(&entry).map_err(wrap)?;
        if shared > 0 {
            use CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC;
            function.set_attribute(DYNAMIC, shared as i32).map_err(wrap)?;
        }
        Ok(Kernel { function, stream: self.stream.clone(), threads, shared })
    }
}

#[derive(Debug)]
pub struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
    threads: u32,
    shared: u32,
}

impl Kernel {
    /// # Safety
    /// `args` must be what the kernel takes and right for the grid; its addresses must be those of arrays on the kernel's device, of the
    /// sizes that the kernel's struct gives, and of tensors that outlive this call: all work is on one stream, so that memory freed after it
    /// is not used again before it.
    pub unsafe fn launch<A: DeviceRepr>(
        &self,
        grid_dim: (usize, usize, usize),
        args: &A,
    ) -> Result<()> {
        let (x, y, z) = grid_dim;
        let config = LaunchConfig {
            grid_dim: (x as u32, y as u32, z as u32),
            block_dim: (self.threads, 1, 1),
            shared_mem_bytes: self.shared,
        };
        let mut builder = self.stream.launch_builder(&self.function);
        builder.arg(args);
        // SAFETY: the caller's.
        unsafe { builder.launch(config) }.map_err(wrap)?;
        Ok(())
    }
}

/// A tensor of numbers that nobody has written yet.
///
/// # Safety
/// A kernel must write all of it before anything reads it.
pub unsafe fn unwritten(shape: (usize, usize), like: &Tensor) -> Result<Tensor> {
    // SAFETY: the caller's.
    Ok(unsafe { Tensor::empty(shape, like.dtype(), like.device())? })
}

/// The device address of a tensor's first number.
pub fn address(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        return Err(Error::mismatch("tensor", "one on a CUDA device", "one elsewhere"));
    };
    let stream = storage.device().cuda_stream();
    let start = match storage.dtype() {
        DType::F32 => storage.as_cuda_slice::<f32>()?.device_ptr(&stream).0,
        DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(&stream).0,
        DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(&stream).0,
        other => return Err(Error::mismatch("tensor", "f32, f16 or bf16", other.as_str())),
    };
    Ok(start + (layout.start_offset() * storage.dtype().size_in_bytes()) as u64)
}

/// `[rows, columns]` of a matrix, whole or some columns of a wider one.
#[derive(Clone, Copy)]
pub struct Rows {
    pub address: u64,
    /// Numbers from one row to the next.
    pub row: i32,
}

impl Rows {
    pub fn of(x: &Tensor) -> Result<Self> {
        match *x.stride() {
            [row, 1] => Ok(Self { address: address(x)?, row: row as i32 }),
            ref other => {
                let (expected, got) = ("[row, 1]", format!("{other:?}"));
                Err(Error::mismatch("strides of a kernel's input", expected, got))
            }
        }
    }

    /// Whether kernels that read eight numbers of half precision at a time can.
    pub fn in_eights(self) -> bool {
        self.address.is_multiple_of(16) && self.row % 8 == 0
    }
}

fn wrap(error: DriverError) -> Error {
    candle_core::Error::wrap(error).into()
}
