//! Codes and scales of groups.

mod asymmetric;
mod float8;
mod lloyd_max;
mod symmetric;
mod uniform;
mod variance;

use crate::bit_packing::Scratch;
use crate::hadamard::hadamard;
use crate::kernel::widen;
use crate::number::MAX_GROUPED;
use crate::{Codes, Result, Scheme};
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Quantizes rows of one width. It keeps its buffers from call to call.
#[derive(Debug, Default)]
pub struct Quantizer {
    /// The rows, rotated if the scheme requires it.
    x: Vec<f32>,
    /// Minimum and maximum of each group; later zero points and divisors.
    min: Vec<f32>,
    max: Vec<f32>,
    scale: Vec<f32>,
    normalizer: variance::VarianceNormalizer,
    pub(crate) scratch: Scratch,
    /// One code per number of the last rows of [`group_rows`](Self::group_rows).
    pub codes: Vec<u8>,
    /// One scale per group of these rows, if the scheme has scales.
    pub scales: Vec<f16>,
    /// One zero point per group of these rows, if the scheme has them.
    pub zero_points: Vec<f16>,
    /// For a variance-normalized scheme: a factor per row, or, along channels, per column.
    pub factors: Vec<f16>,
}

impl Quantizer {
    /// Quantizes `rows` of `columns` numbers. Along tokens they form one group per column, with
    /// `columns` scales. Along channels each row has its own groups; scales are ordered row by row.
    /// Rows of a variance-normalized scheme form one tile.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::Error::OutOfRange) if the range of an asymmetric group exceeds f16's.
    /// The row is relative to the first given.
    pub fn group_rows(&mut self, rows: &[f16], columns: usize, scheme: Scheme) -> Result<()> {
        widen(rows, &mut self.x);
        if scheme.rotated {
            self.rotate(columns, scheme);
        }
        self.codes.resize(rows.len(), 0);
        self.scales.clear();
        self.zero_points.clear();
        self.factors.clear();
        match scheme.codes {
            Codes::Asymmetric => return self.asymmetric(columns, scheme),
            Codes::Uniform => self.uniform(columns, scheme),
            Codes::Symmetric => self.symmetric(columns, scheme),
            Codes::Float8 { kind, scale } => self.float8(columns, scheme.group, kind, scale),
            Codes::LloydMax { norm_correction } => {
                self.lloyd_max(columns, scheme, norm_correction);
            }
            Codes::VarianceNormalized { .. } => self.variance_normalized(columns, scheme),
        }
        Ok(())
    }

    /// Rotates the rows. Only rows that were quantized before can have numbers that become too
    /// large here: append refuses all other rows with such numbers.
    fn rotate(&mut self, columns: usize, scheme: Scheme) {
        hadamard(&mut self.x, columns);
        let largest = MAX_GROUPED.to_f32();
        self.x.iter_mut().for_each(|x| *x = x.clamp(-largest, largest));
        if scheme.codes == Codes::Asymmetric {
            // This scheme's arithmetic uses f16 numbers.
            self.scales.resize(self.x.len(), f16::ZERO);
            self.scales.convert_from_f32_slice(&self.x);
            widen(&self.scales, &mut self.x);
        }
    }

    /// Iterates over the groups along channels with their codes.
    fn groups<'a>(
        x: &'a [f32],
        codes: &'a mut [u8],
        columns: usize,
        group: usize,
    ) -> impl Iterator<Item = (&'a [f32], &'a mut [u8])> {
        let groups = x.chunks_exact(columns).flat_map(move |row| row.chunks(group));
        groups.zip(codes.chunks_exact_mut(columns).flat_map(move |row| row.chunks_mut(group)))
    }
}
