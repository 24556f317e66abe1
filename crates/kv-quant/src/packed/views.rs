//! Packed matrices in borrowed memory: a [`Packed`](super::Packed)'s own, or a block's of a pool.

use crate::layout::{Layout, Line, PANEL};
use crate::quantize::Quantizer;
use crate::words::{self, Scratch};
use crate::{Axis, Error, Position, Result};
use half::f16;

/// A packed matrix to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackedRef<'a> {
    pub layout: Layout,
    /// Rows held.
    pub rows: usize,
    /// `[plane][panel][word][line]`
    pub codes: &'a [Line],
    /// `[group][position on the other axis]`
    pub scales: &'a [f16],
    pub zeros: &'a [f16],
}

/// A packed matrix to append to. What lies beyond its rows may be anything.
#[derive(Debug)]
pub(crate) struct PackedMut<'a> {
    pub layout: Layout,
    pub rows: usize,
    pub codes: &'a mut [Line],
    pub scales: &'a mut [f16],
    pub zeros: &'a mut [f16],
}

/// A row on its way from one matrix to another of the same scheme, along channels.
#[derive(Debug, Default)]
pub(crate) struct PackedRow {
    codes: Vec<u8>,
    /// A scale and a zero for each group.
    params: Vec<(f16, f16)>,
    scratch: Scratch,
}

impl PackedRef<'_> {
    /// Writes a row's codes.
    pub fn unpack_row(&self, row: usize, codes: &mut [u8]) {
        codes.fill(0);
        let layout = &self.layout;
        let mut plane_start = 0;
        for &plane in layout.scheme.bits.planes() {
            let per_word = plane.per_word();
            for (column, code) in codes.iter_mut().enumerate() {
                let (lane, step) = match layout.lanes {
                    Axis::Tokens => (row, column),
                    Axis::Channels => (column, row),
                };
                let line = plane_start + layout.line_in_plane(plane, lane, step / per_word);
                let word = self.codes[line][lane % 16] >> (step % per_word * plane.bits);
                *code |= ((word & plane.mask()) << plane.shift) as u8;
            }
            plane_start += layout.plane_lines(plane);
        }
    }

    /// Writes code * scale + zero of a row.
    pub fn dequantize_row(&self, row: usize, codes: &mut Vec<u8>, out: &mut [f32]) {
        codes.resize(self.layout.columns, 0);
        self.unpack_row(row, codes);
        for (column, (out, &mut code)) in out.iter_mut().zip(codes).enumerate() {
            let at = self.layout.param_at(row, column);
            *out = f32::from(code) * self.scales[at].to_f32() + self.zeros[at].to_f32();
        }
    }

    /// Copies a row of a matrix that is quantized along channels.
    pub fn copy_row(&self, row: usize, to: &mut PackedRow) {
        to.codes.resize(self.layout.columns, 0);
        self.unpack_row(row, &mut to.codes);
        to.params.clear();
        for column in (0..self.layout.columns).step_by(self.layout.scheme.group) {
            let at = self.layout.param_at(row, column);
            to.params.push((self.scales[at], self.zeros[at]));
        }
    }
}

impl PackedMut<'_> {
    /// Quantizes and appends rows of finite numbers.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if there is no room, or the last group along tokens has been closed with
    /// fewer rows than a group has; [`Error::OutOfRange`] for a group that is too wide for f16. On an
    /// error nothing is appended.
    pub fn push(&mut self, src: &[f16], quantizer: &mut Quantizer) -> Result<()> {
        let Layout { scheme, columns, capacity, .. } = self.layout;
        let count = src.len() / columns;
        if count > capacity - self.rows {
            return Err(Error::mismatch(
                "rows to append",
                format!("at most {}", capacity - self.rows),
                count,
            ));
        }
        if scheme.along == Axis::Tokens && !self.rows.is_multiple_of(scheme.group) {
            let expected = format!("a multiple of the group, {}", scheme.group);
            return Err(Error::mismatch("rows before an append along tokens", expected, self.rows));
        }
        let start = self.rows;
        for rows in src.chunks(scheme.group * columns) {
            if let Err(e) = quantizer.group_rows(rows, columns, scheme) {
                let done = self.rows - start;
                self.clear_rows(start);
                return Err(at_row(e, done));
            }
            self.store_params(quantizer);
            let Quantizer { codes, scratch, .. } = &mut *quantizer;
            for (r, codes) in codes.chunks_exact(columns).enumerate() {
                self.store_codes(self.rows + r, codes, scratch);
            }
            self.rows += rows.len() / columns;
        }
        Ok(())
    }

    /// Appends a row as it lies in another matrix: nothing is quantized anew.
    pub fn push_row(&mut self, row: &mut PackedRow) {
        self.store_codes(self.rows, &row.codes, &mut row.scratch);
        for (group, &(scale, zero)) in row.params.iter().enumerate() {
            let at = self.layout.param_at(self.rows, group * self.layout.scheme.group);
            (self.scales[at], self.zeros[at]) = (scale, zero);
        }
        self.rows += 1;
    }

    fn store_params(&mut self, quantizer: &Quantizer) {
        let Layout { scheme, columns, .. } = self.layout;
        let Quantizer { scales, zeros, .. } = quantizer;
        if scheme.along == Axis::Tokens {
            let at = self.layout.param_at(self.rows, 0);
            self.scales[at..at + columns].copy_from_slice(scales);
            self.zeros[at..at + columns].copy_from_slice(zeros);
            return;
        }
        let groups = columns.div_ceil(scheme.group);
        for (i, (&scale, &zero)) in scales.iter().zip(zeros).enumerate() {
            let at = self.layout.param_at(self.rows + i / groups, i % groups * scheme.group);
            (self.scales[at], self.zeros[at]) = (scale, zero);
        }
    }

    fn store_codes(&mut self, row: usize, codes: &[u8], scratch: &mut Scratch) {
        let Scratch { padded, joined } = scratch;
        padded.clear();
        padded.extend_from_slice(codes);
        padded.resize(codes.len().next_multiple_of(PANEL), 0);
        let layout = self.layout;
        let mut plane_start = 0;
        for &plane in layout.scheme.bits.planes() {
            let words = layout.words(plane);
            match layout.lanes {
                Axis::Tokens => {
                    let first = plane_start + layout.line_in_plane(plane, row, 0);
                    let width = layout.panel_width(row / PANEL);
                    joined.resize(words, 0);
                    words::join(padded, plane, joined);
                    let lines = self.codes[first..].iter_mut().step_by(width);
                    lines.zip(&*joined).for_each(|(line, word)| line[row % 16] = *word);
                }
                Axis::Channels => {
                    let (word, step) = (row / plane.per_word(), row % plane.per_word());
                    let lines = plane_start..plane_start + layout.plane_lines(plane);
                    let lines = &mut self.codes[lines];
                    words::spread(padded, plane, word, words, step * plane.bits, lines);
                }
            }
            plane_start += layout.plane_lines(plane);
        }
    }

    /// Forgets the rows from `rows` on and clears their codes.
    fn clear_rows(&mut self, rows: usize) {
        self.rows = rows;
        let zeros = vec![0; self.layout.columns];
        for row in rows..self.layout.capacity {
            self.store_codes(row, &zeros, &mut Scratch::default());
        }
    }
}

/// The error with its row counted from `start` rows earlier.
fn at_row(e: Error, start: usize) -> Error {
    match e {
        Error::OutOfRange { value, at: Position::Matrix { row, column } } => {
            Error::OutOfRange { value, at: Position::Matrix { row: row + start, column } }
        }
        other => other,
    }
}
