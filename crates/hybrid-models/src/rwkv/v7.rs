//! RWKV-7's time mixing ("Goose", Peng et al., arXiv 2503.14456): the generalised delta rule.
//!
//! Per head, with removal key κ̂: S ← S (diag(w) − κ̂ᵀ (a ∘ κ̂)) + vᵀ k and y = S r.

mod delta;

use super::mix::{differences, mix};
use super::{GROUP_EPS, Names, heads, load_mix, state_arrays};
use crate::checkpoint::Checkpoint;
use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Recurrent, Span, StateArray};
use crate::norm::layer_groups;
use crate::simd::{Mul, Sigmoid, Tanh, UnaryFn, exp, map, sigmoid, zip};
use crate::workspace::Workspace;
use delta::{Inputs, delta_rule};
use longctx_core::Result;
use pulp::{Arch, Scalar, Simd, WithSimd};
use rayon::prelude::*;

#[derive(Debug)]
pub struct V7 {
    pub hidden: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// Token shifts of receptance, decay, key, value, learning rate and gate.
    pub mixes: [Vec<f32>; 6],
    pub receptance: Matrix,
    pub key: Matrix,
    pub value: Matrix,
    /// Low-rank maps of the decay, the learning rate and the gate.
    pub decay: LowRank,
    pub rate: LowRank,
    pub gate: LowRank,
    /// The weight of the first layer's values; `None` in the first layer.
    pub first_values: Option<LowRank>,
    pub removal_scale: Vec<f32>,
    pub key_rate: Vec<f32>,
    pub bonus: Vec<f32>,
    pub group_norm: (Vec<f32>, Vec<f32>),
    pub output: Matrix,
}

/// A low-rank map `bias + W₂ f(W₁ x)`.
#[derive(Debug)]
pub struct LowRank {
    pub first: Matrix,
    pub second: Matrix,
    /// Empty for the gate.
    pub bias: Vec<f32>,
}

impl LowRank {
    /// Loads `name`1, `name`2 and, if it exists, `name`0.
    fn load(w: &Checkpoint, name: &str, hidden: usize) -> Result<Self> {
        let first = format!("{name}1");
        let [_, rank] = w.matrix_dims(&first, "[hidden, rank]")?;
        let bias = format!("{name}0");
        Ok(Self {
            first: w.transposed(&first, rank, hidden)?,
            second: w.transposed(&format!("{name}2"), hidden, rank)?,
            bias: match w.has(&bias) {
                true => w.tensor(&bias, &[hidden])?,
                false => vec![0.0; hidden],
            },
        })
    }

    fn apply(&self, x: &[f32], f: Option<Inner>, workspace: &mut Workspace, y: &mut [f32]) {
        let hidden = self.bias.len();
        let mut bottleneck = workspace.acquire(x.len() / hidden * self.first.out());
        self.first.apply(Rows::new(x, hidden), &mut bottleneck);
        match f {
            Some(Inner::Tanh) => map(Tanh, &mut bottleneck),
            Some(Inner::Sigmoid) => map(Sigmoid, &mut bottleneck),
            None => {}
        }
        self.second.apply(Rows::new(&bottleneck, self.first.out()), y);
        y.par_chunks_exact_mut(hidden).for_each(|row| zip(crate::simd::Add, row, &self.bias));
        workspace.release(bottleneck);
    }
}

/// The function between the two matrices.
enum Inner {
    Tanh,
    Sigmoid,
}

/// Computes the decay e^(−e^−½ sigmoid(x)).
#[derive(Clone, Copy)]
struct Forget;

impl UnaryFn for Forget {
    #[inline(always)]
    fn at<S: Simd>(self, simd: S, x: S::f32s) -> S::f32s {
        exp(simd, simd.mul_f32s(sigmoid(simd, x), simd.splat_f32s(-0.606_530_66)))
    }
}

impl V7 {
    pub fn load(w: &Checkpoint, names: &Names, layer: usize, hidden: usize) -> Result<Self> {
        let name = |part: &str| names.time(layer, part);
        let (heads, head_dim) = heads(w, &name("r_k"), hidden)?;
        let mix = |part: &str| load_mix(w, &name(&format!("x_{part}")), hidden, 7);
        let map = |part: &str| w.matrix(&name(part), hidden, hidden);
        let low_rank = |part: &str| LowRank::load(w, &name(part), hidden);
        let vector = |part: &str| w.tensor(&name(part), &[hidden]);
        Ok(Self {
            hidden,
            heads,
            head_dim,
            mixes: [mix("r")?, mix("w")?, mix("k")?, mix("v")?, mix("a")?, mix("g")?],
            receptance: map("receptance.weight")?,
            key: map("key.weight")?,
            value: map("value.weight")?,
            decay: low_rank("w")?,
            rate: low_rank("a")?,
            gate: low_rank("g")?,
            first_values: (layer > 0).then(|| low_rank("v")).transpose()?,
            removal_scale: vector("k_k")?,
            key_rate: vector("k_a")?,
            bonus: w.tensor(&name("r_k"), &[heads, head_dim])?,
            group_norm: (vector("ln_x.weight")?, vector("ln_x.bias")?),
            output: map("output.weight")?,
        })
    }

    /// Returns the values, mixed with those of the first layer. The first layer stores its own for
    /// the others.
    fn values(&self, mixed: &[f32], workspace: &mut Workspace, v: &mut [f32]) {
        self.value.apply(Rows::new(mixed, self.hidden), v);
        let Some(share) = &self.first_values else {
            workspace.first_values.clear();
            workspace.first_values.extend_from_slice(v);
            return;
        };
        let mut shares = workspace.acquire(v.len());
        share.apply(mixed, None, workspace, &mut shares);
        map(Sigmoid, &mut shares);
        let others = workspace.first_values.iter().zip(&shares);
        v.iter_mut().zip(others).for_each(|(v, (first, share))| *v += (first - *v) * share);
        workspace.release(shares);
    }
}

impl Recurrent for V7 {
    fn state(&self) -> Vec<StateArray> {
        state_arrays(self.hidden, self.heads, self.head_dim)
    }

    fn forward(
        &self,
        x: Input<'_>,
        states: &mut [&mut [f32]],
        workspace: &mut Workspace,
        out: &mut [f32],
    ) {
        let (rows, hidden) = (x.rows(), self.hidden);
        let [mut shift, mut mixed] = [0; 2].map(|_| workspace.acquire(rows * hidden));
        let [mut r, mut w, mut k, mut v, mut a, mut g] =
            [0; 6].map(|_| workspace.acquire(rows * hidden));
        differences(x, hidden, states, &mut shift);
        let [mix_r, mix_w, mix_k, mix_v, mix_a, mix_g] = &self.mixes;
        mix(x.x, &shift, mix_r, &mut mixed);
        self.receptance.apply(Rows::new(&mixed, hidden), &mut r);
        mix(x.x, &shift, mix_w, &mut mixed);
        self.decay.apply(&mixed, Some(Inner::Tanh), workspace, &mut w);
        mix(x.x, &shift, mix_k, &mut mixed);
        self.key.apply(Rows::new(&mixed, hidden), &mut k);
        mix(x.x, &shift, mix_v, &mut mixed);
        self.values(&mixed, workspace, &mut v);
        mix(x.x, &shift, mix_a, &mut mixed);
        self.rate.apply(&mixed, None, workspace, &mut a);
        mix(x.x, &shift, mix_g, &mut mixed);
        self.gate.apply(&mixed, Some(Inner::Sigmoid), workspace, &mut g);
        map(Forget, &mut w);
        // From here on `shift` holds the removal key and `a` the added key.
        let removal_key = &mut shift;
        let parts = k.par_chunks_exact_mut(hidden).zip(a.par_chunks_exact_mut(hidden));
        parts.zip(removal_key.par_chunks_exact_mut(hidden)).for_each(|((k, a), removal_key)| {
            Arch::new().dispatch(Keys { layer: self, k, a, removal_key });
        });
        let y = &mut mixed;
        for (span, state) in x.spans.iter().zip(states) {
            let Span { row, tokens, .. } = *span;
            let of_span = |data| Rows::new(data, hidden).part(row, tokens);
            let inputs = Inputs {
                r: of_span(&r),
                k: of_span(&k),
                v: of_span(&v),
                w: of_span(&w),
                removal_key: of_span(removal_key),
                scaled_removal_key: of_span(&a),
            };
            let y = &mut y[row * hidden..][..tokens * hidden];
            delta_rule(inputs, self.head_dim, tokens, &mut state[hidden..], y);
        }
        let (weight, bias) = &self.group_norm;
        layer_groups(y, weight, bias, self.head_dim, GROUP_EPS);
        self.add_bonus(&r, &k, &v, y);
        zip(Mul, y, &g);
        self.output.apply(Rows::new(y, hidden), out);
        for buffer in [g, a, v, k, w, r, mixed, shift] {
            workspace.release(buffer);
        }
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>> {
        Ok(Box::new(crate::cuda::V7::new(self, to)?))
    }
}

impl V7 {
    /// Adds (Σ r k ρ) v of each head: the contribution of the token's own key and value.
    fn add_bonus(&self, r: &[f32], k: &[f32], v: &[f32], y: &mut [f32]) {
        let d = self.head_dim;
        let inputs = r.par_chunks_exact(d).zip(k.par_chunks_exact(d)).zip(v.par_chunks_exact(d));
        y.par_chunks_exact_mut(d).zip(inputs).enumerate().for_each(|(i, (y, ((r, k), v)))| {
            let bonus = &self.bonus[i % self.heads * d..][..d];
            let weight: f32 = r.iter().zip(k).zip(bonus).map(|((r, k), bonus)| r * k * bonus).sum();
            y.iter_mut().zip(v).for_each(|(y, v)| *y += weight * v);
        });
    }
}

/// Computes one row's removal keys κ̂ (unit length per head), its keys k (1 + (a − 1) α), and the
/// added keys a ∘ κ̂ in place of a.
struct Keys<'a> {
    layer: &'a V7,
    k: &'a mut [f32],
    /// Before the sigmoid.
    a: &'a mut [f32],
    removal_key: &'a mut [f32],
}

impl WithSimd for Keys<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let V7 { head_dim, removal_scale: scale, key_rate, .. } = self.layer;
        let heads =
            self.removal_key.chunks_exact_mut(*head_dim).zip(self.k.chunks_exact(*head_dim));
        for ((removal_key, k), scale) in heads.zip(scale.chunks_exact(*head_dim)) {
            for ((removal_key, k), scale) in removal_key.iter_mut().zip(k).zip(scale) {
                *removal_key = k * scale;
            }
            let norm = crate::simd::dot(simd, removal_key, removal_key).sqrt().max(1e-12);
            for removal_key in removal_key {
                *removal_key /= norm;
            }
        }
        #[inline(always)]
        fn run<S: Simd>(
            simd: S,
            k: &mut [S::f32s],
            a: &mut [S::f32s],
            removal_key: &[S::f32s],
            key_rate: &[S::f32s],
        ) {
            let one = simd.splat_f32s(1.0);
            for (((k, a), &removal_key), &key_rate) in
                k.iter_mut().zip(a).zip(removal_key).zip(key_rate)
            {
                let rate = sigmoid(simd, *a);
                let factor = simd.mul_add_f32s(simd.sub_f32s(rate, one), key_rate, one);
                *k = simd.mul_f32s(*k, factor);
                *a = simd.mul_f32s(rate, removal_key);
            }
        }
        let (k, k_tail) = S::as_mut_simd_f32s(self.k);
        let (a, a_tail) = S::as_mut_simd_f32s(self.a);
        let (removal_key, removal_tail) = S::as_simd_f32s(self.removal_key);
        let (rate, rate_tail) = S::as_simd_f32s(key_rate);
        run(simd, k, a, removal_key, rate);
        run(Scalar, k_tail, a_tail, removal_tail, rate_tail);
    }
}
