//! Matrix products: the `gemm` crate behind bounds checks.
#![allow(unsafe_code)]

pub use gemm::Parallelism;

/// A view of a matrix, row-major or transposed.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Creates a view of contiguous rows.
    ///
    /// # Panics
    /// If `data` does not have `rows * columns` elements.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        let (len, elements) = (data.len(), rows.checked_mul(columns));
        assert_eq!(Some(len), elements, "{len} elements for a {rows} x {columns} matrix");
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    /// Creates a view of rows that are `row_stride` elements apart.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn with_stride(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        let row_stride = stride(rows, columns, row_stride);
        let fits = end(rows, columns, row_stride).is_some_and(|end| end <= data.len());
        assert!(fits, "a {rows} x {columns} matrix does not fit");
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// Returns the transposed view.
    pub fn transpose(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// Returns the index after the last element of a matrix; `None` if it exceeds `usize`.
fn end(rows: usize, columns: usize, row_stride: usize) -> Option<usize> {
    match rows.checked_sub(1) {
        Some(last) if columns > 0 => last.checked_mul(row_stride)?.checked_add(columns),
        _ => Some(0),
    }
}

/// Returns the distance of rows. That of a single row has no meaning and could be negative as an
/// `isize`.
fn stride(rows: usize, columns: usize, row_stride: usize) -> usize {
    if rows > 1 { row_stride } else { columns }
}

/// Computes `out = keep * out + a b`. Rows of `out` are `row_stride` elements apart. If `keep` is
/// 0, `out` is not read.
///
/// # Panics
/// If the inner dimensions differ, or if the product does not fit `out`.
pub fn multiply(
    a: Matrix<'_>,
    b: Matrix<'_>,
    out: &mut [f32],
    row_stride: usize,
    keep: f32,
    threads: Parallelism,
) {
    assert_eq!(a.columns, b.rows, "inner dimensions");
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    assert!(b.columns <= row_stride, "rows of the product must not overlap");
    let row_stride = stride(a.rows, b.columns, row_stride);
    let fits = end(a.rows, b.columns, row_stride).is_some_and(|end| end <= out.len());
    assert!(fits, "the product does not fit");
    if a.columns == 0 {
        let scale = |x: &mut f32| *x = if keep == 0.0 { 0.0 } else { keep * *x };
        out.chunks_mut(row_stride).take(a.rows).for_each(|row| {
            row[..b.columns].iter_mut().for_each(scale);
        });
        return;
    }
    // SAFETY: the constructors of `Matrix` checked, without overflow, that the last element that its
    // strides reach is in `data`. So strides fit `isize` and are not negative, and every element that gemm reads is within `a.data`
    // and `b.data`. The assertions above check the same for the elements that it writes to `out`,
    // which is borrowed mutably and so has no alias.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            row_stride as isize,
            keep != 0.0,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            keep,
            1.0,
            false,
            false,
            false,
            threads,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `a` times the transpose of `b`, both with rows further apart than their columns, written to
    /// rows six elements apart.
    #[test]
    fn a_product_equals_a_loop() {
        let a: Vec<f32> = (0..3 * 7).map(|i| i as f32 - 4.0).collect();
        let b: Vec<f32> = (0..4 * 6).map(|i| 7.0 - i as f32).collect();
        for keep in [0.0, 1.0, 2.0] {
            let mut out = vec![1.0; 3 * 6];
            let left = Matrix::with_stride(&a[1..], 3, 5, 7);
            let right = Matrix::with_stride(&b, 4, 5, 6).transpose();
            multiply(left, right, &mut out, 6, keep, Parallelism::None);
            for r in 0..3 {
                for c in 0..6 {
                    let product: f32 = (0..5).map(|i| a[1 + r * 7 + i] * b[(c % 4) * 6 + i]).sum();
                    assert_eq!(out[r * 6 + c], if c < 4 { keep + product } else { 1.0 });
                }
            }
        }
    }

    #[test]
    fn a_product_of_no_terms_is_zero() {
        let mut out = [2.0; 4];
        let (a, b) = (Matrix::new(&[], 2, 0), Matrix::new(&[], 0, 1));
        multiply(a, b, &mut out, 2, 0.5, Parallelism::None);
        assert_eq!(out, [1.0, 2.0, 1.0, 2.0]);
        multiply(a, b, &mut out, 2, 0.0, Parallelism::None);
        assert_eq!(out, [0.0, 2.0, 0.0, 2.0]);
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_product_that_does_not_fit_is_refused() {
        let a = Matrix::new(&[1.0; 4], 2, 2);
        multiply(a, a, &mut [0.0; 3], 2, 0.0, Parallelism::None);
    }

    #[test]
    #[should_panic(expected = "a 2 x 3 matrix does not fit")]
    fn a_short_factor_is_refused() {
        let _ = Matrix::with_stride(&[1.0; 5], 2, 3, 3);
    }

    /// The sizes are products that wrap around to numbers that would fit.
    #[test]
    fn sizes_beyond_the_address_space_are_refused() {
        let half = 1 << (usize::BITS / 2);
        let refused = |f: &dyn Fn()| {
            let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_err();
            panic
                .downcast_ref::<String>()
                .map_or_else(|| panic.downcast_ref::<&str>().unwrap().to_string(), Clone::clone)
        };
        let new = refused(&|| _ = Matrix::new(&[], half, half));
        assert!(new.contains("0 elements"), "{new}");
        let strided = refused(&|| _ = Matrix::with_stride(&[1.0; 4], half + 1, 1, half));
        assert!(strided.contains("does not fit"), "{strided}");
        // A column is a matrix with rows one element apart.
        let column = vec![1.0; 3];
        let one = Matrix::with_stride(&[1.0], 1, 1, usize::MAX);
        let left = Matrix::with_stride(&column, 3, 1, 1);
        let product =
            refused(&|| multiply(left, one, &mut [0.0; 4], usize::MAX, 0.0, Parallelism::None));
        assert!(product.contains("does not fit"), "{product}");
        // The stride of a single row is not used.
        let mut out = [0.0];
        multiply(one, one, &mut out, usize::MAX, 0.0, Parallelism::None);
        assert_eq!(out, [1.0]);
    }
}
