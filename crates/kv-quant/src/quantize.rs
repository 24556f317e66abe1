//! Scales, zeros and codes of groups, in the arithmetic of KIVI's published functions on f16 tensors.
//!
//! Each operation is done in f32 and rounded to f16, as PyTorch does for half tensors: range = max - min, scale =
//! range / (2^bits - 1), code = round((x - min) / scale) with ties to even. A group whose scale is zero, be it constant or narrower than f16
//! can divide, has code 0 throughout and gives back its minimum.

use crate::vector::wide;
use crate::{Axis, Error, Result, Scheme};
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};

/// Quantizes rows of one width; keeps its scratch space from call to call.
#[derive(Debug, Default)]
pub struct Quantizer {
    x: Vec<f32>,
    min: Vec<f32>,
    max: Vec<f32>,
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
        self.scales.clear();
        self.zeros.clear();
        self.codes.resize(rows.len(), 0);
        let mut x = std::mem::take(&mut self.x);
        x.resize(rows.len(), 0.0);
        rows.convert_to_f32_slice(&mut x);
        let done = match scheme.along {
            Axis::Tokens => self.along_tokens(&x, columns, scheme),
            Axis::Channels => self.along_channels(&x, columns, scheme),
        };
        self.x = x;
        done
    }

    fn along_tokens(&mut self, x: &[f32], columns: usize, scheme: Scheme) -> Result<()> {
        self.min.clear();
        self.max.clear();
        self.min.resize(columns, f32::INFINITY);
        self.max.resize(columns, f32::NEG_INFINITY);
        x.chunks_exact(columns).for_each(|row| extremes(row, &mut self.min, &mut self.max));
        self.params(scheme, 0, 1)?;
        let largest = scheme.bits.max_code() as f32;
        for (row, codes) in x.chunks_exact(columns).zip(self.codes.chunks_exact_mut(columns)) {
            encode(row, &self.min, &self.max, largest, codes);
        }
        Ok(())
    }

    fn along_channels(&mut self, x: &[f32], columns: usize, scheme: Scheme) -> Result<()> {
        let largest = scheme.bits.max_code() as f32;
        for (r, row) in x.chunks_exact(columns).enumerate() {
            self.min.clear();
            self.max.clear();
            for group in row.chunks(scheme.group) {
                self.min.push(least(group));
                self.max.push(crate::vector::max(group));
            }
            self.params(scheme, r, scheme.group)?;
            spread(&mut self.min, scheme.group, columns);
            spread(&mut self.max, scheme.group, columns);
            let codes = &mut self.codes[r * columns..][..columns];
            encode(row, &self.min, &self.max, largest, codes);
        }
        Ok(())
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
}

wide! {
    /// Takes a row into its columns' least and largest numbers so far.
    fn extremes(x: &'a [f32], min: &'a mut [f32], max: &'a mut [f32]) -> () {
        for ((&x, min), max) in x.iter().zip(min).zip(max) {
            *min = if x < *min { x } else { *min };
            *max = if x > *max { x } else { *max };
        }
    }
}

wide! {
    /// The least of `x`.
    fn least(x: &'a [f32]) -> f32 {
        crate::vector::lanes(x, f32::INFINITY, |a, b| if b < a { b } else { a })
    }
}

wide! {
    /// The codes of a row, with one zero and one divisor per column.
    fn encode(x: &'a [f32], zeros: &'a [f32], divisors: &'a [f32], largest: f32, codes: &'a mut [u8]) -> () {
        for (((code, x), zero), divisor) in codes.iter_mut().zip(x).zip(zeros).zip(divisors) {
            *code = round(as_f16(as_f16(x - zero) / divisor), largest);
        }
    }
}

/// To the nearest number that f16 can hold, ties to even, for numbers from 0 to f16's largest.
#[inline(always)]
fn as_f16(x: f32) -> f32 {
    const LEAST_NORMAL: f32 = 6.103_515_6e-5; // 2^-14
    // Adding 0.5 to a smaller number leaves it 2^-24, f16's smallest, as its last place.
    let small = (x + 0.5) - 0.5;
    let bits = x.to_bits();
    let normal = f32::from_bits((bits + 0xfff + (bits >> 13 & 1)) & !0x1fff);
    if x < LEAST_NORMAL { small } else { normal }
}

/// To the nearest whole number from 0 to `largest`, ties to even.
#[inline(always)]
fn round(x: f32, largest: f32) -> u8 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    let x = if x > largest { largest } else { x };
    let x = if x < 0.0 { 0.0 } else { x };
    (x + MAGIC).to_bits() as u8
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_rounding_is_that_of_half() {
        let odd = 1013; // a step through all bit patterns
        for bits in (0..=65504f32.to_bits()).step_by(odd) {
            let x = f32::from_bits(bits);
            assert_eq!(as_f16(x), f16::from_f32(x).to_f32(), "{x:e}");
        }
        // Ties, among normal numbers and below.
        for x in
            [1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11), 2f32.powi(-25), 3.0 * 2f32.powi(-25)]
        {
            assert_eq!(as_f16(x), f16::from_f32(x).to_f32(), "{x:e}");
        }
    }
}
