//! A matrix of tokens by channels in packed form. `docs/formats.md` has the layout bit by bit.

use crate::array::Array;
use crate::format::Plane;
use crate::number::{Number, to_f16};
use crate::quantize::Quantizer;
use crate::words::{self, Scratch};
use crate::{Axis, Error, Result, Scheme};
use half::f16;

/// Lanes of a panel: two lines.
pub(crate) const PANEL: usize = 32;

/// One 32-bit word of codes for each of 16 lanes: a vector register where these are widest.
pub(crate) type Line = [u32; 16];

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
    /// `[plane][panel][word][line]`
    pub(crate) codes: Array<Line>,
    /// `[group][position on the other axis]`
    pub(crate) scales: Array<f16>,
    pub(crate) zeros: Array<f16>,
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
        let planes = scheme.bits.planes().iter();
        let words: usize = planes.map(|plane| steps.div_ceil(plane.per_word())).sum();
        let lines = lane_count.div_ceil(16) * words;
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
            codes: Array::zeroed(lines),
            scales: Array::zeroed(params),
            zeros: Array::zeroed(params),
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
        self.push_f16(&to_f16(src, self.columns, f16::MAX)?, quantizer)
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
                let done = self.rows - start;
                self.truncate(start);
                return Err(at_row(e, done));
            }
            self.store_params(quantizer);
            let Quantizer { codes, scratch, .. } = &mut *quantizer;
            for (r, codes) in codes.chunks_exact(self.columns).enumerate() {
                self.store_codes(self.rows + r, codes, scratch);
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

    fn store_codes(&mut self, row: usize, codes: &[u8], scratch: &mut Scratch) {
        let Scratch { padded, joined } = scratch;
        padded.clear();
        padded.extend_from_slice(codes);
        padded.resize(codes.len().next_multiple_of(PANEL), 0);
        let mut plane_start = 0;
        for &plane in self.scheme.bits.planes() {
            let words = self.words(plane);
            match self.lanes {
                Axis::Tokens => {
                    let first = plane_start + self.line_in_plane(plane, row, 0);
                    let width = self.panel_width(row / PANEL);
                    joined.resize(words, 0);
                    words::join(padded, plane, joined);
                    let lines = self.codes[first..].iter_mut().step_by(width);
                    lines.zip(&*joined).for_each(|(line, word)| line[row % 16] = *word);
                }
                Axis::Channels => {
                    let (word, step) = (row / plane.per_word(), row % plane.per_word());
                    let lines = plane_start..plane_start + self.plane_lines(plane);
                    let lines = &mut self.codes[lines];
                    words::spread(padded, plane, word, words, step * plane.bits, lines);
                }
            }
            plane_start += self.plane_lines(plane);
        }
    }

    /// Appends a row of a matrix of the same columns and scheme, along channels, as it lies: nothing is quantized anew.
    pub(crate) fn push_packed(
        &mut self,
        from: &Self,
        row: usize,
        codes: &mut Vec<u8>,
        scratch: &mut Scratch,
    ) {
        codes.resize(self.columns, 0);
        from.unpack_row(row, codes);
        self.store_codes(self.rows, codes, scratch);
        for group in 0..self.columns.div_ceil(self.scheme.group) {
            let (to, at) = (group * self.capacity + self.rows, group * from.capacity + row);
            self.scales[to] = from.scales[at];
            self.zeros[to] = from.zeros[at];
        }
        self.rows += 1;
    }

    /// Where a lane's word lies, counted from the plane's first line.
    fn line_in_plane(&self, plane: Plane, lane: usize, word: usize) -> usize {
        let panel = lane / PANEL;
        2 * panel * self.words(plane) + word * self.panel_width(panel) + lane % PANEL / 16
    }

    /// Words of a lane in a plane.
    pub(crate) fn words(&self, plane: Plane) -> usize {
        let steps = match self.lanes {
            Axis::Tokens => self.columns,
            Axis::Channels => self.capacity,
        };
        steps.div_ceil(plane.per_word())
    }

    /// Lines of a plane.
    pub(crate) fn plane_lines(&self, plane: Plane) -> usize {
        self.lane_count().div_ceil(16) * self.words(plane)
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

    /// Forgets the rows from `rows` on.
    pub(crate) fn truncate(&mut self, rows: usize) {
        self.rows = rows;
        let mut plane_start = 0;
        for &plane in self.scheme.bits.planes() {
            for row in rows..self.capacity {
                let (lanes, steps) = match self.lanes {
                    Axis::Tokens => (row..row + 1, 0..self.columns),
                    Axis::Channels => (0..self.columns, row..row + 1),
                };
                for (lane, step) in lanes.flat_map(|l| steps.clone().map(move |s| (l, s))) {
                    let line = self.line_in_plane(plane, lane, step / plane.per_word());
                    let shift = step % plane.per_word() * plane.bits;
                    self.codes[plane_start + line][lane % 16] &= !(plane.mask() << shift);
                }
            }
            plane_start += self.plane_lines(plane);
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
        let mut codes = vec![0; self.columns];
        self.unpack_row(row, &mut codes);
        Some(codes[column])
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
        let codes = &mut Vec::new();
        for (row, out) in out.chunks_exact_mut(self.columns).enumerate() {
            self.dequantize_row(row, codes, out);
        }
        Ok(())
    }

    /// Writes a row's codes.
    pub(crate) fn unpack_row(&self, row: usize, codes: &mut [u8]) {
        codes.fill(0);
        let mut plane_start = 0;
        for &plane in self.scheme.bits.planes() {
            let per_word = plane.per_word();
            let mut join = |column: usize, word: u32, shift: usize| {
                codes[column] |= ((word >> shift & plane.mask()) << plane.shift) as u8;
            };
            for column in 0..self.columns {
                let (lane, step) = match self.lanes {
                    Axis::Tokens => (row, column),
                    Axis::Channels => (column, row),
                };
                let line = plane_start + self.line_in_plane(plane, lane, step / per_word);
                join(column, self.codes[line][lane % 16], step % per_word * plane.bits);
            }
            plane_start += self.plane_lines(plane);
        }
    }

    pub(crate) fn dequantize_row(&self, row: usize, codes: &mut Vec<u8>, out: &mut [f32]) {
        codes.resize(self.columns, 0);
        self.unpack_row(row, codes);
        let group = self.scheme.group;
        for (column, (out, &mut code)) in out.iter_mut().zip(codes).enumerate() {
            let at = match self.scheme.along {
                Axis::Tokens => row / group * self.columns + column,
                Axis::Channels => column / group * self.capacity + row,
            };
            *out = f32::from(code) * self.scales[at].to_f32() + self.zeros[at].to_f32();
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
