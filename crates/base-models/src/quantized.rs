//! Matrices in GGUF's block formats, multiplied without expanding them in memory.
//!
//! candle's quantized product rounds the activations to 8 bits. Here activations stay in f32:
//!
//! - A few rows of activations are multiplied by the packed blocks directly. Each block is unpacked
//!   once for up to eight rows.
//! - For many rows, the matrix is expanded for the call and multiplied as a dense matrix.
//! - Q2_K, Q3_K and other devices use candle's product.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::sync::Arc;

use crate::block_formats::{Format, PART, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use longctx_core::{Error, Result, attention::with_slice};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Up to this many rows of activations, reading packed blocks is faster than expanding the matrix.
const FEW_ROWS: usize = 32;
/// The largest number of rows of activations per unpacked block.
const TILE: usize = 8;
/// Weights per thread.
const MIN_WORK: usize = 1 << 16;

/// A matrix `[out, in]` in a block format.
#[derive(Debug, Clone)]
pub struct QuantizedMatrix {
    tensor: Arc<QTensor>,
    kernel: Kernel,
}

#[derive(Debug, Clone)]
enum Kernel {
    Own(&'static dyn BlockRows),
    Candle(Arc<QMatMul>),
}

impl QuantizedMatrix {
    /// # Errors
    /// [`Error::NotFinite`] if a block's scale is NaN or infinite, naming the tensor;
    /// [`Error::Mismatch`] unless it is a matrix.
    pub fn new(name: &str, tensor: QTensor) -> Result<Self> {
        if tensor.rank() != 2 {
            let got = format!("{:?}", tensor.shape());
            return Err(Error::mismatch(name, "a matrix", got));
        }
        let on_cpu = matches!(tensor.device(), Device::Cpu);
        let tensor = Arc::new(tensor);
        let kernel = match rows_of(tensor.dtype()).filter(|_| on_cpu) {
            Some(rows) => Kernel::Own(rows),
            None => Kernel::Candle(Arc::new(QMatMul::from_arc(tensor.clone())?)),
        };
        if let Kernel::Own(rows) = kernel {
            rows.check_scales(name, &tensor.data()?)?;
        }
        Ok(Self { tensor, kernel })
    }

    /// Stacks matrices vertically, if all have the same format and inner dimension and are on the
    /// CPU.
    pub fn stack(parts: &[&Self]) -> Result<Option<Self>> {
        let [first, ..] = parts else { return Ok(None) };
        let (_, inner) = first.dims()?;
        let same = |m: &&Self| {
            m.tensor.dtype() == first.tensor.dtype()
                && m.dims().is_ok_and(|(_, i)| i == inner)
                && matches!(m.tensor.device(), Device::Cpu)
        };
        if !parts.iter().all(same) {
            return Ok(None);
        }
        let mut data = Vec::new();
        let mut rows = 0;
        for part in parts {
            data.extend_from_slice(&part.tensor.data()?);
            rows += part.dims()?.0;
        }
        first.with_data(data, rows).map(Some)
    }

    /// Splits a tensor `[count, out, in]` on the CPU into matrices.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Mismatch`] for a tensor of another rank.
    pub fn split(name: &str, tensor: &QTensor) -> Result<Vec<Self>> {
        let dims = tensor.shape().dims();
        let &[count, out, inner] = dims else {
            let got = format!("{dims:?}");
            return Err(Error::mismatch(name, "as many matrices as experts", got));
        };
        let data = tensor.data()?;
        let size = data.len() / count.max(1);
        let part = |data: &[u8]| {
            let data = Cow::Owned(data.to_vec());
            let storage = QStorage::from_data(data, &tensor.device(), tensor.dtype())?;
            Self::new(name, QTensor::new(storage, (out, inner))?)
        };
        data.chunks(size.max(1)).map(part).collect()
    }

    /// Reorders the rows: row i of the result is row `order(i)` of this matrix.
    pub fn reorder(&self, order: impl Fn(usize) -> usize) -> Result<Self> {
        let (rows, _) = self.dims()?;
        let data = self.tensor.data()?;
        let size = data.len() / rows.max(1);
        let row = |i| data[order(i) * size..(order(i) + 1) * size].iter().copied();
        self.with_data((0..rows).flat_map(row).collect(), rows)
    }

    fn with_data(&self, data: Vec<u8>, rows: usize) -> Result<Self> {
        let storage =
            QStorage::from_data(Cow::Owned(data), &self.tensor.device(), self.tensor.dtype())?;
        Self::new("rearranged weights", QTensor::new(storage, (rows, self.dims()?.1))?)
    }

    /// Returns `(out, in)`.
    pub fn dims(&self) -> Result<(usize, usize)> {
        Ok(self.tensor.shape().dims2()?)
    }

    /// Returns the block format.
    pub fn dtype(&self) -> GgmlDType {
        self.tensor.dtype()
    }

    /// Copies the blocks to another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        if self.tensor.device().same_device(device) {
            return Ok(self.clone());
        }
        let data = Cow::Owned(self.tensor.data()?.into_owned());
        let storage = QStorage::from_data(data, device, self.tensor.dtype())?;
        Self::new("moved weights", QTensor::new(storage, self.dims()?)?)
    }

    /// Returns the whole matrix in f32.
    pub fn expand(&self) -> Result<Tensor> {
        match self.kernel {
            Kernel::Own(rows) => self.expand_with(rows),
            Kernel::Candle(_) => Ok(self.tensor.dequantize(&self.tensor.device())?),
        }
    }

    /// Returns the rows `ids` (u32, `[n]`), in f32.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self.kernel {
            Kernel::Own(rows) => self.rows_with(rows, ids),
            Kernel::Candle(_) => Ok(self.tensor.embedding(ids)?),
        }
    }

    /// Maps `x` `[…, in]` to `[…, out]`, both in f32 on the CPU.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (out, inner) = self.dims()?;
        let mut dims = x.dims().to_vec();
        match dims.last_mut() {
            Some(last) if *last == inner => *last = out,
            _ => {
                let expected = format!("[…, {inner}]");
                return Err(Error::mismatch(
                    "input of a linear map",
                    expected,
                    format!("{:?}", x.dims()),
                ));
            }
        }
        let rows = x.elem_count() / inner;
        let x = x.reshape((rows, inner))?;
        let y = match &self.kernel {
            Kernel::Candle(matmul) => matmul.forward(&x)?,
            _ if rows > FEW_ROWS => x.matmul(&self.expand()?.t()?)?,
            Kernel::Own(kernel) => self.product(*kernel, &x)?,
        };
        Ok(y.reshape(dims)?)
    }

    fn expand_with(&self, kernel: &dyn BlockRows) -> Result<Tensor> {
        let (rows, inner) = self.dims()?;
        let data = self.tensor.data()?;
        let mut out = vec![0.0; rows * inner];
        let size = kernel.bytes(inner);
        out.par_chunks_mut(inner)
            .with_min_len(MIN_WORK.div_ceil(inner))
            .zip(data.par_chunks(size))
            .for_each(|(out, row)| kernel.expand(row, out));
        Ok(Tensor::from_vec(out, (rows, inner), &Device::Cpu)?)
    }

    fn rows_with(&self, kernel: &dyn BlockRows, ids: &Tensor) -> Result<Tensor> {
        let (rows, inner) = self.dims()?;
        let data = self.tensor.data()?;
        let ids = ids.to_vec1::<u32>()?;
        let mut out = vec![0.0; ids.len() * inner];
        let size = kernel.bytes(inner);
        for (out, &id) in out.chunks_exact_mut(inner).zip(&ids) {
            if id as usize >= rows {
                return Err(Error::mismatch("token", format!("an id below {rows}"), id));
            }
            let row = &data[id as usize * size..][..size];
            kernel.expand(row, out);
        }
        Ok(Tensor::from_vec(out, (ids.len(), inner), &Device::Cpu)?)
    }

    fn product(&self, kernel: &dyn BlockRows, x: &Tensor) -> Result<Tensor> {
        let (out, inner) = self.dims()?;
        let rows = x.dim(0)?;
        let data = self.tensor.data()?;
        let size = kernel.bytes(inner);
        let x = x.to_dtype(DType::F32)?.contiguous()?;
        let chunk =
            (MIN_WORK / inner.max(1)).max(out.div_ceil(rayon::current_num_threads())).max(1);
        // One row of weights after another, so that each is read once for all rows of x.
        let mut transposed = vec![0.0; out * rows];
        with_slice::<f32, _>(&x, |x| {
            let tiles: Vec<_> = x.chunks(TILE * inner).map(|rows| Tile::new(rows, inner)).collect();
            transposed
                .par_chunks_mut(chunk * rows)
                .zip(data.par_chunks(chunk * size))
                .for_each(|(out, weights)| kernel.product(weights, &tiles, out, rows));
            Ok(())
        })?;
        let y = Tensor::from_vec(transposed, (out, rows), &Device::Cpu)?;
        Ok(if rows == 1 { y.reshape((1, out))? } else { y.t()?.contiguous()? })
    }
}

/// Operations on rows of blocks of a format.
trait BlockRows: Sync + std::fmt::Debug {
    /// Returns the bytes of a row of `inner` weights.
    fn bytes(&self, inner: usize) -> usize;
    /// Expands a row of weights to f32.
    fn expand(&self, row: &[u8], out: &mut [f32]);
    /// Multiplies rows of weights by all rows of activations. `out` is `[weights, rows]`.
    fn product(&self, weights: &[u8], tiles: &[Tile], out: &mut [f32], rows: usize);
    /// Refuses scales that are NaN or infinite.
    fn check_scales(&self, name: &str, data: &[u8]) -> Result<()>;
}

/// Implements [`BlockRows`] for a format.
struct BlockRowsOf<F>(PhantomData<fn() -> F>);

/// Returns the implementation of a format; `None` if only candle supports it.
fn rows_of(dtype: GgmlDType) -> Option<&'static dyn BlockRows> {
    Some(match dtype {
        GgmlDType::Q4_0 => &BlockRowsOf::<Q4_0>(PhantomData),
        GgmlDType::Q4_1 => &BlockRowsOf::<Q4_1>(PhantomData),
        GgmlDType::Q5_0 => &BlockRowsOf::<Q5_0>(PhantomData),
        GgmlDType::Q5_1 => &BlockRowsOf::<Q5_1>(PhantomData),
        GgmlDType::Q8_0 => &BlockRowsOf::<Q8_0>(PhantomData),
        GgmlDType::Q4K => &BlockRowsOf::<Q4K>(PhantomData),
        GgmlDType::Q5K => &BlockRowsOf::<Q5K>(PhantomData),
        GgmlDType::Q6K => &BlockRowsOf::<Q6K>(PhantomData),
        _ => return None,
    })
}

impl<F> std::fmt::Debug for BlockRowsOf<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(std::any::type_name::<F>())
    }
}

impl<F: Format> BlockRows for BlockRowsOf<F> {
    fn bytes(&self, inner: usize) -> usize {
        inner / (PART * F::PARTS) * F::BYTES
    }

    fn expand(&self, row: &[u8], out: &mut [f32]) {
        Arch::new().dispatch(Expand { row, out, format: PhantomData::<F> });
    }

    fn product(&self, weights: &[u8], tiles: &[Tile], out: &mut [f32], rows: usize) {
        Arch::new().dispatch(Product { weights, tiles, out, rows, format: PhantomData::<F> });
    }

    fn check_scales(&self, name: &str, data: &[u8]) -> Result<()> {
        check_scales::<F>(name, data)
    }
}

/// Up to [`TILE`] rows of activations, part by part: part p of row r is `parts[p * width + r]`.
struct Tile {
    parts: Vec<[f32; PART]>,
    /// Number of rows, padded with zeros to a power of two.
    width: usize,
}

impl Tile {
    fn new(rows: &[f32], inner: usize) -> Self {
        let width = (rows.len() / inner).next_power_of_two();
        let (rows, _) = rows.as_chunks::<PART>();
        let per_row = inner / PART;
        let part = |i| rows.get(i % width * per_row + i / width).copied().unwrap_or([0.0; PART]);
        Self { parts: (0..per_row * width).map(part).collect(), width }
    }
}

/// Returns the products of a row of weights with the R rows of a tile. Each row uses A accumulators
/// in turn, so that even a few rows keep the multipliers busy.
#[inline(always)]
fn dot_products<S: Simd, F: Format, const R: usize, const A: usize>(
    simd: S,
    weights: &[u8],
    tile: &[[f32; PART]],
    out: &mut [f32],
) {
    let mut sums = [[simd.splat_f32s(0.0); A]; R];
    let parts = weights
        .chunks_exact(F::BYTES)
        .flat_map(|block| (0..F::PARTS).map(move |part| (block, part)));
    for ((block, part), x) in parts.zip(tile.as_chunks::<R>().0) {
        let (scale, offset, q) = F::unpack(block, part);
        let (scale, offset) = (simd.splat_f32s(scale), simd.splat_f32s(offset));
        // The register width divides a block, so there is no remainder.
        for (i, &q) in S::as_simd_f32s(&q).0.iter().enumerate() {
            let weights = simd.mul_add_e_f32s(scale, q, offset);
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[i % A] = simd.mul_add_e_f32s(weights, S::as_simd_f32s(x).0[i], sums[i % A]);
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        let sum = sums.into_iter().reduce(|a, b| simd.add_f32s(a, b));
        *out = sum.map_or(0.0, |sum| simd.reduce_sum_f32s(sum));
    }
}

/// Multiplies some rows of weights by all rows of activations. It is a struct and not a closure,
/// because only code that is inlined into `with_simd` is compiled for wide registers.
struct Product<'a, F> {
    weights: &'a [u8],
    tiles: &'a [Tile],
    /// `[out, rows]`
    out: &'a mut [f32],
    rows: usize,
    format: PhantomData<F>,
}

impl<F: Format> WithSimd for Product<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { weights, tiles, out, rows, .. } = self;
        let size = weights.len() / (out.len() / rows);
        for (out, row) in out.chunks_exact_mut(rows).zip(weights.chunks_exact(size)) {
            for (Tile { parts, width }, out) in tiles.iter().zip(out.chunks_mut(TILE)) {
                match width {
                    1 => dot_products::<S, F, 1, 4>(simd, row, parts, out),
                    2 => dot_products::<S, F, 2, 2>(simd, row, parts, out),
                    4 => dot_products::<S, F, 4, 2>(simd, row, parts, out),
                    _ => dot_products::<S, F, TILE, 1>(simd, row, parts, out),
                }
            }
        }
    }
}

/// Expands a row of weights to f32.
struct Expand<'a, F> {
    row: &'a [u8],
    out: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Format> WithSimd for Expand<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let blocks = self.row.chunks_exact(F::BYTES);
        for (block, out) in blocks.zip(self.out.chunks_exact_mut(PART * F::PARTS)) {
            for (part, out) in out.chunks_exact_mut(PART).enumerate() {
                let (scale, offset, q) = F::unpack(block, part);
                for (out, q) in out.iter_mut().zip(q) {
                    *out = scale * q + offset;
                }
            }
        }
    }
}

fn check_scales<F: Format>(name: &str, data: &[u8]) -> Result<()> {
    for (i, block) in data.chunks_exact(F::BYTES).enumerate() {
        for &at in F::HALVES {
            let value = half::f16::from_le_bytes([block[at], block[at + 1]]);
            if !value.is_finite() {
                let position = format!("block {i}");
                return Err(Error::NotFinite {
                    what: name.into(),
                    value: value.to_f32(),
                    position,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(dtype: GgmlDType, rows: usize, inner: usize) -> QuantizedMatrix {
        let dense = Tensor::randn(0f32, 1., (rows, inner), &Device::Cpu).unwrap();
        QuantizedMatrix::new("w", QTensor::quantize(&dense, dtype).unwrap()).unwrap()
    }

    fn distance(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn products_equal_candles_expansion_times_x() {
        use GgmlDType::{Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q3K, Q4K, Q5K, Q6K] {
            let m = matrix(dtype, 70, 512);
            let expanded = m.tensor.dequantize(&Device::Cpu).unwrap();
            assert_eq!(distance(&m.expand().unwrap(), &expanded), 0.0, "{dtype:?}");
            let ids = Tensor::new(&[69u32, 3], &Device::Cpu).unwrap();
            let rows = expanded.index_select(&ids, 0).unwrap();
            assert_eq!(distance(&m.rows(&ids).unwrap(), &rows), 0.0, "{dtype:?}");
            for rows in [1, 2, 3, 8, 13, 40] {
                let x = Tensor::randn(0f32, 1., (rows, 512), &Device::Cpu).unwrap();
                let want = x.matmul(&expanded.t().unwrap()).unwrap();
                // candle rounds the activations of its formats to 8 bits.
                let tolerance = if dtype == Q3K { 2.0 } else { 2e-4 };
                let error = distance(&m.forward(&x).unwrap(), &want);
                assert!(error < tolerance, "{dtype:?}, {rows} rows: {error}");
            }
        }
    }

    #[test]
    fn an_odd_number_of_blocks_is_multiplied_too() {
        for dtype in [GgmlDType::Q4_1, GgmlDType::Q5_0, GgmlDType::Q5_1] {
            let m = matrix(dtype, 70, 96);
            let x = Tensor::randn(0f32, 1., (3, 96), &Device::Cpu).unwrap();
            let want = x.matmul(&m.expand().unwrap().t().unwrap()).unwrap();
            assert!(distance(&m.forward(&x).unwrap(), &want) < 1e-4, "{dtype:?}");
        }
    }

    #[test]
    fn rows_stack_and_reorder() {
        let (a, b) = (matrix(GgmlDType::Q4_1, 3, 64), matrix(GgmlDType::Q4_1, 2, 64));
        let stacked = QuantizedMatrix::stack(&[&a, &b]).unwrap().unwrap();
        let turned = stacked.reorder(|i| 4 - i).unwrap();
        let ids = Tensor::new(&[1u32, 0], &Device::Cpu).unwrap();
        let want = Tensor::new(&[3u32, 4], &Device::Cpu).unwrap();
        let want = stacked.expand().unwrap().index_select(&want, 0).unwrap();
        assert_eq!(distance(&turned.rows(&ids).unwrap(), &want), 0.0);
        let other = matrix(GgmlDType::Q8_0, 2, 64);
        assert!(QuantizedMatrix::stack(&[&a, &other]).unwrap().is_none());
    }

    #[test]
    fn damage_and_misfits_are_named() {
        let m = matrix(GgmlDType::Q4_1, 2, 64);
        let mut data = m.tensor.data().unwrap().to_vec();
        data[20..22].copy_from_slice(&half::f16::NAN.to_le_bytes());
        let storage = QStorage::from_data(Cow::Owned(data), &Device::Cpu, GgmlDType::Q4_1).unwrap();
        let broken = QTensor::new(storage, (2, 64)).unwrap();
        let message = QuantizedMatrix::new("blk.0.attn_q.weight", broken).unwrap_err().to_string();
        assert_eq!(message, "blk.0.attn_q.weight: NaN at block 1");

        let x = Tensor::zeros((1, 63), DType::F32, &Device::Cpu).unwrap();
        assert!(m.forward(&x).unwrap_err().to_string().contains("[…, 64], got [1, 63]"));
        let id = Tensor::new(&[2u32], &Device::Cpu).unwrap();
        assert!(m.rows(&id).unwrap_err().to_string().contains("an id below 2, got 2"));
    }
}
