//! Products of vectors with a packed matrix. Codes are dequantized only in registers.

use std::slice::Chunks;

use crate::format::Plane;
use crate::kernel::{self, Panel, Params, Rows, widen};
use crate::layout::{Layout, Line, PANEL};
use crate::levels::Levels;
use crate::packed::PackedRef;
use crate::{Axis, Scheme};
use half::f16;
use longctx_simd::wide;

/// Panels of the largest group.
const MAX_PANELS: usize = Scheme::PER_TOKEN / PANEL;

/// Buffers for products.
#[derive(Debug, Default)]
pub struct Scratch {
    scales: Vec<f32>,
    zero_points: Vec<f32>,
    /// Scale 1 and zero point 0 for each step.
    ones: Vec<f32>,
    nothing: Vec<f32>,
    sums: Vec<f32>,
    /// Sums of the vectors, for zero points.
    totals: Vec<f32>,
    /// Sums before the multiplication by the lanes' factors.
    of_lanes: Vec<f32>,
    factors: Vec<f32>,
    /// A dequantized panel: `[step][32 lanes]`.
    pub tile: Vec<f32>,
}

impl<'a> PackedRef<'a> {
    /// Computes `out[r * out_stride + lane] += Σ_s x[r][s] * dequantized[s][lane]` over the steps
    /// of `x`.
    ///
    /// With tokens in lanes the steps are channels: `x` holds queries, `out` receives scores. With
    /// channels in lanes the steps are rows: `x` holds attention weights, `out` receives outputs.
    /// Lanes are rounded up to a multiple of 16, for which `out` has room; sums of unused lanes are
    /// undefined. The matrix `next`, which a later product reads, is prefetched.
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
            kernel::prefetch(next.zero_points);
            kernel::prefetch(next.factors);
            ahead = next.codes;
        }
        if self.layout.scheme.axis != self.layout.lanes {
            self.accumulate_by_lane(x, ahead, out, out_stride, s);
        } else if self.factors.is_empty() {
            self.accumulate_by_step(x, ahead, out, out_stride, s);
        } else {
            self.accumulate_by_step_and_lane(x, ahead, out, out_stride, s);
        }
    }

    /// Multiplies each lane's sum by the lane's factor.
    fn accumulate_by_step_and_lane(
        &self,
        x: Rows<'_>,
        ahead: &[Line],
        out: &mut [f32],
        out_stride: usize,
        s: &mut Scratch,
    ) {
        let lanes = self.layout.lane_count();
        let width = lanes.next_multiple_of(16);
        let mut sums = std::mem::take(&mut s.of_lanes);
        sums.clear();
        sums.resize(x.count * width, 0.0);
        self.accumulate_by_step(x, ahead, &mut sums, width, s);
        widen(self.factors, &mut s.factors);
        for (sums, out) in sums.chunks_exact(width).zip(out.chunks_mut(out_stride)) {
            multiply_and_add(&sums[..lanes], &s.factors, &mut out[..lanes]);
        }
        s.of_lanes = sums;
    }

    /// For groups whose lanes share each step's scale and zero point. The kernel computes a table
    /// of dequantized levels at every step.
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
        self.widen_params(self.scales, self.zero_points, self.layout.groups(), s);
        let count = self.layout.lane_count().div_ceil(PANEL);
        for first in (0..count).step_by(panels_of_group) {
            let at = first / panels_of_group * width;
            let params = Params { scales: &s.scales[at..], zero_points: &s.zero_points[at..] };
            let panels = first..count.min(first + panels_of_group);
            let out = &mut out[first * PANEL..];
            let codes = self.panel(first, 0, &mut ahead);
            if panels.len() == 1 {
                kernel::accumulate(codes, params, x, out, out_stride);
                continue;
            }
            let mut held = [codes; MAX_PANELS];
            for (panel, held) in panels.clone().zip(&mut held).skip(1) {
                *held = self.panel(panel, 0, &mut ahead);
            }
            kernel::accumulate_shared(&held[..panels.len()], params, x, out, out_stride);
        }
    }

    /// For lanes that each have their own scale for a group of steps. The scale is applied to the
    /// sum of the group.
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
        for (group, first) in (0..x.steps).step_by(self.layout.scheme.group).enumerate() {
            let steps = self.layout.scheme.group.min(x.steps - first);
            let part = Rows { data: &x.data[first..], steps, ..x };
            let of_group = |of: &'a [f16]| of.get(group * width..(group + 1) * width).unwrap_or(of);
            self.widen_params(of_group(self.scales), of_group(self.zero_points), width, s);
            s.totals.clear();
            if !self.zero_points.is_empty() {
                let rows = (0..x.count).map(|r| &part.data[r * x.stride..][..steps]);
                s.totals.extend(rows.map(longctx_simd::sum));
            }
            for panel in 0..self.layout.lane_count().div_ceil(PANEL) {
                let lanes = panel * PANEL..width.min((panel + 1) * PANEL);
                s.sums.clear();
                s.sums.resize(x.count * PANEL, 0.0);
                let codes = self.panel(panel, first, &mut ahead);
                let as_they_are = Params { scales: &s.ones, zero_points: &s.nothing };
                kernel::accumulate(codes, as_they_are, part, &mut s.sums, PANEL);
                let (scales, zero_points) =
                    (&s.scales[lanes.clone()], &s.zero_points[lanes.clone()]);
                for (r, sums) in s.sums.chunks_exact(PANEL).enumerate() {
                    let sums = &sums[..lanes.len()];
                    let out = &mut out[r * out_stride + lanes.start..][..lanes.len()];
                    match s.totals.get(r) {
                        Some(&total) => scale_and_add(sums, scales, zero_points, total, out),
                        None => multiply_and_add(sums, scales, out),
                    }
                }
            }
        }
    }

    /// Converts the scales and zero points of `groups` groups to f32, or fills in those that the
    /// scheme lacks.
    fn widen_params(&self, scales: &[f16], zero_points: &[f16], groups: usize, s: &mut Scratch) {
        widen(scales, &mut s.scales);
        widen(zero_points, &mut s.zero_points);
        s.scales.resize(groups, self.static_scale());
        s.zero_points.resize(groups, 0.0);
    }

    /// Dequantizes a panel of two lines of asymmetric integers into the scratch tile.
    pub(crate) fn dequantize_panel(&self, panel: usize, s: &mut Scratch) {
        s.tile.clear();
        s.tile.resize(self.layout.columns * PANEL, 0.0);
        let codes = self.panel(panel, 0, &mut [].chunks(1));
        add_codes(codes.codes.as_flattened(), codes.low_bits(), 1.0, &mut s.tile);
        if codes.bits == 3 {
            add_codes(codes.high.as_flattened(), 1, 4.0, &mut s.tile);
        }
        let (width, group) = (self.layout.param_width(), self.layout.scheme.group);
        for (step, column) in s.tile.chunks_exact_mut(PANEL).enumerate() {
            match self.layout.scheme.axis {
                Axis::Tokens => {
                    let at = panel * PANEL / group * width + step;
                    let (scale, zero) = (self.scales[at].to_f32(), self.zero_points[at].to_f32());
                    column.iter_mut().for_each(|x| *x = *x * scale + zero);
                }
                Axis::Channels => {
                    let at = step / group * width + panel * PANEL;
                    if step % group == 0 {
                        widen(&self.scales[at..at + PANEL], &mut s.scales);
                        widen(&self.zero_points[at..at + PANEL], &mut s.zero_points);
                    }
                    let params = s.scales.iter().zip(&s.zero_points);
                    column
                        .iter_mut()
                        .zip(params)
                        .for_each(|(x, (scale, zero))| *x = *x * scale + zero);
                }
            }
        }
    }

    /// Divides the lines to prefetch evenly among the kernel's calls.
    fn shares<'b>(&self, ahead: &'b [Line], calls: usize) -> Chunks<'b, Line> {
        let calls = calls * self.layout.lane_count().div_ceil(PANEL);
        ahead.chunks(ahead.len().div_ceil(calls).max(1))
    }

    /// Returns the words of a panel from step `first` on, which begins a word of each plane.
    fn panel<'b>(&'b self, panel: usize, first: usize, ahead: &mut Chunks<'b, Line>) -> Panel<'b> {
        let Layout { scheme, .. } = self.layout;
        let width = self.layout.panel_width(panel);
        let lines = |start: usize, plane: Plane| {
            let words = self.layout.words(plane);
            let skipped = first / plane.per_word();
            let first = start + 2 * panel * words + skipped * width;
            &self.codes[first..][..(words - skipped) * width]
        };
        let (codes, high) = match *scheme.bits.planes() {
            [low, high] => (lines(0, low), lines(self.layout.plane_lines(low), high)),
            ref planes => (lines(0, planes[0]), &[][..]),
        };
        let ahead = ahead.next().unwrap_or_default();
        Panel { codes, high, width, bits: scheme.bits.count(), levels: Levels::of(scheme), ahead }
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

wide! {
    /// Computes `out += sums * scales + total * zeros`.
    fn scale_and_add(
        sums: &'a [f32],
        scales: &'a [f32],
        zero_points: &'a [f32],
        total: f32,
        out: &'a mut [f32],
    ) -> () {
        for (((out, sum), scale), zero) in out.iter_mut().zip(sums).zip(scales).zip(zero_points) {
            *out += sum * scale + total * zero;
        }
    }
}

wide! {
    /// Computes `out += sums * factors`.
    fn multiply_and_add(sums: &'a [f32], factors: &'a [f32], out: &'a mut [f32]) -> () {
        for ((out, sum), factor) in out.iter_mut().zip(sums).zip(factors) {
            *out += sum * factor;
        }
    }
}
