//! The one kernel that scores and weighted sums are made of: products of a few vectors with a panel of codes.

mod portable;

use crate::Bits;
use crate::packed::Line;

/// A panel's words for a run of steps.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// `[word][line]`
    pub codes: &'a [Line],
    /// Lines of a word, 1 or 2: 16 or 32 lanes.
    pub width: usize,
    /// Bits of a code.
    pub bits: Bits,
}

/// Rows of vectors over the steps, `stride` apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The first row's first number on.
    pub data: &'a [f32],
    /// From row to row.
    pub stride: usize,
    /// Rows.
    pub count: usize,
    /// Numbers of a row.
    pub steps: usize,
}

/// `out[r * out_stride + lane] += Σ_s x[r][s] code[s][lane]`, for all lanes of the panel.
pub fn accumulate(panel: Panel<'_>, x: Rows<'_>, out: &mut [f32], out_stride: usize) {
    if x.count == 0 || x.steps == 0 {
        return;
    }
    assert!((x.count - 1) * x.stride + x.steps <= x.data.len(), "rows of the vectors");
    assert!((x.count - 1) * out_stride + 16 * panel.width <= out.len(), "rows of the sums");
    assert!(x.steps.div_ceil(panel.bits.per_word()) * panel.width <= panel.codes.len(), "codes");
    portable::accumulate(panel, x, out, out_stride);
}
