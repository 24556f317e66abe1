//! KVarN's codes (arXiv 2606.03458). Rows and columns of a tile are divided by factors that
//! equalize their variances. The factors are found by alternating iterations in the logarithmic
//! domain. The normalized tile is quantized to asymmetric integers, in f32 arithmetic.
//!
//! Keys have a scale and a zero point per channel and a factor per token; values have a scale and a
//! zero point per token and a factor per channel.

use super::Quantizer;
use crate::{Axis, Scheme};
use half::f16;
use longctx_simd::{fold_lanes, wide};

/// Number of iterations: the published code's default. More have no effect.
const ITERATIONS: usize = 8;
/// Bounds of deviations and of logarithms of factors.
const DEVIATIONS: (f32, f32) = (1e-3, 1e3);
const LOGARITHMS: (f32, f32) = (-0.3, 10.0);
/// The smallest scale.
const MIN_SCALE: f32 = 1e-10;

/// Factors of rows and columns, and buffers.
#[derive(Debug, Default)]
pub struct VarianceNormalizer {
    /// The tile divided by its factors.
    tile: Vec<f32>,
    rows: AxisFactors,
    columns: AxisFactors,
    sums: Vec<f64>,
    squares: Vec<f64>,
}

/// One axis.
#[derive(Debug, Default)]
struct AxisFactors {
    logarithms: Vec<f32>,
    factors: Vec<f32>,
    /// Standard deviations of the tile.
    deviations: Vec<f32>,
    /// The factors of the iteration with the most even deviations.
    best_factors: Vec<f32>,
}

impl Quantizer {
    /// Quantizes the rows in `x`, one tile.
    pub(super) fn variance_normalized(&mut self, columns: usize, scheme: Scheme) {
        let Self { x, codes, scales, zero_points, factors, min, max, normalizer, .. } = self;
        normalizer.normalize(x, columns, scheme.axis);
        let VarianceNormalizer { tile, rows, columns: of_columns, .. } = normalizer;
        let (scaled, other) = match scheme.axis {
            Axis::Tokens => (of_columns, rows),
            Axis::Channels => (rows, of_columns),
        };
        factors.extend(other.best_factors.iter().map(|&factor| f16::from_f32(factor)));
        min.clear();
        min.resize(scaled.best_factors.len(), f32::INFINITY);
        max.clear();
        max.resize(scaled.best_factors.len(), f32::NEG_INFINITY);
        match scheme.axis {
            Axis::Tokens => extremes_of_columns(tile, min, max),
            Axis::Channels => extremes_of_rows(tile, columns, min, max),
        }
        let largest = scheme.bits.max_code() as f32;
        // Converts minima and maxima to zero points and scales.
        for ((&mut min, max), factor) in min.iter_mut().zip(&mut *max).zip(&scaled.best_factors) {
            *max = ((*max - min) / largest).max(MIN_SCALE);
            scales.push(f16::from_f32(factor * *max));
            zero_points.push(f16::from_f32(factor * min));
        }
        match scheme.axis {
            Axis::Tokens => encode_columns(tile, min, max, largest, codes),
            Axis::Channels => encode_rows(tile, columns, min, max, largest, codes),
        }
    }
}

impl VarianceNormalizer {
    /// Finds the best factors and divides the tile by them. Each iteration processes the axis
    /// without scales first.
    fn normalize(&mut self, x: &[f32], columns: usize, axis: Axis) {
        self.rows.clear(x.len() / columns);
        self.columns.clear(columns);
        self.divide(x, axis);
        self.measure();
        let mut best = f32::INFINITY;
        for round in 0..=ITERATIONS {
            if round > 0 {
                self.axis_factors(axis == Axis::Channels).update();
                self.divide(x, axis);
                self.measure_side(axis == Axis::Tokens);
                self.axis_factors(axis == Axis::Tokens).update();
                self.divide(x, axis);
                self.measure();
            }
            let spread = self.rows.spread() + self.columns.spread();
            if spread <= best {
                best = spread;
                self.rows.keep_best();
                self.columns.keep_best();
            }
        }
        for side in [&mut self.rows, &mut self.columns] {
            side.factors.clone_from(&side.best_factors);
        }
        self.divide(x, axis);
    }

    fn axis_factors(&mut self, columns: bool) -> &mut AxisFactors {
        if columns { &mut self.columns } else { &mut self.rows }
    }

    /// Divides the tile by the factors of the axis without scales, then by those of the other axis.
    fn divide(&mut self, x: &[f32], axis: Axis) {
        let Self { tile, rows, columns, .. } = self;
        tile.resize(x.len(), 0.0);
        match axis {
            Axis::Tokens => divide_rows_first(x, &rows.factors, &columns.factors, tile),
            Axis::Channels => divide_columns_first(x, &rows.factors, &columns.factors, tile),
        }
    }

    fn measure(&mut self) {
        self.measure_side(false);
        self.measure_side(true);
    }

    fn measure_side(&mut self, of_columns: bool) {
        let Self { tile, rows, columns, sums, squares } = self;
        if !of_columns {
            return row_deviations(tile, &mut rows.deviations);
        }
        for of in [&mut *sums, &mut *squares] {
            of.clear();
            of.resize(columns.deviations.len(), 0.0);
        }
        column_deviations(tile, sums, squares, &mut columns.deviations);
    }
}

impl AxisFactors {
    fn clear(&mut self, len: usize) {
        for (of, with) in [
            (&mut self.logarithms, 0.0),
            (&mut self.factors, 1.0),
            (&mut self.deviations, 0.0),
            (&mut self.best_factors, 1.0),
        ] {
            of.clear();
            of.resize(len, with);
        }
    }

    /// Multiplies the factors by the deviations, within their bounds.
    fn update(&mut self) {
        let of = self.logarithms.iter_mut().zip(&mut self.factors).zip(&self.deviations);
        for ((logarithm, factor), deviation) in of {
            let deviation = deviation.clamp(DEVIATIONS.0, DEVIATIONS.1);
            *logarithm = (*logarithm + deviation.ln()).clamp(LOGARITHMS.0, LOGARITHMS.1);
            *factor = logarithm.exp();
        }
    }

    /// Returns the ratio of the largest to the smallest deviation.
    fn spread(&self) -> f32 {
        let min = self.deviations.iter().copied().fold(f32::INFINITY, f32::min);
        let max = self.deviations.iter().copied().fold(0.0, f32::max);
        max / min.max(1e-8)
    }

    fn keep_best(&mut self) {
        self.best_factors.clone_from(&self.factors);
    }
}

wide! {
    fn divide_rows_first(x: &'a [f32], rows: &'a [f32], columns: &'a [f32], out: &'a mut [f32]) -> () {
        let of_rows = x.chunks_exact(columns.len()).zip(out.chunks_exact_mut(columns.len()));
        for ((x, out), row) in of_rows.zip(rows) {
            for ((x, out), column) in x.iter().zip(out).zip(columns) {
                *out = *x / *row / *column;
            }
        }
    }
}

wide! {
    fn divide_columns_first(x: &'a [f32], rows: &'a [f32], columns: &'a [f32], out: &'a mut [f32]) -> () {
        let of_rows = x.chunks_exact(columns.len()).zip(out.chunks_exact_mut(columns.len()));
        for ((x, out), row) in of_rows.zip(rows) {
            for ((x, out), column) in x.iter().zip(out).zip(columns) {
                *out = *x / *column / *row;
            }
        }
    }
}

/// An estimate from one number is zero.
fn deviation(squares: f64, count: usize) -> f32 {
    if count < 2 { 0.0 } else { (squares / (count - 1) as f64).sqrt() as f32 }
}

wide! {
    /// Computes the unbiased standard deviation of each row.
    fn row_deviations(x: &'a [f32], out: &'a mut [f32]) -> () {
        let columns = x.len() / out.len();
        for (x, out) in x.chunks_exact(columns).zip(out) {
            let mean = sum_of(x, |x| x) / columns as f64;
            let squares = sum_of(x, |x| (x - mean) * (x - mean));
            *out = deviation(squares, columns);
        }
    }
}

#[inline(always)]
fn sum_of(x: &[f32], of: impl Fn(f64) -> f64) -> f64 {
    let mut sums = [0.0; 16];
    let chunks = x.chunks_exact(16);
    let tail: f64 = chunks.remainder().iter().map(|&x| of(f64::from(x))).sum();
    for chunk in chunks {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            *sum += of(f64::from(x));
        }
    }
    tail + sums.iter().sum::<f64>()
}

wide! {
    /// Computes the unbiased standard deviation of each column. `means` and `squares` start as
    /// zeros.
    fn column_deviations(x: &'a [f32], means: &'a mut [f64], squares: &'a mut [f64], out: &'a mut [f32]) -> () {
        let (columns, rows) = (out.len(), x.len() / out.len());
        for x in x.chunks_exact(columns) {
            means.iter_mut().zip(x).for_each(|(mean, x)| *mean += f64::from(*x));
        }
        means.iter_mut().for_each(|mean| *mean /= rows as f64);
        for x in x.chunks_exact(columns) {
            for ((square, mean), x) in squares.iter_mut().zip(means.iter()).zip(x) {
                let difference = f64::from(*x) - *mean;
                *square += difference * difference;
            }
        }
        for (out, square) in out.iter_mut().zip(squares) {
            *out = deviation(*square, rows);
        }
    }
}

wide! {
    fn extremes_of_columns(x: &'a [f32], min: &'a mut [f32], max: &'a mut [f32]) -> () {
        for row in x.chunks_exact(min.len()) {
            for ((&x, min), max) in row.iter().zip(min.iter_mut()).zip(max.iter_mut()) {
                *min = if x < *min { x } else { *min };
                *max = if x > *max { x } else { *max };
            }
        }
    }
}

wide! {
    fn extremes_of_rows(x: &'a [f32], columns: usize, min: &'a mut [f32], max: &'a mut [f32]) -> () {
        for ((row, min), max) in x.chunks_exact(columns).zip(min).zip(max) {
            *min = fold_lanes(row, f32::INFINITY, |a, b| if b < a { b } else { a });
            *max = fold_lanes(row, f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
        }
    }
}

wide! {
    fn encode_columns(x: &'a [f32], zero_points: &'a [f32], scales: &'a [f32], largest: f32, codes: &'a mut [u8]) -> () {
        for (row, codes) in x.chunks_exact(zero_points.len()).zip(codes.chunks_exact_mut(zero_points.len())) {
            for (((code, x), zero), scale) in codes.iter_mut().zip(row).zip(zero_points).zip(scales) {
                *code = round((*x - *zero) / *scale, largest);
            }
        }
    }
}

wide! {
    fn encode_rows(x: &'a [f32], columns: usize, zero_points: &'a [f32], scales: &'a [f32], largest: f32, codes: &'a mut [u8]) -> () {
        let rows = x.chunks_exact(columns).zip(codes.chunks_exact_mut(columns));
        for (((row, codes), zero), scale) in rows.zip(zero_points).zip(scales) {
            for (code, x) in codes.iter_mut().zip(row) {
                *code = round((*x - *zero) / *scale, largest);
            }
        }
    }
}

/// Rounds non-negative numbers to the nearest integer up to `largest`, ties to even.
#[inline(always)]
fn round(x: f32, largest: f32) -> u8 {
    // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
    const MAGIC: f32 = 12_582_912.0;
    let x = if x > largest { largest } else { x };
    (x + MAGIC).to_bits() as u8
}
