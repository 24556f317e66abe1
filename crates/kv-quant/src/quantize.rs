//! Scales, zeros and codes of groups, in the arithmetic of KIVI's published functions on f16 tensors.
//!
//! Each operation is done in f32 and rounded to f16, as PyTorch does for half tensors: range = max - min, scale =
//! range / (2^bits - 1), code = round((x - min) / scale) with ties to even. A group whose scale is zero, be it constant or narrower than f16
//! can divide, has code 0 throughout and gives back its minimum.

use crate::{Axis, Error, Result, Scheme};
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::Arch;

/// Quantizes rows of one width; keeps its scratch space from call to call.
#[derive(Debug, Default)]
pub struct Quantizer {
    x: Vec<f32>,
    min: Vec<f32>,
    max: Vec<f32>,
    rounded: Vec<f16>,
    /// One code per number of the rows last given to [`group_rows`](Self::group_rows).
    pub codes: Vec<u8>,
    /// One scale per group of these rows.
    pub scales: Vec<f16>,
    /// One zero per group of these rows.
    pub zeros: Vec<f16>,
}

impl Quantizer {
    /// Quantizes `rows` of `columns` numbers. Along tokens they are one group per column: `columns` scales. Along channels each row has its
    /// own groups: scales come row by row.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a group whose range is beyond f16's, rows counted from the first given.
    pub fn group_rows(&mut self, rows: &[f16], columns: usize, scheme: Scheme) -> Result<()> {
        self.codes.clear();
        self.scales.clear();
        self.zeros.clear();
        match scheme.along {
            Axis::Tokens => {
                self.column_extremes(rows, columns);
                self.params(scheme, 0, 1)?;
                for row in rows.chunks_exact(columns) {
                    self.encode(row, scheme);
                }
            }
            Axis::Channels => {
                for (r, row) in rows.chunks_exact(columns).enumerate() {
                    self.row_extremes(row, scheme.group);
                    self.params(scheme, r, scheme.group)?;
                    spread(&mut self.min, scheme.group, columns);
                    spread(&mut self.max, scheme.group, columns);
                    self.encode(row, scheme);
                }
            }
        }
        Ok(())
    }

    fn widen(&mut self, row: &[f16]) {
        self.x.resize(row.len(), 0.0);
        row.convert_to_f32_slice(&mut self.x);
    }

    fn column_extremes(&mut self, rows: &[f16], columns: usize) {
        self.min.clear();
        self.max.clear();
        self.min.resize(columns, f32::INFINITY);
        self.max.resize(columns, f32::NEG_INFINITY);
        for row in rows.chunks_exact(columns) {
            self.widen(row);
            let (x, min, max) = (&self.x, &mut self.min, &mut self.max);
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for ((&x, min), max) in x.iter().zip(min).zip(max) {
                        *min = if x < *min { x } else { *min };
                        *max = if x > *max { x } else { *max };
                    }
                },
            );
        }
    }

    fn row_extremes(&mut self, row: &[f16], group: usize) {
        self.widen(row);
        self.min.clear();
        self.max.clear();
        let (x, min, max) = (&self.x, &mut self.min, &mut self.max);
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for group in x.chunks(group) {
                    min.push(fold(group, f32::INFINITY, |a, b| if b < a { b } else { a }));
                    max.push(fold(group, f32::NEG_INFINITY, |a, b| if b > a { b } else { a }));
                }
            },
        );
    }

    /// From extremes to parameters: appends scales and zeros; leaves zeros in `min` and divisors in `max`.
    fn params(&mut self, scheme: Scheme, row: usize, step: usize) -> Result<()> {
        for (group, (min, max)) in self.min.iter_mut().zip(&mut self.max).enumerate() {
            let range = f16::from_f32(*max - *min);
            if range.is_infinite() {
                return Err(Error::OutOfRange { value: *max - *min, row, column: group * step });
            }
            let scale = f16::from_f32(range.to_f32() / scheme.bits.max_code() as f32);
            self.scales.push(scale);
            self.zeros.push(f16::from_f32(*min));
            // Division by infinity makes code 0 of every number of a group without a scale.
            *max = if scale == f16::ZERO { f32::INFINITY } else { scale.to_f32() };
        }
        Ok(())
    }

    /// Appends the codes of a row, whose zeros lie in `min` and divisors in `max`, one per column.
    fn encode(&mut self, row: &[f16], scheme: Scheme) {
        self.widen(row);
        self.rounded.resize(row.len(), f16::ZERO);
        let (x, zero, divisor) = (&mut self.x, &self.min, &self.max);
        let arch = Arch::new();
        arch.dispatch(
            #[inline(always)]
            || x.iter_mut().zip(zero).for_each(|(x, zero)| *x -= zero),
        );
        self.rounded.convert_from_f32_slice(x);
        self.rounded.convert_to_f32_slice(x);
        arch.dispatch(
            #[inline(always)]
            || x.iter_mut().zip(divisor).for_each(|(x, divisor)| *x /= divisor),
        );
        self.rounded.convert_from_f32_slice(x);
        self.rounded.convert_to_f32_slice(x);
        let start = self.codes.len();
        self.codes.resize(start + row.len(), 0);
        let (codes, largest) = (&mut self.codes[start..], scheme.bits.max_code() as f32);
        arch.dispatch(
            #[inline(always)]
            || codes.iter_mut().zip(x).for_each(|(code, x)| *code = round(*x, largest)),
        );
    }
}

/// To the nearest whole number from 0 to `largest`, ties to even.
#[inline(always)]
fn round(x: f32, largest: f32) -> u8 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    let x = if x > largest { largest } else { x };
    let x = if x < 0.0 { 0.0 } else { x };
    (x + MAGIC).to_bits() as u8
}

/// Folds with 16 independent accumulators, which vectors can follow; `op` is associative and commutative.
#[inline(always)]
fn fold(x: &[f32], start: f32, op: impl Fn(f32, f32) -> f32 + Copy) -> f32 {
    let mut acc = [start; 16];
    let chunks = x.chunks_exact(16);
    let tail = chunks.remainder().iter().copied().fold(start, op);
    for chunk in chunks {
        for (a, &x) in acc.iter_mut().zip(chunk) {
            *a = op(*a, x);
        }
    }
    acc.into_iter().fold(tail, op)
}

/// From one number per group to one per column.
fn spread(x: &mut Vec<f32>, group: usize, columns: usize) {
    let groups = x.len();
    x.resize(columns, 0.0);
    for g in (0..groups).rev() {
        let value = x[g];
        x[g * group..columns.min((g + 1) * group)].fill(value);
    }
}
