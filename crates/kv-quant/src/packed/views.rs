//! Packed matrices in borrowed memory: of a [`Packed`](super::Packed) or of a block of a pool.

use crate::bit_packing::{self, Scratch};
use crate::hadamard::hadamard;
use crate::kernel;
use crate::layout::{Layout, Line, PANEL};
use crate::levels::Levels;
use crate::quantize::Quantizer;
use crate::{Axis, Codes, Error, Position, Result};
use half::f16;

/// A packed matrix for reading.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackedRef<'a> {
    pub layout: Layout,
    /// Number of rows.
    pub rows: usize,
    /// `[plane][panel][word][line]`
    pub codes: &'a [Line],
    /// `[group][position on the other axis]`, if the scheme has scales.
    pub scales: &'a [f16],
    pub zero_points: &'a [f16],
    /// Factors of the other axis: `[token]` or `[tile][channel]`.
    pub factors: &'a [f16],
}

/// A packed matrix for appending. Memory after its rows may hold anything.
#[derive(Debug)]
pub(crate) struct PackedMut<'a> {
    pub layout: Layout,
    pub rows: usize,
    pub codes: &'a mut [Line],
    pub scales: &'a mut [f16],
    pub zero_points: &'a mut [f16],
    pub factors: &'a mut [f16],
}

/// A row being copied between matrices of the same scheme, along channels.
#[derive(Debug, Default)]
pub(crate) struct PackedRow {
    codes: Vec<u8>,
    /// One scale per group, if the scheme has scales.
    scales: Vec<f16>,
    zero_points: Vec<f16>,
    scratch: Scratch,
}

impl PackedRef<'_> {
    /// Unpacks a row's codes.
    pub fn unpack_row(&self, row: usize, codes: &mut [u8]) {
        codes.fill(0);
        let layout = &self.layout;
        let mut plane_start = 0;
        for &plane in layout.scheme.bits.planes() {
            let per_word = plane.per_word();
            let line = |lane, word| plane_start + layout.line_in_plane(plane, lane, word);
            let add = |code: &mut u8, word: u32, step: usize| {
                *code |= ((word >> (step * plane.bits) & plane.mask()) << plane.shift) as u8;
            };
            match layout.lanes {
                Axis::Tokens => {
                    for (word, codes) in codes.chunks_mut(per_word).enumerate() {
                        let word = self.codes[line(row, word)][row % 16];
                        codes.iter_mut().enumerate().for_each(|(step, code)| add(code, word, step));
                    }
                }
                Axis::Channels => {
                    for (lanes, codes) in codes.chunks_mut(16).enumerate() {
                        let words = &self.codes[line(16 * lanes, row / per_word)];
                        let step = row % per_word;
                        codes.iter_mut().zip(words).for_each(|(code, &word)| add(code, word, step));
                    }
                }
            }
            plane_start += layout.plane_lines(plane);
        }
    }

    /// Returns the scale and the zero point of a row and column's group.
    pub fn params(&self, row: usize, column: usize) -> (f32, f32) {
        let at = self.layout.param_at(row, column);
        let scale = self.scales.get(at).map_or(self.static_scale(), |scale| scale.to_f32());
        (scale, self.zero_points.get(at).map_or(0.0, |zero| zero.to_f32()))
    }

    /// Returns the scale of all numbers, if groups have none.
    pub fn static_scale(&self) -> f32 {
        match self.layout.scheme.codes {
            Codes::Float8 { scale: Some(scale), .. } => scale.get(),
            _ => 1.0,
        }
    }

    /// Dequantizes a row.
    pub fn dequantize_row(&self, row: usize, codes: &mut Vec<u8>, out: &mut [f32]) {
        let Layout { scheme, columns, .. } = self.layout;
        codes.resize(columns, 0);
        self.unpack_row(row, codes);
        let levels = Levels::of(scheme);
        out.iter_mut().zip(codes).for_each(|(out, &mut code)| *out = levels.value(code));
        match scheme.axis {
            Axis::Tokens => self.scale_columns(self.layout.param_at(row, 0), out),
            Axis::Channels => {
                for (group, out) in out.chunks_mut(scheme.group).enumerate() {
                    let (scale, zero) = self.params(row, group * scheme.group);
                    out.iter_mut().for_each(|out| *out = *out * scale + zero);
                }
            }
        }
        if !self.factors.is_empty() {
            let factor = |column| self.factors[self.layout.factor_at(row, column)].to_f32();
            out.iter_mut().enumerate().for_each(|(column, out)| *out *= factor(column));
        }
        if scheme.rotated {
            hadamard(out, columns);
        }
    }

    /// Applies the scale and the zero point of each column, which begin at index `at`.
    fn scale_columns(&self, at: usize, out: &mut [f32]) {
        const PART: usize = 64;
        for (part, out) in out.chunks_mut(PART).enumerate() {
            let held = at + part * PART..at + part * PART + out.len();
            let (mut scales, mut zero_points) = ([self.static_scale(); PART], [0.0; PART]);
            for (params, wide) in [(self.scales, &mut scales), (self.zero_points, &mut zero_points)]
            {
                if let Some(params) = params.get(held.clone()) {
                    kernel::widen_into(params, &mut wide[..out.len()]);
                }
            }
            for ((out, scale), zero) in out.iter_mut().zip(scales).zip(zero_points) {
                *out = *out * scale + zero;
            }
        }
    }

    /// Copies a row of a matrix that is quantized along channels, token by token.
    pub fn copy_row(&self, row: usize, to: &mut PackedRow) {
        to.codes.resize(self.layout.columns, 0);
        self.unpack_row(row, &mut to.codes);
        let groups = (0..self.layout.columns).step_by(self.layout.scheme.group);
        let at = groups.map(|column| self.layout.param_at(row, column));
        to.scales.clear();
        to.scales.extend(at.clone().filter_map(|at| self.scales.get(at)));
        to.zero_points.clear();
        to.zero_points.extend(at.filter_map(|at| self.zero_points.get(at)));
    }
}

impl PackedMut<'_> {
    /// Quantizes and appends rows of finite numbers.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the capacity is exceeded, or the last group along tokens has been
    /// closed with fewer rows than a group has; [`Error::OutOfRange`] if the range of a group
    /// exceeds f16's. On an error nothing is appended.
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
        let together = scheme.tokens_together();
        if !self.rows.is_multiple_of(together) {
            let expected = format!("a multiple of {together}, which are quantized together");
            return Err(Error::mismatch("rows before an append", expected, self.rows));
        }
        let start = self.rows;
        for rows in src.chunks(if together > 1 { together } else { 32 } * columns) {
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

    /// Appends a row of another matrix without quantizing it again.
    pub fn push_row(&mut self, row: &mut PackedRow) {
        self.store_codes(self.rows, &row.codes, &mut row.scratch);
        store_row_params(&self.layout, self.rows, &row.scales, self.scales);
        store_row_params(&self.layout, self.rows, &row.zero_points, self.zero_points);
        self.rows += 1;
    }

    fn store_params(&mut self, quantizer: &Quantizer) {
        let Layout { scheme, columns, .. } = self.layout;
        let Quantizer { scales, zero_points, factors, .. } = quantizer;
        if !factors.is_empty() {
            let at = self.layout.factor_at(self.rows, 0);
            self.factors[at..at + factors.len()].copy_from_slice(factors);
        }
        for (new, held) in [(scales, &mut *self.scales), (zero_points, &mut *self.zero_points)] {
            if new.is_empty() {
                continue;
            }
            if scheme.axis == Axis::Tokens {
                let at = self.layout.param_at(self.rows, 0);
                held[at..at + columns].copy_from_slice(new);
                continue;
            }
            for (row, new) in (self.rows..).zip(new.chunks_exact(columns.div_ceil(scheme.group))) {
                store_row_params(&self.layout, row, new, held);
            }
        }
    }

    fn store_codes(&mut self, row: usize, codes: &[u8], scratch: &mut Scratch) {
        let Scratch { padded, lane_words } = scratch;
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
                    lane_words.resize(words, 0);
                    bit_packing::pack_lane(padded, plane, lane_words);
                    let lines = self.codes[first..].iter_mut().step_by(width);
                    lines.zip(&*lane_words).for_each(|(line, word)| line[row % 16] = *word);
                }
                Axis::Channels => {
                    let (word, step) = (row / plane.per_word(), row % plane.per_word());
                    let lines = plane_start..plane_start + layout.plane_lines(plane);
                    let lines = &mut self.codes[lines];
                    bit_packing::pack_row(padded, plane, word, words, step * plane.bits, lines);
                }
            }
            plane_start += layout.plane_lines(plane);
        }
    }

    /// Removes the rows from `rows` on and clears their codes.
    fn clear_rows(&mut self, rows: usize) {
        self.rows = rows;
        let zeros = vec![0; self.layout.columns];
        for row in rows..self.layout.capacity {
            self.store_codes(row, &zeros, &mut Scratch::default());
        }
    }
}

/// Stores the scales or zero points of a row's groups along channels.
fn store_row_params(layout: &Layout, row: usize, new: &[f16], held: &mut [f16]) {
    for (group, &new) in new.iter().enumerate() {
        held[layout.param_at(row, group * layout.scheme.group)] = new;
    }
}

/// Adds `start` to the row of an error.
fn at_row(e: Error, start: usize) -> Error {
    match e {
        Error::OutOfRange { value, at: Position::Matrix { row, column } } => {
            Error::OutOfRange { value, at: Position::Matrix { row: row + start, column } }
        }
        other => other,
    }
}
