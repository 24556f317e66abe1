//! A matrix of tokens by channels in packed form. `docs/formats.md` has the layout bit by bit.

use crate::number::{Number, to_f16};
use crate::quantize::Quantizer;
use crate::{Axis, Error, Result, Scheme};
use half::f16;

/// Lanes of a panel: two lines.
pub(crate) const PANEL: usize = 32;

/// One 32-bit word of codes for each of 16 lanes; a cache line, and a vector register where these are widest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Line(pub [u32; 16]);

/// A quantized matrix: rows are tokens, columns are channels.
///
/// One axis lies in *lanes*, the other is walked in *steps*. The words of a lane hold the codes of consecutive steps, so that a
/// product with a vector over the steps (`q` over a key's channels, attention weights over values' tokens) has its sums in vector registers,
/// lane by lane, and never adds across one.
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
    pub(crate) scheme: Scheme,
    /// The axis that lies in lanes.
    pub(crate) lanes: Axis,
    pub(crate) rows: usize,
    /// Rows that there is room for.
    pub(crate) capacity: usize,
    pub(crate) columns: usize,
    /// `[panel][word][line]`
    pub(crate) codes: Box<[Line]>,
    /// `[group][position on the other axis]`
    pub(crate) scales: Box<[f16]>,
    pub(crate) zeros: Box<[f16]>,
}

impl Packed {
    /// An empty matrix with room for `capacity` rows of `columns` numbers, with the given axis in lanes.
    ///
    /// # Errors
    /// [`Error::Setting`] for a group that is not 32, 64 or 128, or no columns.
    pub fn new(capacity: usize, columns: usize, scheme: Scheme, lanes: Axis) -> Result<Self> {
        let scheme = Scheme::new(scheme.bits, scheme.along, scheme.group)?;
        if columns == 0 {
            return Err(Error::setting("columns", "at least 1", columns));
        }
        let (lane_count, steps) = match lanes {
            Axis::Tokens => (capacity, columns),
            Axis::Channels => (columns, capacity),
        };
        let lines = lane_count.div_ceil(16) * steps.div_ceil(scheme.bits.per_word());
        let params = match scheme.along {
            Axis::Tokens => capacity.div_ceil(scheme.group) * columns,
            Axis::Channels => columns.div_ceil(scheme.group) * capacity,
        };
        Ok(Self {
            scheme,
            lanes,
            rows: 0,
            capacity,
            columns,
            codes: vec![Line::default(); lines].into(),
            scales: vec![f16::ZERO; params].into(),
            zeros: vec![f16::ZERO; params].into(),
        })
    }

    /// Quantizes a row-major matrix of `columns` columns.
    ///
    /// # Errors
    /// [`Error::Setting`] as [`Packed::new`]; [`Error::Mismatch`] if `src` is no whole number of rows; [`Error::NotFinite`] and
    /// [`Error::OutOfRange`] with the position.
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
    /// As [`Packed::quantize`], and [`Error::Mismatch`] if there is no room, or the last group along tokens has been closed with fewer
    /// rows than a group has. On an error nothing is appended.
    pub fn push<T: Number>(&mut self, src: &[T], quantizer: &mut Quantizer) -> Result<()> {
        if !src.len().is_multiple_of(self.columns) {
            let expected = format!("whole rows of {} numbers", self.columns);
            return Err(Error::mismatch("matrix", expected, format!("{} numbers", src.len())));
        }
        self.push_f16(&to_f16(src, self.columns)?, quantizer)
    }

    /// Appends rows of finite numbers.
    pub(crate) fn push_f16(&mut self, src: &[f16], quantizer: &mut Quantizer) -> Result<()> {
        let (count, group) = (src.len() / self.columns, self.scheme.group);
        if count > self.capacity - self.rows {
            let expected = format!("at most {}", self.capacity - self.rows);
            return Err(Error::mismatch("rows to append", expected, count));
        }
        let along_tokens = self.scheme.along == Axis::Tokens;
        if along_tokens && !self.rows.is_multiple_of(group) {
            let expected = format!("a multiple of the group, {group}");
            return Err(Error::mismatch("rows before an append along tokens", expected, self.rows));
        }
        let start = self.rows;
        for rows in src.chunks(group * self.columns) {
            let done = quantizer.group_rows(rows, self.columns, self.scheme);
            if let Err(e) = done {
                self.truncate(start);
                return Err(at_row(e, self.rows - start));
            }
            self.store_params(quantizer);
            for (r, codes) in quantizer.codes.chunks_exact(self.columns).enumerate() {
                self.store_codes(self.rows + r, codes);
            }
            self.rows += rows.len() / self.columns;
        }
        Ok(())
    }

    fn store_params(&mut self, quantizer: &Quantizer) {
        match self.scheme.along {
            Axis::Tokens => {
                let at = self.rows / self.scheme.group * self.columns;
                self.scales[at..at + self.columns].copy_from_slice(&quantizer.scales);
                self.zeros[at..at + self.columns].copy_from_slice(&quantizer.zeros);
            }
            Axis::Channels => {
                let groups = self.columns.div_ceil(self.scheme.group);
                for (i, (&scale, &zero)) in
                    quantizer.scales.iter().zip(&quantizer.zeros).enumerate()
                {
                    let at = i % groups * self.capacity + self.rows + i / groups;
                    (self.scales[at], self.zeros[at]) = (scale, zero);
                }
            }
        }
    }

    fn store_codes(&mut self, row: usize, codes: &[u8]) {
        let (bits, per_word) = (self.scheme.bits.count(), self.scheme.bits.per_word());
        match self.lanes {
            Axis::Tokens => {
                for (word, codes) in codes.chunks(per_word).enumerate() {
                    let packed =
                        codes.iter().rev().fold(0, |word, &code| word << bits | u32::from(code));
                    *self.word_mut(row, word) = packed;
                }
            }
            Axis::Channels => {
                let shift = row % per_word * bits;
                for first in (0..self.columns).step_by(16) {
                    let line = self.line(first, row / per_word);
                    let codes = &codes[first..self.columns.min(first + 16)];
                    for (word, &code) in self.codes[line].0.iter_mut().zip(codes) {
                        *word |= u32::from(code) << shift;
                    }
                }
            }
        }
    }

    fn word_mut(&mut self, lane: usize, word: usize) -> &mut u32 {
        let line = self.line(lane, word);
        &mut self.codes[line].0[lane % 16]
    }

    /// The line that holds word `word` of lane `lane`.
    fn line(&self, lane: usize, word: usize) -> usize {
        let (panel, words) = (lane / PANEL, self.words());
        2 * panel * words + word * self.panel_width(panel) + lane % PANEL / 16
    }

    /// Words of a lane.
    pub(crate) fn words(&self) -> usize {
        let steps = match self.lanes {
            Axis::Tokens => self.columns,
            Axis::Channels => self.capacity,
        };
        steps.div_ceil(self.scheme.bits.per_word())
    }

    /// Lanes that there is room for.
    pub(crate) fn lane_count(&self) -> usize {
        match self.lanes {
            Axis::Tokens => self.capacity,
            Axis::Channels => self.columns,
        }
    }

    /// Lines of a word in a panel: two, or one in a last panel of up to 16 lanes.
    pub(crate) fn panel_width(&self, panel: usize) -> usize {
        if self.lane_count() - panel * PANEL > 16 { 2 } else { 1 }
    }

    /// Forgets the rows from `rows` on, which along tokens must be a whole number of groups.
    fn truncate(&mut self, rows: usize) {
        self.rows = rows;
        let bits = self.scheme.bits;
        for row in rows..self.capacity {
            match self.lanes {
                Axis::Tokens => (0..self.words()).for_each(|word| *self.word_mut(row, word) = 0),
                Axis::Channels => {
                    let mask = !(bits.max_code() << (row % bits.per_word() * bits.count()));
                    for lane in 0..self.columns {
                        *self.word_mut(lane, row / bits.per_word()) &= mask;
                    }
                }
            }
        }
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Columns of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// How it is quantized.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The code at a row and column; `None` outside the matrix.
    pub fn code(&self, row: usize, column: usize) -> Option<u8> {
        if row >= self.rows || column >= self.columns {
            return None;
        }
        let (lane, step) = match self.lanes {
            Axis::Tokens => (row, column),
            Axis::Channels => (column, row),
        };
        let bits = self.scheme.bits;
        let word = self.codes[self.line(lane, step / bits.per_word())].0[lane % 16];
        Some((word >> (step % bits.per_word() * bits.count()) & bits.max_code()) as u8)
    }

    /// The scale and zero of a row and column's group; `None` outside the matrix.
    pub fn params(&self, row: usize, column: usize) -> Option<(f16, f16)> {
        if row >= self.rows || column >= self.columns {
            return None;
        }
        let at = match self.scheme.along {
            Axis::Tokens => row / self.scheme.group * self.columns + column,
            Axis::Channels => column / self.scheme.group * self.capacity + row,
        };
        Some((self.scales[at], self.zeros[at]))
    }

    /// Writes code * scale + zero, row-major, in f32.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless `out` holds exactly the matrix.
    pub fn dequantize(&self, out: &mut [f32]) -> Result<()> {
        if out.len() != self.rows * self.columns {
            let expected = format!("{} x {} numbers", self.rows, self.columns);
            return Err(Error::mismatch("output", expected, out.len()));
        }
        for (row, out) in out.chunks_exact_mut(self.columns).enumerate() {
            self.dequantize_row(row, out);
        }
        Ok(())
    }

    pub(crate) fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        for (column, out) in out.iter_mut().enumerate() {
            if let (Some(code), Some((scale, zero))) =
                (self.code(row, column), self.params(row, column))
            {
                *out = f32::from(code) * scale.to_f32() + zero.to_f32();
            }
        }
    }

    /// Bytes of the codes, and of the scales and zeros, with what is allocated for rows to come.
    pub fn bytes(&self) -> (usize, usize) {
        (size_of_val(&*self.codes), size_of_val(&*self.scales) + size_of_val(&*self.zeros))
    }
}

/// The error with its row counted from `start` rows earlier.
fn at_row(e: Error, start: usize) -> Error {
    match e {
        Error::OutOfRange { value, row, column } => {
            Error::OutOfRange { value, row: row + start, column }
        }
        other => other,
    }
}
