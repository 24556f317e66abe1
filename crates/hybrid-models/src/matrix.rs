//! Weight matrices. Products with many rows use `gemm`; products with few rows read the weights
//! once.

use std::fmt;

use crate::simd::dot;
use crate::split_columns::{UnitMatrix, split_columns};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use longctx_core::{Error, Result};
use longctx_simd::matrix::{self, Parallelism};
use pulp::{Arch, Simd, WithSimd};

/// Up to this many rows, a product is limited by reading the weights.
const FEW_ROWS: usize = 4;
/// Outputs that a thread computes at a time if there are few rows: their weights fit in the L2
/// cache.
const OUTPUTS: usize = 32;
/// Products smaller than this use one thread.
const PARALLEL: usize = 1 << 15;
/// Rows of a half-precision matrix that are converted to f32 at a time.
const PANEL: usize = 256;

/// A weight matrix `[out, inner]` in its own dtype.
#[derive(Clone)]
pub struct Matrix {
    out: usize,
    inner: usize,
    data: Data,
}

#[derive(Clone)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let format = match self.data {
            Data::F32(_) => "f32",
            Data::F16(_) => "f16",
            Data::Bf16(_) => "bf16",
        };
        write!(f, "Matrix({format} [{}, {}])", self.out, self.inner)
    }
}

/// Rows of numbers at distance `stride`: a matrix, or some columns of one.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub width: usize,
}

impl<'a> Rows<'a> {
    /// Creates a view of contiguous rows of `width` elements.
    pub fn new(data: &'a [f32], width: usize) -> Self {
        Self { data, stride: width, width }
    }

    /// Returns the columns `start..start + width` of these rows.
    pub fn columns(self, start: usize, width: usize) -> Self {
        assert!(
            start + width <= self.width,
            "columns {start}..{} of {}",
            start + width,
            self.width
        );
        let data = self.data.get(start..).unwrap_or_default();
        Self { data, stride: self.stride, width }
    }

    /// Returns the rows `start..start + count`.
    pub fn part(self, start: usize, count: usize) -> Self {
        let first = start * self.stride;
        let end = match count {
            0 => first,
            _ => first + (count - 1) * self.stride + self.width,
        };
        Self { data: &self.data[first..end], ..self }
    }

    /// Returns a view of the first `rows` rows for products.
    pub fn view(self, rows: usize) -> matrix::Matrix<'a> {
        matrix::Matrix::with_stride(self.data, rows, self.width, self.stride)
    }

    pub fn row(self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.width]
    }
}

impl Matrix {
    /// Creates a matrix from a two-dimensional tensor in f32, f16 or bf16.
    pub fn new(weights: &Tensor) -> Result<Self> {
        let (out, inner) = weights.dims2()?;
        let flat = weights.flatten_all()?;
        let data = match flat.dtype() {
            DType::F32 => Data::F32(flat.to_vec1()?),
            DType::F16 => Data::F16(flat.to_vec1()?),
            DType::BF16 => Data::Bf16(flat.to_vec1()?),
            other => return Err(Error::setting("dtype", "f32, f16 or bf16", other.as_str())),
        };
        Ok(Self { out, inner, data })
    }

    pub fn out(&self) -> usize {
        self.out
    }

    /// Returns the dtype.
    #[cfg(feature = "cuda")]
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::Bf16(_) => DType::BF16,
        }
    }

    /// Returns a copy `[out, inner]` on a device.
    #[cfg(feature = "cuda")]
    pub fn to_tensor(&self, device: &candle_core::Device) -> Result<Tensor> {
        let shape = (self.out, self.inner);
        Ok(match &self.data {
            Data::F32(w) => Tensor::from_slice(w, shape, device)?,
            Data::F16(w) => Tensor::from_slice(w, shape, device)?,
            Data::Bf16(w) => Tensor::from_slice(w, shape, device)?,
        })
    }

    /// Writes one row of the matrix in f32: an embedding.
    pub fn row(&self, i: usize, into: &mut [f32]) {
        self.widen(i..i + 1, into);
    }

    /// Computes `y[r] = W x[r]`. `y` has rows of `out` elements.
    pub fn apply(&self, x: Rows<'_>, y: &mut [f32]) {
        self.apply_on(x, y, true);
    }

    /// Computes the same on one thread, for use inside a parallel task.
    pub fn apply_alone(&self, x: Rows<'_>, y: &mut [f32]) {
        self.apply_on(x, y, false);
    }

    fn apply_on(&self, x: Rows<'_>, y: &mut [f32], threads: bool) {
        let rows = y.len() / self.out;
        assert_eq!(x.width, self.inner, "columns of the input");
        assert_eq!(y.len(), rows * self.out, "rows of {} numbers", self.out);
        if rows <= FEW_ROWS {
            return self.apply_few(x, rows, y, threads);
        }
        if let Data::F32(w) = &self.data {
            return product(x, rows, w, y, self.out, threads);
        }
        let mut panel = vec![0.0; PANEL.min(self.out) * self.inner];
        for start in (0..self.out).step_by(PANEL) {
            let end = self.out.min(start + PANEL);
            let panel = &mut panel[..(end - start) * self.inner];
            self.widen(start..end, panel);
            product(x, rows, panel, &mut y[start..], self.out, threads);
        }
    }

    fn apply_few(&self, x: Rows<'_>, rows: usize, y: &mut [f32], threads: bool) {
        let parallel = threads && self.out * self.inner * rows >= PARALLEL;
        let y = [UnitMatrix { data: y, per_unit: 1 }];
        split_columns(self.out, OUTPUTS, parallel, y, |outputs, [mut y]| {
            let weights = outputs.start * self.inner..outputs.end * self.inner;
            for row in 0..rows {
                let (x, y) = (x.row(row), y.row(row));
                match &self.data {
                    Data::F32(w) => Arch::new().dispatch(Dots { w: &w[weights.clone()], x, y }),
                    Data::F16(w) => Arch::new().dispatch(Dots { w: &w[weights.clone()], x, y }),
                    Data::Bf16(w) => Arch::new().dispatch(Dots { w: &w[weights.clone()], x, y }),
                }
            }
        });
    }

    fn widen(&self, rows: std::ops::Range<usize>, into: &mut [f32]) {
        let range = rows.start * self.inner..rows.end * self.inner;
        match &self.data {
            Data::F32(w) => into.copy_from_slice(&w[range]),
            Data::F16(w) => Arch::new().dispatch(Widen { from: &w[range], into }),
            Data::Bf16(w) => Arch::new().dispatch(Widen { from: &w[range], into }),
        }
    }
}

/// An element type of weights.
trait Number: Copy + Send + Sync {
    fn widen(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

impl Number for f16 {
    /// Shifts exponent and mantissa to their place in f32; the multiplication corrects the
    /// exponent's bias, including subnormal numbers. Unlike a loop of the library's conversion, a
    /// loop of this vectorizes. Infinities become large numbers: weights have none.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((254 - 15) << 23);
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }
}

struct Widen<'a, T> {
    from: &'a [T],
    into: &'a mut [f32],
}

impl<T: Number> WithSimd for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (y, x) in self.into.iter_mut().zip(self.from) {
            *y = x.widen();
        }
    }
}

/// Computes `y[i]`, row i of `w` times `x`.
struct Dots<'a, T> {
    w: &'a [T],
    x: &'a [f32],
    y: &'a mut [f32],
}

impl WithSimd for Dots<'_, f32> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (w, y) in self.w.chunks_exact(self.x.len()).zip(self.y) {
            *y = dot(simd, w, self.x);
        }
    }
}

/// Converts weights to f32 in small pieces that stay in the L1 cache.
macro_rules! half_dots {
    ($type:ty) => {
        impl WithSimd for Dots<'_, $type> {
            type Output = ();

            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                let mut wide = [0.0; 512];
                for (w, y) in self.w.chunks_exact(self.x.len()).zip(self.y) {
                    let mut sum = 0.0;
                    for (w, x) in w.chunks(wide.len()).zip(self.x.chunks(wide.len())) {
                        let wide = &mut wide[..w.len()];
                        for (y, x) in wide.iter_mut().zip(w) {
                            *y = x.widen();
                        }
                        sum += dot(simd, wide, x);
                    }
                    *y = sum;
                }
            }
        }
    };
}

half_dots!(f16);
half_dots!(bf16);

/// Computes `y[r][o] = x[r] · w[o]` for `rows` rows and all rows of `w`. Rows of `y` are `y_stride`
/// apart.
fn product(x: Rows<'_>, rows: usize, w: &[f32], y: &mut [f32], y_stride: usize, threads: bool) {
    let outputs = w.len() / x.width;
    let threads = match threads && rows * w.len() >= 1 << 18 {
        true => Parallelism::Rayon(0),
        false => Parallelism::None,
    };
    let w = matrix::Matrix::new(w, outputs, x.width).transpose();
    matrix::multiply(x.view(rows), w, y, y_stride, 0.0, threads);
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn every_format_and_row_count_equals_candles_product() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut random = |rows: usize, columns: usize| {
            let numbers: Vec<f32> =
                (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect();
            Tensor::from_vec(numbers, (rows, columns), &Device::Cpu).unwrap()
        };
        let weights = random(300, 70);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let weights = weights.to_dtype(dtype).unwrap();
            let matrix = Matrix::new(&weights).unwrap();
            let exact = weights.to_dtype(DType::F32).unwrap();
            for rows in [1, 3, 4, 5, 33] {
                let x = random(rows, 80);
                let want = x.narrow(1, 6, 70).unwrap().matmul(&exact.t().unwrap()).unwrap();
                let data: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
                let mut got = vec![f32::NAN; rows * 300];
                matrix.apply(Rows::new(&data, 80).columns(6, 70), &mut got);
                let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
                for (got, want) in got.iter().zip(&want) {
                    assert!((got - want).abs() < 1e-4, "{dtype:?}, {rows} rows: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn every_finite_f16_is_widened_exactly() {
        for x in (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()) {
            assert_eq!(x.widen().to_bits(), x.to_f32().to_bits());
        }
    }
}
