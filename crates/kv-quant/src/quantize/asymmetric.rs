//! Scales, zero points and codes of groups, in the arithmetic of KIVI's published functions on f16
//! tensors.
//!
//! Each operation is computed in f32 and rounded to f16, as PyTorch does for f16 tensors: range =
//! max - min, scale = range / (2^bits - 1), code = round((x - min) / scale) with ties to even. A
//! group with a scale of zero, because it is constant or its range is too small for f16, has only
//! code 0, which dequantizes to its minimum.

use super::Quantizer;
use crate::{Axis, Error, Position, Result, Scheme};
use half::f16;
use half::slice::HalfFloatSliceExt;
use longctx_simd::{fold_lanes, wide};

impl Quantizer {
    /// Quantizes the rows in `x`, whose numbers are representable in f16.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if the range of a group exceeds f16's. The row is relative to the
    /// first given.
    pub(super) fn asymmetric(&mut self, columns: usize, scheme: Scheme) -> Result<()> {
        let groups = match scheme.axis {
            Axis::Tokens => columns,
            Axis::Channels => self.x.len() / columns * columns.div_ceil(scheme.group),
        };
        for x in [&mut self.min, &mut self.max, &mut self.scale] {
            x.resize(groups, 0.0);
        }
        let Self { x, min, max, .. } = self;
        match scheme.axis {
            Axis::Tokens => extremes_of_columns(x, min, max),
            Axis::Channels => extremes_of_groups(x, columns, scheme.group, min, max),
        }
        self.params(scheme, columns)?;
        let Self { x, min, max, codes, .. } = self;
        let largest = scheme.bits.max_code() as f32;
        match scheme.axis {
            Axis::Tokens => encode_columns(x, min, max, largest, codes),
            Axis::Channels => encode_groups(x, columns, scheme.group, min, max, largest, codes),
        }
        Ok(())
    }

    /// Converts minima and maxima to scales and zero points; leaves zero points in `min` and
    /// divisors in `max`.
    fn params(&mut self, scheme: Scheme, columns: usize) -> Result<()> {
        const BEYOND: f32 = 65520.0; // rounds to infinity
        let Self { min, max, scale, .. } = self;
        if let Some(group) = (0..min.len()).find(|&group| max[group] - min[group] >= BEYOND) {
            let (row, column) = match scheme.axis {
                Axis::Tokens => (0, group),
                Axis::Channels => {
                    let groups = columns.div_ceil(scheme.group);
                    (group / groups, group % groups * scheme.group)
                }
            };
            let at = Position::Matrix { row, column };
            return Err(Error::OutOfRange { value: max[group] - min[group], at });
        }
        scales(min, max, scheme.bits.max_code() as f32, scale);
        self.scales.resize(min.len(), f16::ZERO);
        self.zero_points.resize(min.len(), f16::ZERO);
        self.scales.convert_from_f32_slice(scale);
        self.zero_points.convert_from_f32_slice(min);
        Ok(())
    }
}

wide! {
    /// Returns the minimum and maximum of each column.
    fn extremes_of_columns(x: &'a [f32], min: &'a mut [f32], max: &'a mut [f32]) -> () {
        min.fill(f32::INFINITY);
        max.fill(f32::NEG_INFINITY);
        for row in x.chunks_exact(min.len()) {
            for ((&x, min), max) in row.iter().zip(min.iter_mut()).zip(max.iter_mut()) {
                *min = if x < *min { x } else { *min };
                *max = if x > *max { x } else { *max };
            }
        }
    }
}

wide! {
    /// Returns the minimum and maximum of each group of each row.
    fn extremes_of_groups(x: &'a [f32], columns: usize, group: usize, min: &'a mut [f32], max: &'a mut [f32]) -> () {
        let groups = x.chunks_exact(columns).flat_map(|row| row.chunks(group));
        for ((group, min), max) in groups.zip(min).zip(max) {
            *min = fold_lanes(group, f32::INFINITY, |a, b| if b < a { b } else { a });
            *max = fold_lanes(group, f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
        }
    }
}

wide! {
    /// Computes scales of groups, and leaves the divisors of differences in `max`: infinity, so
    /// that all codes are 0, in a group without a scale.
    fn scales(min: &'a [f32], max: &'a mut [f32], largest: f32, scales: &'a mut [f32]) -> () {
        for ((min, max), scale) in min.iter().zip(max).zip(scales) {
            *scale = as_f16(as_f16(*max - min) / largest);
            *max = if *scale == 0.0 { f32::INFINITY } else { *scale };
        }
    }
}

wide! {
    /// Encodes rows with one zero point and one divisor per column.
    fn encode_columns(x: &'a [f32], zero_points: &'a [f32], divisors: &'a [f32], largest: f32, codes: &'a mut [u8]) -> () {
        for (row, codes) in x.chunks_exact(zero_points.len()).zip(codes.chunks_exact_mut(zero_points.len())) {
            for (((code, x), zero), divisor) in codes.iter_mut().zip(row).zip(zero_points).zip(divisors) {
                *code = encode(*x, *zero, *divisor, largest);
            }
        }
    }
}

wide! {
    /// Encodes rows whose groups have one zero point and one divisor each.
    fn encode_groups(x: &'a [f32], columns: usize, group: usize, zero_points: &'a [f32], divisors: &'a [f32], largest: f32, codes: &'a mut [u8]) -> () {
        let groups = x.chunks_exact(columns).flat_map(|row| row.chunks(group));
        let codes = codes.chunks_exact_mut(columns).flat_map(|row| row.chunks_mut(group));
        for (((group, codes), zero), divisor) in groups.zip(codes).zip(zero_points).zip(divisors) {
            for (code, x) in codes.iter_mut().zip(group) {
                *code = encode(*x, *zero, *divisor, largest);
            }
        }
    }
}

#[inline(always)]
fn encode(x: f32, zero: f32, divisor: f32, largest: f32) -> u8 {
    round(as_f16(as_f16(x - zero) / divisor), largest)
}

/// Rounds to the nearest f16 number, ties to even, for numbers from 0 to f16's largest.
#[inline(always)]
fn as_f16(x: f32) -> f32 {
    const MIN_NORMAL: f32 = 6.103_515_6e-5; // 2^-14
    // Adding 0.5 to a smaller number makes 2^-24, f16's smallest number, the last place.
    let small = (x + 0.5) - 0.5;
    let bits = x.to_bits();
    let normal = f32::from_bits((bits + 0xfff + (bits >> 13 & 1)) & !0x1fff);
    if x < MIN_NORMAL { small } else { normal }
}

/// Rounds to the nearest integer from 0 to `largest`, ties to even.
#[inline(always)]
fn round(x: f32, largest: f32) -> u8 {
    // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let x = if x > largest { largest } else { x };
    let x = if x < 0.0 { 0.0 } else { x };
    (x + MAGIC).to_bits() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_rounding_is_that_of_half() {
        // An odd step through all bit patterns.
        let odd = if cfg!(miri) { 1_000_003 } else { 1013 };
        for bits in (0..=65504f32.to_bits()).step_by(odd) {
            let x = f32::from_bits(bits);
            assert_eq!(as_f16(x), f16::from_f32(x).to_f32(), "{x:e}");
        }
        // Ties, among normal and subnormal numbers.
        for x in
            [1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11), 2f32.powi(-25), 3.0 * 2f32.powi(-25)]
        {
            assert_eq!(as_f16(x), f16::from_f32(x).to_f32(), "{x:e}");
        }
    }
}
