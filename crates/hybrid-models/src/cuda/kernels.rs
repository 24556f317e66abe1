//! Which kernels there are, and how they are launched.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::{CudaDevice, DType, Tensor};
use longctx_core::{Error, Result};
use longctx_cuda::cudarc::driver::{CudaStream, DeviceRepr};
use longctx_cuda::{Image, compute_capability, most_shared_bytes, multiprocessors};

pub use longctx_core::cuda::address;

/// The compute capability from which on there are kernels.
const OLDEST: (u32, u32) = (8, 0);

/// The compiled kernels/*.cu. What a file holds has names that begin with the file's.
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

/// The kernels on a device.
#[derive(Debug)]
pub struct Kernels {
    stream: Arc<CudaStream>,
    /// The most bytes of shared memory that a block may have.
    pub most_shared: u32,
    /// Multiprocessors of the device.
    pub processors: usize,
    /// Whether the device has the instructions of compute capability 9.0 that later ones lack.
    pub hopper: bool,
}

impl Kernels {
    /// # Errors
    /// [`Error::Unsupported`] for a device older than the kernels.
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let capability = compute_capability(context)?;
        if capability < OLDEST {
            let (major, minor) = capability;
            let reason = "there are kernels for 8.0 and newer";
            let place = format!("a CUDA device of compute capability {major}.{minor}");
            return Err(Error::Unsupported(format!("{place}: {reason}")));
        }
        let most_shared = most_shared_bytes(context)?;
        let processors = multiprocessors(context)?;
        Ok(Self { stream, most_shared, processors, hopper: capability == (9, 0) })
    }

    /// The kernel of a name for inputs and outputs of a format, by blocks of so many threads with so many bytes of dynamic shared memory.
    pub fn get(&self, name: &str, dtype: DType, threads: u32, shared: u32) -> Result<Kernel> {
        let entry = format!("{name}_{}", dtype.as_str());
        let holds = |(file, _): &&(&str, _)| name.starts_with(file);
        let (_, image) = (IMAGES.iter().find(holds))
            .ok_or_else(|| Error::Unsupported(format!("{name} on a CUDA device: no kernel")))?;
        let kernel = image.kernel(self.stream.context(), &entry, threads, shared)?;
        Ok(Kernel { kernel, stream: self.stream.clone() })
    }
}

/// A kernel on the stream of all of candle's work.
#[derive(Debug)]
pub struct Kernel {
    kernel: longctx_cuda::Kernel,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// # Safety
    /// `args` must be what the kernel takes and right for the grid; its addresses must be those of arrays on the kernel's device, of the
    /// sizes that the kernel's struct gives, and of tensors that outlive this call: all work is on one stream, so that memory freed after it
    /// is not used again before it.
    pub unsafe fn launch<A: DeviceRepr>(
        &self,
        (x, y, z): (usize, usize, usize),
        args: &A,
    ) -> Result<()> {
        // SAFETY: the caller's.
        Ok(unsafe { self.kernel.launch(&self.stream, [x, y, z], args) }?)
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
