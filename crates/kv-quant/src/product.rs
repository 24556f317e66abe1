//! Products of vectors with a packed matrix: codes become numbers in registers alone.

use std::slice::Chunks;

use crate::format::Plane;
use crate::kernel::{self, Panel, Params, Rows, widen};
use crate::layout::{Line, PANEL};
use crate::packed::PackedRef;
use crate::vector::wide;
use crate::{Axis, vector};
use pulp::{Arch, Simd, WithSimd};

/// Scratch space of products.
#[derive(Debug, Default)]
pub struct Scratch {
    scales: Vec<f32>,
    zeros: Vec<f32>,
    /// A one and a zero for each step.
    ones: Vec<f32>,
    nothing: Vec<f32>,
    sums: Vec<f32>,
    /// A dequantized panel: `[step][32 lanes]`.
    pub tile: Vec<f32>,
}

impl PackedRef<'_> {
    /// `out[r * out_stride + lane] += Σ_s x[r][s] * dequantized[s][lane]` over the steps of `x`.
    ///
    /// With tokens in lanes the steps are the channels: `x` holds queries, `out` receives scores. With channels in lanes the steps are the rows: `x`
    /// holds attention weights, `out` receives outputs. Lanes are rounded up to a multiple of 16, in which `out` has room; the sums of lanes
    /// that hold nothing mean nothing. The matrix `next`, which a product soon to come reads, is brought near meanwhile.
    pub(crate) fn accumulate(
        &self,
        x: Rows<'_>,
        next: Option<PackedRef<'_>>,
        out: &mut [f32],
        out_stride: usize,
        s: &mut Scratch,
    ) {
        if x.steps == 0 {
            return;
        }
        let mut ahead: &[Line] = &[];
        if let Some(next) = next {
            kernel::prefetch(next.scales);
            kernel::prefetch(next.zeros);
            ahead = next.codes;
        }
        if self.layout.scheme.along == self.layout.lanes {
            self.accumulate_by_step(x, ahead, out, out_stride, s);
        } else {
            self.accumulate_by_lane(x, ahead, out, out_stride, s);
        }
    }

    /// All lanes of a group share each step's scale and zero: the kernel makes a table of what codes mean, step by step.
    fn accumulate_by_step(
        &self,
        x: Rows<'_>,
        ahead: &[Line],
        out: &mut [f32],
        out_stride: usize,
        s: &mut Scratch,
    ) {
        let mut ahead = self.shares(ahead, 1);
        let panels_of_group = self.layout.scheme.group / PANEL;
        let width = self.layout.param_width();
        widen(self.scales, &mut s.scales);
        widen(self.zeros, &mut s.zeros);
        s.nothing.resize(x.steps, 0.0);
        for panel in 0..self.layout.lane_count().div_ceil(PANEL) {
            let at = panel / panels_of_group * width;
            let (scales, mut zeros) = (&s.scales[at..], &s.zeros[at..]);
            for plane in self.panels(panel, 0, &mut ahead) {
                let params = Params { scales, zeros };
                kernel::accumulate(plane, params, x, &mut out[panel * PANEL..], out_stride);
                zeros = &s.nothing[..];
            }
        }
    }

    /// Each lane has its own scale for a group of steps: it multiplies the group's sum.
    fn accumulate_by_lane(
        &self,
        x: Rows<'_>,
        ahead: &[Line],
        out: &mut [f32],
        out_stride: usize,
        s: &mut Scratch,
    ) {
        let mut ahead = self.shares(ahead, x.steps.div_ceil(self.layout.scheme.group));
        let width = self.layout.param_width();
        s.ones.resize(self.layout.scheme.group, 1.0);
        s.nothing.resize(self.layout.scheme.group, 0.0);
        let as_they_are = Params { scales: &s.ones, zeros: &s.nothing };
        for (group, first) in (0..x.steps).step_by(self.layout.scheme.group).enumerate() {
            let steps = self.layout.scheme.group.min(x.steps - first);
            let part = Rows { data: &x.data[first..], steps, ..x };
            widen(&self.scales[group * width..][..width], &mut s.scales);
            widen(&self.zeros[group * width..][..width], &mut s.zeros);
            for panel in 0..self.layout.lane_count().div_ceil(PANEL) {
                let lanes = panel * PANEL..width.min((panel + 1) * PANEL);
                s.sums.clear();
                s.sums.resize(x.count * PANEL, 0.0);
                for plane in self.panels(panel, first, &mut ahead) {
                    kernel::accumulate(plane, as_they_are, part, &mut s.sums, PANEL);
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
        s.tile.resize(self.layout.columns * PANEL, 0.0);
        for Panel { codes, bits, unit, .. } in self.panels(panel, 0, &mut [].chunks(1)) {
            add_codes(codes.as_flattened(), bits, unit, &mut s.tile);
        }
        let (width, group) = (self.layout.param_width(), self.layout.scheme.group);
        for (step, column) in s.tile.chunks_exact_mut(PANEL).enumerate() {
            match self.layout.scheme.along {
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

    /// Lines to be brought near, in equal shares for the kernel's calls: so many for each panel and plane.
    fn shares<'a>(&self, ahead: &'a [Line], calls: usize) -> Chunks<'a, Line> {
        let calls = calls
            * self.layout.lane_count().div_ceil(PANEL)
            * self.layout.scheme.bits.planes().len();
        ahead.chunks(ahead.len().div_ceil(calls).max(1))
    }

    /// The words of a panel from step `first` on, which begins a word, plane by plane.
    fn panels<'a>(
        &'a self,
        panel: usize,
        first: usize,
        ahead: &mut Chunks<'a, Line>,
    ) -> impl Iterator<Item = Panel<'a>> {
        let width = self.layout.panel_width(panel);
        let mut plane_start = 0;
        self.layout.scheme.bits.planes().iter().map(move |&plane| {
            let words = self.layout.words(plane);
            let start = plane_start + 2 * panel * words;
            plane_start += self.layout.plane_lines(plane);
            let Plane { bits, shift } = plane;
            let codes = &self.codes[start + first / plane.per_word() * width..]
                [..(words - first / plane.per_word()) * width];
            let ahead = ahead.next().unwrap_or_default();
            Panel { codes, width, bits, unit: (1 << shift) as f32, ahead }
        })
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
