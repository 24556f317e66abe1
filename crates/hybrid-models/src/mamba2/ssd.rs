//! The recurrence H ← e^(Δ a) H + Δ B xᵀ, y = Hᵀ C + D x of each head. Single tokens are computed
//! step by step; prompts are computed in chunks by matrix products (the state space duality of
//! arXiv 2405.21060, section 6).
//!
//! Let s(t) be the sum of Δ a up to token t of a chunk. The outputs of the chunk are Y = (L ∘ C Bᵀ)
//! (Δ X) + e^s ∘ (C H₀) with L(t, u) = e^(s(t) − s(u)) for u ≤ t. The state after it is H =
//! e^s(end) H₀ + Bᵀ (e^(s(end) − s) Δ X). No exponent is positive, so nothing overflows.

use std::cell::RefCell;

use super::Mamba2Shape;
use crate::matrix::Rows;
use crate::simd::{Exp, Softplus, exp, map};
use crate::split_columns::{UnitMatrix, split_columns};
use crate::workspace::Workspace;
use longctx_simd::matrix::{Matrix, Parallelism, multiply};
use pulp::{Arch, Scalar, Simd, WithSimd};
use rayon::prelude::*;

/// Tokens per chunk.
const CHUNK: usize = 64;
/// Up to this many tokens, single steps are cheaper than a chunk.
const STEPS: usize = 8;
/// Smallest number of tokens x channels for which several threads are used.
const PARALLEL: usize = 1 << 12;

/// The weights of the recurrence.
#[derive(Debug)]
pub struct Ssd {
    pub shape: Mamba2Shape,
    /// One value per head, as in the fields below.
    pub a: Vec<f32>,
    /// Added to the time steps before the softplus.
    pub time_bias: Vec<f32>,
    /// D.
    pub skip: Vec<f32>,
}

/// The temporaries of a chunk of one head.
#[derive(Default)]
struct Scratch {
    /// Δ.
    steps: Vec<f32>,
    /// s, and its rounding error in f32, so that differences of sums are as exact as single steps.
    sums: Vec<f32>,
    rests: Vec<f32>,
    /// e^s, then e^(s(end) − s).
    decays: Vec<f32>,
    /// Δ X.
    inputs: Vec<f32>,
    /// L ∘ C Bᵀ.
    weights: Vec<f32>,
    /// Y.
    outputs: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Ssd {
    /// Runs the recurrence. `mixed`: rows of x, B and C; `steps`: time steps before bias and
    /// softplus, per head. Updates `state` `[heads, states, head_dim]` and writes `y` `[tokens,
    /// heads, head_dim]`.
    pub fn run(
        &self,
        mixed: Rows<'_>,
        steps: Rows<'_>,
        tokens: usize,
        state: &mut [f32],
        y: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let Mamba2Shape { heads, head_dim, states, groups, .. } = self.shape;
        let mut products = workspace.acquire(groups * tokens.next_multiple_of(CHUNK) * CHUNK);
        self.products(mixed, tokens, &mut products);
        let of_group = products.len() / groups;
        let matrices = [
            UnitMatrix { data: y, per_unit: head_dim },
            UnitMatrix { data: state, per_unit: states * head_dim },
        ];
        let parallel = tokens * heads * head_dim >= PARALLEL;
        split_columns(heads, 1, parallel, matrices, |unit, [mut y, mut state]| {
            let head = Head::new(self, unit.start, mixed, steps);
            let products = &products[unit.start / (heads / groups) * of_group..][..of_group];
            let state = state.row(0);
            SCRATCH.with_borrow_mut(|scratch| {
                for (start, products) in
                    (0..tokens).step_by(CHUNK).zip(products.chunks(CHUNK * CHUNK))
                {
                    let count = CHUNK.min(tokens - start);
                    head.time_steps(start, count, scratch);
                    if count <= STEPS {
                        for t in 0..count {
                            head.step(start + t, scratch.steps[t], state, y.row(start + t));
                        }
                        continue;
                    }
                    head.chunk(start, count, products, scratch, state);
                    for (t, from) in scratch.outputs.chunks_exact(head_dim).enumerate() {
                        y.row(start + t).copy_from_slice(from);
                    }
                }
            });
        });
        workspace.release(products);
    }

    /// Computes C Bᵀ of each chunk that is computed by products, for each group.
    fn products(&self, mixed: Rows<'_>, tokens: usize, products: &mut [f32]) {
        let Mamba2Shape { groups, .. } = self.shape;
        let chunks = tokens.div_ceil(CHUNK);
        let run = |(i, product): (usize, &mut [f32])| {
            let (group, start) = (i / chunks, i % chunks * CHUNK);
            let count = CHUNK.min(tokens - start);
            if count > STEPS {
                let head = Head::new(self, group * (self.shape.heads / groups), mixed, mixed);
                let b = head.b.part(start, count).view(count).transpose();
                let c = head.c.part(start, count).view(count);
                multiply(c, b, product, count, 0.0, Parallelism::None);
            }
        };
        match groups * chunks > 1 {
            true => products.par_chunks_mut(CHUNK * CHUNK).enumerate().for_each(run),
            false => products.chunks_mut(CHUNK * CHUNK).enumerate().for_each(run),
        }
    }
}

/// One head of one sequence.
struct Head<'a> {
    states: usize,
    head_dim: usize,
    a: f32,
    skip: f32,
    time_bias: f32,
    limit: (f32, f32),
    steps: Rows<'a>,
    x: Rows<'a>,
    b: Rows<'a>,
    c: Rows<'a>,
}

impl<'a> Head<'a> {
    fn new(ssd: &Ssd, head: usize, mixed: Rows<'a>, steps: Rows<'a>) -> Self {
        let Mamba2Shape { heads, head_dim, states, groups, .. } = ssd.shape;
        let b = heads * head_dim + head / (heads / groups) * states;
        Self {
            states,
            head_dim,
            a: ssd.a[head],
            skip: ssd.skip[head],
            time_bias: ssd.time_bias[head],
            limit: ssd.shape.time_step_limit,
            steps: steps.columns(head, 1),
            x: mixed.columns(head * head_dim, head_dim),
            b: mixed.columns(b, states),
            c: mixed.columns(b + groups * states, states),
        }
    }

    /// Computes Δ and s.
    fn time_steps(&self, start: usize, count: usize, scratch: &mut Scratch) {
        let Scratch { steps, sums, rests, .. } = scratch;
        steps.clear();
        steps.extend((0..count).map(|t| self.steps.row(start + t)[0] + self.time_bias));
        map(Softplus, steps);
        steps.iter_mut().for_each(|step| *step = step.max(self.limit.0).min(self.limit.1));
        let mut sum = 0.0;
        sums.clear();
        rests.clear();
        for step in steps {
            sum += f64::from(*step * self.a);
            sums.push(sum as f32);
            rests.push((sum - f64::from(sum as f32)) as f32);
        }
    }

    fn step(&self, t: usize, step: f32, state: &mut [f32], y: &mut [f32]) {
        let decay = (step * self.a).exp();
        let (x, b, c) = (self.x.row(t), self.b.row(t), self.c.row(t));
        Arch::new().dispatch(Step { decay, step, skip: self.skip, x, b, c, state, y });
    }

    /// Computes a chunk: writes the outputs `[count, head_dim]` to the scratch and updates the
    /// state.
    fn chunk(
        &self,
        start: usize,
        count: usize,
        products: &[f32],
        scratch: &mut Scratch,
        state: &mut [f32],
    ) {
        let (states, d) = (self.states, self.head_dim);
        let Scratch { steps, sums, rests, decays, inputs, weights, outputs } = scratch;
        weights.clear();
        weights.extend_from_slice(&products[..count * count]);
        Arch::new().dispatch(Decay { sums, rests, weights });
        decays.clone_from(sums);
        map(Exp, decays);
        inputs.clear();
        outputs.clear();
        for (t, step) in (start..).zip(steps.iter()) {
            inputs.extend(self.x.row(t).iter().map(|x| x * step));
        }
        outputs.resize(count * d, 0.0);

        let (b, c) = (self.b.part(start, count), self.c.part(start, count));
        let none = Parallelism::None;
        multiply(c.view(count), Matrix::new(state, states, d), outputs, d, 0.0, none);
        scale_rows(outputs, d, decays);
        let weights = Matrix::new(weights, count, count);
        multiply(weights, Matrix::new(inputs, count, d), outputs, d, 1.0, none);
        for (t, y) in outputs.chunks_exact_mut(d).enumerate() {
            y.iter_mut().zip(self.x.row(start + t)).for_each(|(y, x)| *y += self.skip * x);
        }

        let (end, end_rest) = (sums[count - 1], rests[count - 1]);
        for (decay, (s, rest)) in decays.iter_mut().zip(sums.iter().zip(rests.iter())) {
            *decay = (end - s) + (end_rest - rest);
        }
        map(Exp, decays);
        scale_rows(inputs, d, decays);
        let inputs = Matrix::new(inputs, count, d);
        multiply(b.view(count).transpose(), inputs, state, d, end.exp(), none);
    }
}

fn scale_rows(x: &mut [f32], width: usize, by: &[f32]) {
    for (row, by) in x.chunks_exact_mut(width).zip(by) {
        row.iter_mut().for_each(|x| *x *= by);
    }
}

/// Computes `weights[t][u] *= e^(s(t) − s(u))` for u ≤ t, and zero for the others.
struct Decay<'a> {
    sums: &'a [f32],
    rests: &'a [f32],
    weights: &'a mut [f32],
}

impl WithSimd for Decay<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        #[inline(always)]
        fn run<S: Simd>(
            simd: S,
            w: &mut [S::f32s],
            (sums, rests): (&[S::f32s], &[S::f32s]),
            (s, rest): (f32, f32),
        ) {
            let (s, rest) = (simd.splat_f32s(s), simd.splat_f32s(rest));
            for ((w, &u), &u_rest) in w.iter_mut().zip(sums).zip(rests) {
                let between = simd.add_f32s(simd.sub_f32s(s, u), simd.sub_f32s(rest, u_rest));
                *w = simd.mul_f32s(*w, exp(simd, between));
            }
        }
        for (t, row) in self.weights.chunks_exact_mut(self.sums.len()).enumerate() {
            let (seen, unseen) = row.split_at_mut(t + 1);
            unseen.fill(0.0);
            let (w, w_tail) = S::as_mut_simd_f32s(seen);
            let (s, s_tail) = S::as_simd_f32s(&self.sums[..t + 1]);
            let (rest, rest_tail) = S::as_simd_f32s(&self.rests[..t + 1]);
            let at = (self.sums[t], self.rests[t]);
            run(simd, w, (s, rest), at);
            run(Scalar, w_tail, (s_tail, rest_tail), at);
        }
    }
}

/// One token of one head.
struct Step<'a> {
    decay: f32,
    step: f32,
    skip: f32,
    x: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    /// `[states, head_dim]`.
    state: &'a mut [f32],
    y: &'a mut [f32],
}

impl WithSimd for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { decay, step, skip, x, b, c, state, y } = self;
        for (y, x) in y.iter_mut().zip(x) {
            *y = skip * x;
        }
        #[inline(always)]
        fn run<S: Simd>(
            simd: S,
            [decay, input, c]: [f32; 3],
            h: &mut [S::f32s],
            x: &[S::f32s],
            y: &mut [S::f32s],
        ) {
            for ((h, &x), y) in h.iter_mut().zip(x).zip(y) {
                let kept = simd.mul_f32s(simd.splat_f32s(decay), *h);
                *h = simd.mul_add_f32s(simd.splat_f32s(input), x, kept);
                *y = simd.mul_add_f32s(simd.splat_f32s(c), *h, *y);
            }
        }
        let (x, x_tail) = S::as_simd_f32s(x);
        let d = y.len();
        let (y, y_tail) = S::as_mut_simd_f32s(y);
        for ((h, b), &c) in state.chunks_exact_mut(d).zip(b).zip(c) {
            let (h, h_tail) = S::as_mut_simd_f32s(h);
            run(simd, [decay, step * b, c], h, x, y);
            run(Scalar, [decay, step * b, c], h_tail, x_tail, y_tail);
        }
    }
}
