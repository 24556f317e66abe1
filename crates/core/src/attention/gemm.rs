//! Small single-threaded matrix products: the `gemm` crate behind bounds checks.

use gemm::Parallelism;

/// A row-major matrix, or the transpose of one.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Creates a view of `rows` rows of `cols` elements, row-major and contiguous.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} matrix");
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Returns the transposed view.
    pub fn transpose(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// Computes `out = a b`, or `out += a b` if `add`. `out` is row-major with rows `row_stride`
/// elements apart.
#[allow(unsafe_code)]
pub fn multiply(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32], row_stride: usize, add: bool) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    if a.rows == 0 || b.cols == 0 {
        return;
    }
    assert!(b.cols <= row_stride, "rows of the product must not overlap");
    assert!((a.rows - 1) * row_stride + b.cols <= out.len(), "the product does not fit");
    // SAFETY: `Matrix::new` checked that `data` holds `rows * cols` elements, and `transpose`
    // covers the same elements. So every element that gemm reads through these strides lies within
    // `a.data` and `b.data`. The assertions above keep every element that it writes within `out`,
    // which is borrowed mutably and so has no alias.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            row_stride as isize,
            add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_textbook() {
        let a: Vec<f32> = (0..3 * 5).map(|i| i as f32 - 4.0).collect();
        let b: Vec<f32> = (0..4 * 5).map(|i| 7.0 - i as f32).collect();
        // a times the transpose of b, written to rows six elements apart.
        let mut out = vec![1.0; 3 * 6];
        multiply(Matrix::new(&a, 3, 5), Matrix::new(&b, 4, 5).transpose(), &mut out, 6, true);
        for r in 0..3 {
            for c in 0..6 {
                let product: f32 = (0..5).map(|i| a[r * 5 + i] * b[(c % 4) * 5 + i]).sum();
                assert_eq!(out[r * 6 + c], if c < 4 { 1.0 + product } else { 1.0 });
            }
        }
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn refuses_to_write_past_the_end() {
        let a = [1.0; 4];
        multiply(Matrix::new(&a, 2, 2), Matrix::new(&a, 2, 2), &mut [0.0; 3], 2, false);
    }
}
