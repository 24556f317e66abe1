//! Products of vectors with a packed matrix: scales and zeros are folded into the vectors or the sums, codes are never turned back.

use crate::format::Plane;
use crate::kernel::{self, Panel, Rows, widen};
use crate::packed::PANEL;
use crate::vector::wide;
use crate::{Axis, Packed, vector};
use pulp::{Arch, Simd, WithSimd};

/// Scratch space of products.
#[derive(Debug, Default)]
pub struct Scratch {
    scales: Vec<f32>,
    zeros: Vec<f32>,
    folded: Vec<f32>,
    starts: Vec<f32>,
    /// A zero for each row.
    nothing: Vec<f32>,
    sums: Vec<f32>,
    /// A dequantized panel: `[step][32 lanes]`.
    pub tile: Vec<f32>,
}

impl Packed {
    /// `out[r * out_stride + lane] += Σ_s x[r][s] * dequantized[s][lane]` over the steps of `x`.
    ///
    /// With tokens in lanes the steps are the channels: `x` holds queries, `out` receives scores. With channels in lanes the steps are the rows: `x`
    /// holds attention weights, `out` receives outputs. Lanes are rounded up to a multiple of 16, in which `out` has room; the sums of lanes
    /// that hold nothing mean nothing.
    pub(crate) fn accumulate(
        &self,
        x: Rows<'_>,
        out: &mut [f32],
        out_stride: usize,
        s: &mut Scratch,
    ) {
        if x.steps == 0 {
            return;
        }
        s.nothing.resize(x.count, 0.0);
        if self.scheme.along == self.lanes {
            self.accumulate_by_step(x, out, out_stride, s);
        } else {
            self.accumulate_by_lane(x, out, out_stride, s);
        }
    }

    /// Asks for the whole matrix to be brought near.
    pub(crate) fn prefetch(&self) {
        kernel::prefetch(&self.codes);
        kernel::prefetch(&self.scales);
        kernel::prefetch(&self.zeros);
    }

    /// All lanes of a group share each step's scale: x * scale takes the place of x, and x · zeros is one number per row.
    fn accumulate_by_step(&self, x: Rows<'_>, out: &mut [f32], out_stride: usize, s: &mut Scratch) {
        let panels_of_group = self.scheme.group / PANEL;
        let width = self.param_width();
        for panel in 0..self.lane_count().div_ceil(PANEL) {
            if panel % panels_of_group == 0 {
                let at = panel / panels_of_group * width;
                widen(&self.scales[at..at + x.steps], &mut s.scales);
                widen(&self.zeros[at..at + x.steps], &mut s.zeros);
                s.folded.resize(x.count * x.steps, 0.0);
                s.starts.resize(x.count, 0.0);
                vector::fold(x, &s.scales, &s.zeros, &mut s.folded, &mut s.starts);
            }
            let out = &mut out[panel * PANEL..];
            let folded = Rows { data: &s.folded, stride: x.steps, ..x };
            let mut starts = &s.starts;
            for plane in self.panels(panel, 0) {
                kernel::accumulate(plane, folded, starts, out, out_stride);
                starts = &s.nothing;
            }
        }
    }

    /// Each lane has its own scale for a group of steps: it multiplies the group's sum.
    fn accumulate_by_lane(&self, x: Rows<'_>, out: &mut [f32], out_stride: usize, s: &mut Scratch) {
        let width = self.param_width();
        for (group, first) in (0..x.steps).step_by(self.scheme.group).enumerate() {
            let steps = self.scheme.group.min(x.steps - first);
            let part = Rows { data: &x.data[first..], steps, ..x };
            widen(&self.scales[group * width..][..width], &mut s.scales);
            widen(&self.zeros[group * width..][..width], &mut s.zeros);
            for panel in 0..self.lane_count().div_ceil(PANEL) {
                let lanes = panel * PANEL..width.min((panel + 1) * PANEL);
                s.sums.clear();
                s.sums.resize(x.count * PANEL, 0.0);
                for plane in self.panels(panel, first) {
                    kernel::accumulate(plane, part, &s.nothing, &mut s.sums, PANEL);
                }
                for r in 0..x.count {
                    let total = vector::sum(&part.data[r * x.stride..][..steps]);
                    vector::scale_and_add(
                        &s.sums[r * PANEL..][..lanes.len()],
                        &s.scales[lanes.clone()],
                        &s.zeros[lanes.clone()],
                        total,
                        &mut out[r * out_stride + lanes.start..][..lanes.len()],
                    );
                }
            }
        }
    }

    /// Writes a panel of two lines, dequantized, into the scratch space's tile.
    pub(crate) fn dequantize_panel(&self, panel: usize, s: &mut Scratch) {
        s.tile.clear();
        s.tile.resize(self.columns * PANEL, 0.0);
        for Panel { codes, bits, unit, .. } in self.panels(panel, 0) {
            add_codes(codes.as_flattened(), bits, unit, &mut s.tile);
        }
        let (width, group) = (self.param_width(), self.scheme.group);
        for (step, column) in s.tile.chunks_exact_mut(PANEL).enumerate() {
            match self.scheme.along {
                Axis::Tokens => {
                    let at = panel * PANEL / group * width + step;
                    let (scale, zero) = (self.scales[at].to_f32(), self.zeros[at].to_f32());
                    column.iter_mut().for_each(|x| *x = *x * scale + zero);
                }
                Axis::Channels => {
                    let at = step / group * width + panel * PANEL;
                    if step % group == 0 {
                        widen(&self.scales[at..at + PANEL], &mut s.scales);
                        widen(&self.zeros[at..at + PANEL], &mut s.zeros);
                    }
                    let params = s.scales.iter().zip(&s.zeros);
                    column
                        .iter_mut()
                        .zip(params)
                        .for_each(|(x, (scale, zero))| *x = *x * scale + zero);
                }
            }
        }
    }

    /// The words of a panel from step `first` on, which begins a word, plane by plane.
    fn panels(&self, panel: usize, first: usize) -> impl Iterator<Item = Panel<'_>> {
        let width = self.panel_width(panel);
        let mut plane_start = 0;
        self.scheme.bits.planes().iter().map(move |&plane| {
            let words = self.words(plane);
            let start = plane_start + 2 * panel * words;
            plane_start += self.plane_lines(plane);
            let Plane { bits, shift } = plane;
            let codes = &self.codes[start + first / plane.per_word() * width..]
                [..(words - first / plane.per_word()) * width];
            Panel { codes, width, bits, unit: (1 << shift) as f32 }
        })
    }

    /// Scales of a group: one for each position on the other axis.
    fn param_width(&self) -> usize {
        match self.scheme.along {
            Axis::Tokens => self.columns,
            Axis::Channels => self.capacity,
        }
    }
}

wide! {
    /// Adds the codes of a panel's words, `[word][32 lanes]`, to a tile `[step][32 lanes]`.
    fn add_codes(words: &'a [u32], bits: usize, unit: f32, tile: &'a mut [f32]) -> () {
        let mask = (1 << bits) - 1;
        for (words, steps) in words.chunks_exact(PANEL).zip(tile.chunks_mut(32 / bits * PANEL)) {
            for (i, lanes) in steps.chunks_exact_mut(PANEL).enumerate() {
                for (lane, word) in lanes.iter_mut().zip(words) {
                    *lane += (word >> (i * bits) & mask) as i32 as f32 * unit;
                }
            }
        }
    }
}
