//! The compiled kernels and their launch.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::{CudaDevice, DType, Tensor};
use longctx_core::{Error, Result};
use longctx_cuda::cudarc::driver::{CudaStream, DeviceRepr};
use longctx_cuda::{Image, compute_capability, max_shared_bytes, multiprocessors};

pub use longctx_core::cuda::address;

/// The oldest supported compute capability.
const MIN_COMPUTE_CAP: (u32, u32) = (8, 0);

/// The compiled kernels/*.cu. The names of a file's kernels begin with the file's name.
static IMAGES: [(&str, Image); 6] = [
    ("conv", longctx_cuda::image!("conv")),
    ("rg_lru", longctx_cuda::image!("rg_lru")),
    ("rows", longctx_cuda::image!("rows")),
    ("selective_scan", longctx_cuda::image!("selective_scan")),
    ("ssd", longctx_cuda::image!("ssd")),
    ("wkv", longctx_cuda::image!("wkv")),
];

// Bytes of dynamic shared memory and of scratch, as in kernels/args.cuh.
include!(concat!(env!("OUT_DIR"), "/sizes.rs"));

/// The kernels of a device.
#[derive(Debug)]
pub struct Kernels {
    stream: Arc<CudaStream>,
    /// The largest number of bytes of shared memory of a thread block.
    pub max_shared: u32,
    /// Multiprocessors of the device.
    pub processors: usize,
    /// Whether the device has compute capability 9.0, with instructions that later devices lack.
    pub hopper: bool,
}

impl Kernels {
    /// # Errors
    /// [`Error::Unsupported`] for a device below the oldest supported compute capability.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let capability = compute_capability(context)?;
        if capability < MIN_COMPUTE_CAP {
            let (major, minor) = capability;
            let reason = "there are kernels for 8.0 and newer";
            let place = format!("a CUDA device of compute capability {major}.{minor}");
            return Err(Error::Unsupported(format!("{place}: {reason}")));
        }
        let max_shared = max_shared_bytes(context)?;
        let processors = multiprocessors(context)?;
        Ok(Self { stream, max_shared, processors, hopper: capability == (9, 0) })
    }

    /// Returns a kernel by name for inputs and outputs of a dtype, with `threads` threads per block
    /// and `shared` bytes of dynamic shared memory.
    pub fn get(&self, name: &str, dtype: DType, threads: u32, shared: u32) -> Result<Kernel> {
        let entry = format!("{name}_{}", dtype.as_str());
        let holds = |(file, _): &&(&str, _)| name.starts_with(file);
        let (_, image) = (IMAGES.iter().find(holds))
            .ok_or_else(|| Error::Unsupported(format!("{name} on a CUDA device: no kernel")))?;
        let kernel = image.kernel(self.stream.context(), &entry, threads, shared)?;
        Ok(Kernel { kernel, stream: self.stream.clone() })
    }
}

/// A kernel on candle's stream.
#[derive(Debug)]
pub struct Kernel {
    kernel: longctx_cuda::Kernel,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// # Safety
    /// `args` must be the arguments of the kernel and match the grid. Its addresses must be those
    /// of arrays on the kernel's device, with the sizes that the kernel's struct states, in tensors
    /// that outlive this call. All work is on one stream, so memory freed after the call is not
    /// reused before the kernel has finished.
    pub unsafe fn launch<A: DeviceRepr>(
        &self,
        (x, y, z): (usize, usize, usize),
        args: &A,
    ) -> Result<()> {
        // SAFETY: the caller guarantees the addresses.
        Ok(unsafe { self.kernel.launch(&self.stream, [x, y, z], args) }?)
    }
}

/// Creates an uninitialised tensor.
///
/// # Safety
/// A kernel must write every element before anything reads it.
pub unsafe fn uninit(shape: (usize, usize), like: &Tensor) -> Result<Tensor> {
    // SAFETY: the caller guarantees the addresses.
    Ok(unsafe { Tensor::empty(shape, like.dtype(), like.device())? })
}

/// A matrix `[rows, columns]`, or some columns of a wider one.
#[derive(Clone, Copy)]
pub struct Rows {
    pub address: u64,
    /// Row stride in elements.
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

    /// Returns whether kernels that read eight half-precision elements at a time support it.
    pub fn is_vectorizable(self) -> bool {
        self.address.is_multiple_of(16) && self.row % 8 == 0
    }
}
