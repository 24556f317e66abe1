//! Matrix products with cuBLAS, called directly: candle would first copy rows that are columns of
//! wider rows.
#![allow(unsafe_code)]

use super::kernels::address;
use candle_core::cuda::cudarc::cublas::{result, sys};
use candle_core::{DType, Tensor};
use longctx_core::{Error, Result};

/// Multiplies `[count, rows, inner]` by the transposes of `[count, out, inner]`; returns `[count,
/// rows, out]`. The last dimension of `x` must be contiguous. Sums are f32.
pub fn product(x: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let ((count, rows, inner), (_, out, _)) = (x.dims3()?, weights.dims3()?);
    let &[x_entry, x_row, 1] = x.stride() else {
        let (expected, got) = ("[entry, row, 1]", format!("{:?}", x.stride()));
        return Err(Error::mismatch("strides of a product's rows", expected, got));
    };
    // SAFETY: the product below writes every element.
    let y = unsafe { Tensor::empty((count, rows, out), x.dtype(), x.device())? };
    let kind = match x.dtype() {
        DType::F16 => sys::cudaDataType::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
        _ => sys::cudaDataType::CUDA_R_32F,
    };
    let (one, zero) = (1f32, 0f32);
    let (of_x, of_weights, of_y) = (address(x)?, address(weights)?, address(&y)?);
    // cuBLAS is column-major. The stride of a single row may be anything, even less than its
    // length.
    // SAFETY: the sizes and strides are those of the tensors, which live until the end of this
    // function, on candle's stream.
    unsafe {
        result::gemm_strided_batched_ex(
            *x.device().as_cuda_device()?.cublas_handle().handle(),
            sys::cublasOperation_t::CUBLAS_OP_T,
            sys::cublasOperation_t::CUBLAS_OP_N,
            out as i32,
            rows as i32,
            inner as i32,
            (&raw const one).cast(),
            of_weights as *const _,
            kind,
            inner as i32,
            (out * inner) as i64,
            of_x as *const _,
            kind,
            x_row.max(inner) as i32,
            x_entry as i64,
            (&raw const zero).cast(),
            of_y as *mut _,
            kind,
            out as i32,
            (rows * out) as i64,
            count as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .map_err(candle_core::Error::wrap)?;
    Ok(y)
}
