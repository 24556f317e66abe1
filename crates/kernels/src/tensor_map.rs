//! Tensor maps, by which Hopper's copy engine reads boxes of a tensor.

use std::mem::MaybeUninit;

use crate::{Half, Result};
use longctx_cuda::cudarc::driver::{DeviceRepr, sys};

/// A kernel's parameter that describes a tensor, with boxes of 64 elements of the first dimension.
#[repr(transparent)]
#[derive(Clone)]
pub(crate) struct TensorMap(sys::CUtensorMap);

// SAFETY: the type is the driver's own parameter type.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// Describes the tensor at a device address. Dimensions are in the order of their strides, which
    /// count elements; the first one is contiguous and has none. Elements outside the tensor are read
    /// as zeros.
    ///
    /// # Errors
    /// An error of the CUDA driver, for example for rows that are not aligned to 16 bytes.
    pub fn new<const RANK: usize, const STRIDES: usize>(
        half: Half,
        address: u64,
        extents: [u64; RANK],
        strides: [u64; STRIDES],
        of_box: [u32; RANK],
    ) -> Result<Self> {
        const { assert!(STRIDES + 1 == RANK, "a stride for each dimension but the first") };
        let format = match half {
            Half::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Half::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let bytes = strides.map(|stride| 2 * stride);
        let mut map = MaybeUninit::uninit();
        // SAFETY: all pointers are those of arrays of the rank's length that outlive the call, which
        // writes `map` on success. The address is stored, not read.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                format,
                RANK as u32,
                address as *mut _,
                extents.as_ptr(),
                bytes.as_ptr(),
                of_box.as_ptr(),
                [1; RANK].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()?;
            Ok(Self(map.assume_init()))
        }
    }
}
