//! Weighted sums of values with an online softmax over tiles.

use super::TILE;
use super::plan::Span;
use super::score::Buffers;
use crate::hadamard::hadamard;
use crate::kernel::{Rows, widen_into};
use crate::layout::Layout;
use crate::pool::head::Head;
use crate::pool::memory::PoolMemory;

/// For each row the weighted sum of values, the largest score and the sum of weights.
pub struct Tile {
    out: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
    /// Row stride of `out`: the channels, rounded up to whole lines.
    stride: usize,
}

impl Tile {
    pub fn new(rows: usize, value_dim: usize) -> Self {
        let stride = value_dim.next_multiple_of(16);
        Self {
            out: vec![0.0; rows * stride],
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
            stride,
        }
    }

    pub fn rows(&self) -> usize {
        self.sum.len()
    }

    /// Converts scores, `width` per row, to weights relative to each row's running maximum, and
    /// rescales the previous sums.
    pub fn update_softmax(&mut self, scores: &mut [f32], width: usize) {
        for (row, scores) in scores.chunks_exact_mut(TILE).enumerate() {
            let scores = &mut scores[..width];
            let max = self.max[row].max(longctx_simd::max(scores));
            if max == f32::NEG_INFINITY {
                scores.fill(0.0);
                continue;
            }
            let sum = longctx_simd::exp_sum(scores, max);
            if max > self.max[row] {
                let rescale = (self.max[row] - max).exp();
                self.sum[row] *= rescale;
                longctx_simd::scale(&mut self.out[row * self.stride..][..self.stride], rescale);
                self.max[row] = max;
            }
            self.sum[row] += sum;
        }
    }

    /// Adds the values of a part of a tile, weighted with the result of
    /// [`update_softmax`](Self::update_softmax). The slots continue to `end`.
    pub fn accumulate_values(
        &mut self,
        head: &Head,
        memory: &PoolMemory,
        (part, end): &(Span, usize),
        buffers: &mut Buffers,
    ) {
        let Buffers { scores, row, scratch, .. } = buffers;
        let (layout, slots) = (&memory.layout, &part.slots);
        let size = layout.keys.capacity;
        let scores = &scores[part.offset..];
        for first in (slots.start..slots.end.min(head.packed_values)).step_by(size) {
            // The next tile's keys are read next.
            let next = (first + TILE) / size;
            let next = (first + TILE < *end && next < head.blocks.len())
                .then(|| head.block(memory, next).keys());
            let values = head.block(memory, first / size).values();
            let steps = values.rows.min(slots.end - first);
            let data = &scores[first - slots.start..];
            let x = Rows { data, stride: TILE, count: self.sum.len(), steps };
            values.accumulate(x, next, &mut self.out, self.stride, scratch);
        }
        row.resize(layout.values.columns, 0.0);
        for slot in slots.start.max(head.packed_values)..slots.end {
            widen_into(head.values.row(&memory.value_pages, slot, row.len()), row);
            if layout.values.scheme.rotated {
                hadamard(row, layout.values.columns);
            }
            let weights = scores[slot - slots.start..].iter().step_by(TILE);
            for (out, weight) in self.out.chunks_exact_mut(self.stride).zip(weights) {
                longctx_simd::add_scaled(*weight, row, out);
            }
        }
    }

    /// Merges the sums over other entries.
    pub fn merge(&mut self, other: &Tile) {
        for row in 0..self.max.len() {
            let max = self.max[row].max(other.max[row]);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let (a, b) = ((self.max[row] - max).exp(), (other.max[row] - max).exp());
            let ours = &mut self.out[row * self.stride..][..self.stride];
            longctx_simd::scale(ours, a);
            longctx_simd::add_scaled(b, &other.out[row * self.stride..][..self.stride], ours);
            self.sum[row] = self.sum[row] * a + other.sum[row] * b;
            self.max[row] = max;
        }
    }

    /// Returns a row's output, rotated back if values are rotated, and its log-sum-exp; `None` if
    /// it saw nothing.
    pub fn finish(&mut self, row: usize, values: &Layout) -> Option<(&[f32], f32)> {
        let (sum, scheme, columns) = (self.sum[row], values.scheme, values.columns);
        let values = &mut self.out[row * self.stride..][..columns];
        longctx_simd::scale(values, sum.recip());
        if scheme.rotated {
            hadamard(values, columns);
        }
        (sum > 0.0).then(|| (&*values, self.max[row] + sum.ln()))
    }
}
