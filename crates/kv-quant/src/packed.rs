//! A packed matrix of tokens by channels.

mod views;

use crate::hadamard::rotated_out_of_range;
use crate::layout::{Layout, Line};
use crate::number::{Number, to_f16};
use crate::quantize::Quantizer;
use crate::{Axis, Error, Result, Scheme};
use half::f16;
pub(crate) use views::{PackedMut, PackedRef, PackedRow};

/// A quantized matrix: rows are tokens, columns are channels.
///
/// One axis is stored in *lanes*, the other is traversed in *steps*. The words of a lane hold the
/// codes of consecutive steps. A product with a vector over the steps (`q` over a key's channels,
/// attention weights over values' tokens) therefore has its sums in vector registers, one per lane,
/// without horizontal additions.
///
/// ```
/// use kv_quant::{Axis, Bits, Packed, Scheme};
///
/// let (tokens, channels) = (100, 64);
/// let x: Vec<f32> = (0..tokens * channels).map(|i| (i as f32 * 0.37).sin()).collect();
/// let scheme = Scheme::new(Bits::Four, Axis::Channels, 32)?;
/// let packed = Packed::quantize(&x, channels, scheme, Axis::Channels)?;
/// let mut back = vec![0.0; x.len()];
/// packed.dequantize(&mut back)?;
/// let half_a_step = 0.5 * 2.0 / 15.0;
/// assert!(x.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1.01 * half_a_step));
/// # Ok::<(), kv_quant::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Packed {
    layout: Layout,
    rows: usize,
    codes: Vec<Line>,
    scales: Vec<f16>,
    zero_points: Vec<f16>,
    factors: Vec<f16>,
}

impl Packed {
    /// Creates an empty matrix with a capacity of `capacity` rows of `columns` numbers, with the
    /// given axis in lanes.
    ///
    /// # Errors
    /// [`Error::Setting`] for an inconsistent scheme, or no columns.
    pub fn new(capacity: usize, columns: usize, scheme: Scheme, lanes: Axis) -> Result<Self> {
        let layout = Layout::new(capacity, columns, scheme, lanes)?;
        Ok(Self {
            layout,
            rows: 0,
            codes: vec![[0; 16]; layout.lines()],
            scales: vec![f16::ZERO; layout.scales()],
            zero_points: vec![f16::ZERO; layout.zero_points()],
            factors: vec![f16::ZERO; layout.factors()],
        })
    }

    /// Quantizes a row-major matrix of `columns` columns.
    ///
    /// # Errors
    /// [`Error::Setting`] as [`Packed::new`]; [`Error::Mismatch`] if the length of `src` is not a
    /// multiple of `columns`; [`Error::NotFinite`] and [`Error::OutOfRange`] with the position.
    pub fn quantize<T: Number>(
        src: &[T],
        columns: usize,
        scheme: Scheme,
        lanes: Axis,
    ) -> Result<Self> {
        let mut packed = Self::new(src.len() / columns.max(1), columns, scheme, lanes)?;
        packed.push(src, &mut Quantizer::default())?;
        Ok(packed)
    }

    /// Appends rows.
    ///
    /// # Errors
    /// As [`Packed::quantize`], and [`Error::Mismatch`] if the capacity is exceeded, or the last
    /// group along tokens was quantized with fewer rows than the group size. On an error nothing is
    /// appended.
    pub fn push<T: Number>(&mut self, src: &[T], quantizer: &mut Quantizer) -> Result<()> {
        let columns = self.layout.columns;
        if !src.len().is_multiple_of(columns) {
            let expected = format!("whole rows of {columns} numbers");
            return Err(Error::mismatch("matrix", expected, format!("{} numbers", src.len())));
        }
        let rows = to_f16(src, f16::MAX)
            .map_err(|at| Error::number(src[at].widen(), crate::Position::row(at, columns)))?;
        if self.layout.scheme.rotated
            && let Some((at, value)) = rotated_out_of_range(&rows, columns)
        {
            return Err(Error::number(value, crate::Position::row(at, columns)));
        }
        let mut view = self.view_mut();
        view.push(&rows, quantizer)?;
        self.rows = view.rows;
        Ok(())
    }

    fn view(&self) -> PackedRef<'_> {
        PackedRef {
            layout: self.layout,
            rows: self.rows,
            codes: &self.codes,
            scales: &self.scales,
            zero_points: &self.zero_points,
            factors: &self.factors,
        }
    }

    fn view_mut(&mut self) -> PackedMut<'_> {
        PackedMut {
            layout: self.layout,
            rows: self.rows,
            codes: &mut self.codes,
            scales: &mut self.scales,
            zero_points: &mut self.zero_points,
            factors: &mut self.factors,
        }
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the capacity in rows.
    pub fn capacity(&self) -> usize {
        self.layout.capacity
    }

    /// Returns the number of columns.
    pub fn columns(&self) -> usize {
        self.layout.columns
    }

    /// Returns the scheme.
    pub fn scheme(&self) -> Scheme {
        self.layout.scheme
    }

    /// Returns the code at a row and column; `None` outside the matrix.
    pub fn code(&self, row: usize, column: usize) -> Option<u8> {
        if row >= self.rows || column >= self.columns() {
            return None;
        }
        let mut codes = vec![0; self.columns()];
        self.view().unpack_row(row, &mut codes);
        Some(codes[column])
    }

    /// Returns the scale and zero point of a row and column's group; `None` outside the matrix. A
    /// static scale is rounded to f16, and codes without a zero point have 0.
    pub fn params(&self, row: usize, column: usize) -> Option<(f16, f16)> {
        if row >= self.rows || column >= self.columns() {
            return None;
        }
        let (scale, zero) = self.view().params(row, column);
        Some((f16::from_f32(scale), f16::from_f32(zero)))
    }

    /// Returns the factor of a row and column in a variance-normalized matrix: the row's if
    /// quantized along tokens, otherwise the column's. `None` outside the matrix and in other
    /// matrices.
    pub fn factor(&self, row: usize, column: usize) -> Option<f16> {
        if row >= self.rows || column >= self.columns() {
            return None;
        }
        self.factors.get(self.layout.factor_at(row, column)).copied()
    }

    /// Writes the dequantized matrix, (level * scale + zero) * factor rotated back, row-major, in
    /// f32.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless `out` has the size of the matrix.
    pub fn dequantize(&self, out: &mut [f32]) -> Result<()> {
        if out.len() != self.rows * self.columns() {
            let expected = format!("{} x {} numbers", self.rows, self.columns());
            return Err(Error::mismatch("output", expected, out.len()));
        }
        let codes = &mut Vec::new();
        for (row, out) in out.chunks_exact_mut(self.columns()).enumerate() {
            self.view().dequantize_row(row, codes, out);
        }
        Ok(())
    }

    /// Returns the bytes of the codes, and the bytes of scales, zero points and factors, both
    /// including memory allocated for future rows.
    pub fn bytes(&self) -> (usize, usize) {
        let params = [&self.scales, &self.zero_points, &self.factors];
        (size_of_val(&*self.codes), params.map(|x| size_of_val(&**x)).iter().sum())
    }
}
