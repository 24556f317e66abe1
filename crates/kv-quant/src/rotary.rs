//! Keys packed before the rotary embedding and rotated when they are scored, as in KVQuant (arXiv
//! 2401.18079).
//!
//! Before the rotation, the range of a channel is stable over the tokens; after the rotation it is
//! not. So quantization of keys along tokens is more accurate before the rotation. Scoring rotates
//! a panel of 32 tokens at a time. Rotations add up: if the queries are rotated back by the panel's
//! first position, the tokens of every panel are rotated by only 0 to 31 positions, and one small
//! table serves all panels.

use crate::layout::PANEL;
use crate::packed::PackedRef;
use crate::product::Scratch;
use crate::{Error, Result};
use longctx_simd::wide;

/// A rotary embedding, and the position of the first token appended. For n frequencies, channel i
/// is paired with channel i + n; the channels after 2n are not rotated.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotary {
    frequencies: Vec<f64>,
    first: usize,
    /// Rotations by 0 to 31 positions: `[frequency][position]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotary {
    /// Creates an embedding with these frequencies, in radians per position. The first token
    /// appended has position `first`.
    ///
    /// # Errors
    /// [`Error::Setting`] for a frequency that is not finite.
    pub fn new(frequencies: &[f64], first: usize) -> Result<Self> {
        if let Some(bad) = frequencies.iter().find(|f| !f.is_finite()) {
            return Err(Error::setting("frequency", "a finite number", bad));
        }
        let angles = || frequencies.iter().flat_map(|f| (0..PANEL).map(move |p| p as f64 * f));
        Ok(Self {
            frequencies: frequencies.into(),
            first,
            cos: angles().map(|angle| angle.cos() as f32).collect(),
            sin: angles().map(|angle| angle.sin() as f32).collect(),
        })
    }

    /// Returns radians per position, one for each pair of channels.
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// Returns the position of the first token appended.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Rotates a row by `positions`, at most 31.
    pub(crate) fn rotate_row(&self, row: &mut [f32], positions: usize) {
        let (low, high) = row.split_at_mut(self.frequencies.len());
        for (i, (a, b)) in low.iter_mut().zip(high).enumerate() {
            let (cos, sin) = (self.cos[i * PANEL + positions], self.sin[i * PANEL + positions]);
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        }
    }

    /// Rotates a row from position 0 to that of the token with index `token`.
    pub(crate) fn rotate_to_token(&self, row: &mut [f32], token: usize) {
        let position = (self.first + token) as f64;
        let (low, high) = row.split_at_mut(self.frequencies.len());
        for ((a, b), frequency) in low.iter_mut().zip(high).zip(&self.frequencies) {
            let (sin, cos) = (position * frequency).sin_cos();
            let (sin, cos) = (sin as f32, cos as f32);
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        }
    }
}

/// Queries rotated back by a position.
#[derive(Debug, Default)]
pub struct BackRotatedQueries {
    by: Option<usize>,
    cos: Vec<f64>,
    sin: Vec<f64>,
    q: Vec<f32>,
}

impl BackRotatedQueries {
    /// Discards the rotated queries of an earlier call.
    pub fn clear(&mut self) {
        self.by = None;
    }

    /// Returns the rows of `q` rotated back by the position of the key with index `token`.
    pub fn rotate_back(
        &mut self,
        q: &[f32],
        columns: usize,
        rotary: &Rotary,
        token: usize,
    ) -> &[f32] {
        let position = rotary.first + token;
        if self.by == Some(position) {
            return &self.q;
        }
        if position >= PANEL && self.by == Some(position - PANEL) {
            self.advance(rotary);
        } else {
            let angles = || rotary.frequencies.iter().map(|f| position as f64 * f);
            self.cos = angles().map(f64::cos).collect();
            self.sin = angles().map(f64::sin).collect();
        }
        self.by = Some(position);
        self.q.clear();
        self.q.extend_from_slice(q);
        for row in self.q.chunks_exact_mut(columns) {
            let (low, high) = row.split_at_mut(self.cos.len());
            for ((a, b), (cos, sin)) in low.iter_mut().zip(high).zip(self.cos.iter().zip(&self.sin))
            {
                let (cos, sin) = (*cos as f32, *sin as f32);
                (*a, *b) = (*a * cos + *b * sin, *b * cos - *a * sin);
            }
        }
        &self.q
    }

    /// Advances the angles by one panel, in f64: the rounding errors of thousands of steps are
    /// below f32's precision.
    fn advance(&mut self, rotary: &Rotary) {
        for ((cos, sin), frequency) in
            self.cos.iter_mut().zip(&mut self.sin).zip(&rotary.frequencies)
        {
            let (s, c) = (PANEL as f64 * frequency).sin_cos();
            (*cos, *sin) = (*cos * c - *sin * s, *sin * c + *cos * s);
        }
    }
}

/// The position of a chunk of keys.
pub struct ChunkPosition<'a> {
    /// The embedding.
    pub rotary: &'a Rotary,
    /// Index of its first key.
    pub token: usize,
    /// The queries, rotated back by an earlier chunk's position.
    pub back_rotated: &'a mut BackRotatedQueries,
}

impl PackedRef<'_> {
    /// Computes `out[r * out_stride + row] += q[r] · key[row]` for keys rotated to their positions.
    pub(crate) fn accumulate_rotated(
        &self,
        q: &[f32],
        ChunkPosition { rotary, token, back_rotated }: ChunkPosition<'_>,
        out: &mut [f32],
        out_stride: usize,
        s: &mut Scratch,
    ) {
        for panel in 0..self.rows.div_ceil(PANEL) {
            let q = back_rotated.rotate_back(q, self.layout.columns, rotary, token + panel * PANEL);
            self.dequantize_panel(panel, s);
            rotate_panel(&mut s.tile, &rotary.cos, &rotary.sin);
            let out = &mut out[panel * PANEL..];
            for (q, out) in q.chunks_exact(self.layout.columns).zip(out.chunks_mut(out_stride)) {
                accumulate_scores(q, &s.tile, &mut out[..PANEL]);
            }
        }
    }
}

wide! {
    /// Rotates the columns of a tile, `[channel][32 tokens]`.
    fn rotate_panel(tile: &'a mut [f32], cos: &'a [f32], sin: &'a [f32]) -> () {
        let (low, high) = tile.split_at_mut(cos.len());
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
        }
    }
}

wide! {
    /// Computes `out += q · tile`.
    fn accumulate_scores(q: &'a [f32], tile: &'a [f32], out: &'a mut [f32]) -> () {
        let mut sums = [0.0; PANEL];
        for (q, column) in q.iter().zip(tile.chunks_exact(PANEL)) {
            for (sum, x) in sums.iter_mut().zip(column) {
                *sum += q * x;
            }
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
}
