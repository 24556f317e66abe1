//! Norms of rows.

use pulp::{Arch, Scalar, Simd, WithSimd};

/// A norm over the last dimension.
#[derive(Debug, Clone)]
pub enum Norm {
    /// x / sqrt(mean(x²) + eps) · weight (arXiv 1910.07467).
    Rms { weight: Vec<f32>, eps: f32 },
    /// (x − mean) / sqrt(variance + eps) · weight + bias (arXiv 1607.06450).
    Layer { weight: Vec<f32>, bias: Vec<f32>, eps: f32 },
}

impl Norm {
    /// Writes the normalised rows of `x` to `y`.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        y.copy_from_slice(x);
        self.apply_in_place(y);
    }

    pub fn apply_in_place(&self, y: &mut [f32]) {
        match self {
            Norm::Rms { weight, eps } => rms_groups(y, weight, weight.len(), *eps),
            Norm::Layer { weight, bias, eps } => {
                layer_groups(y, weight, bias, weight.len(), *eps);
            }
        }
    }
}

/// Applies an RMS norm to each group of `group` channels. Rows have the length of `weight`.
pub fn rms_groups(x: &mut [f32], weight: &[f32], group: usize, eps: f32) {
    Arch::new().dispatch(Groups { x, weight, bias: None, group, eps });
}

/// Applies a layer norm to each group of `group` channels. Rows have the length of `weight`.
pub fn layer_groups(x: &mut [f32], weight: &[f32], bias: &[f32], group: usize, eps: f32) {
    Arch::new().dispatch(Groups { x, weight, bias: Some(bias), group, eps });
}

struct Groups<'a> {
    x: &'a mut [f32],
    weight: &'a [f32],
    /// With a bias, the mean is subtracted first (layer norm).
    bias: Option<&'a [f32]>,
    group: usize,
    eps: f32,
}

impl WithSimd for Groups<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let size = self.group as f32;
        for row in self.x.chunks_exact_mut(self.weight.len()) {
            for (i, x) in row.chunks_exact_mut(self.group).enumerate() {
                let channels = i * self.group..(i + 1) * self.group;
                let weight = &self.weight[channels.clone()];
                if let Some(bias) = self.bias {
                    let mean = sum(simd, x) / size;
                    shift(simd, x, -mean);
                    let scale = (square_sum(simd, x) / size + self.eps).sqrt().recip();
                    scale_shift(simd, x, scale, weight, &bias[channels]);
                } else {
                    let scale = (square_sum(simd, x) / size + self.eps).sqrt().recip();
                    scale_by(simd, x, scale, weight);
                }
            }
        }
    }
}

#[inline(always)]
fn sum<S: Simd>(simd: S, x: &[f32]) -> f32 {
    let (head, tail) = S::as_simd_f32s(x);
    let mut sum = simd.splat_f32s(0.0);
    for &x in head {
        sum = simd.add_f32s(sum, x);
    }
    simd.reduce_sum_f32s(sum) + tail.iter().sum::<f32>()
}

#[inline(always)]
fn square_sum<S: Simd>(simd: S, x: &[f32]) -> f32 {
    crate::simd::dot(simd, x, x)
}

#[inline(always)]
fn shift<S: Simd>(simd: S, x: &mut [f32], by: f32) {
    let (head, tail) = S::as_mut_simd_f32s(x);
    for x in head {
        *x = simd.add_f32s(*x, simd.splat_f32s(by));
    }
    for x in tail {
        *x += by;
    }
}

#[inline(always)]
fn scale_by<S: Simd>(simd: S, x: &mut [f32], scale: f32, weight: &[f32]) {
    let (x, x_tail) = S::as_mut_simd_f32s(x);
    let (w, w_tail) = S::as_simd_f32s(weight);
    for (x, &w) in x.iter_mut().zip(w) {
        *x = simd.mul_f32s(simd.mul_f32s(*x, simd.splat_f32s(scale)), w);
    }
    for (x, &w) in x_tail.iter_mut().zip(w_tail) {
        *x = *x * scale * w;
    }
}

#[inline(always)]
fn scale_shift<S: Simd>(simd: S, x: &mut [f32], scale: f32, weight: &[f32], bias: &[f32]) {
    #[inline(always)]
    fn run<S: Simd>(simd: S, x: &mut [S::f32s], scale: f32, w: &[S::f32s], b: &[S::f32s]) {
        for ((x, &w), &b) in x.iter_mut().zip(w).zip(b) {
            *x = simd.mul_add_f32s(simd.mul_f32s(*x, simd.splat_f32s(scale)), w, b);
        }
    }
    let (x, x_tail) = S::as_mut_simd_f32s(x);
    let (w, w_tail) = S::as_simd_f32s(weight);
    let (b, b_tail) = S::as_simd_f32s(bias);
    run(simd, x, scale, w, b);
    run(Scalar, x_tail, scale, w_tail, b_tail);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_normalised_apart() {
        let x: Vec<f32> = (0..2 * 3 * 21).map(|i| ((i * 37) % 23) as f32 - 7.0).collect();
        let weight: Vec<f32> = (0..63).map(|i| 1.0 + i as f32 / 50.0).collect();
        let bias: Vec<f32> = (0..63).map(|i| i as f32 / 9.0).collect();
        let (mut rms, mut layer) = (x.clone(), x.clone());
        rms_groups(&mut rms, &weight, 21, 1e-5);
        layer_groups(&mut layer, &weight, &bias, 21, 1e-5);
        for (g, group) in x.chunks(21).enumerate() {
            let mean = group.iter().sum::<f32>() / 21.0;
            let power = |shift: f32| group.iter().map(|x| (x - shift).powi(2)).sum::<f32>() / 21.0;
            let (of_rms, of_layer) = ((power(0.0) + 1e-5).sqrt(), (power(mean) + 1e-5).sqrt());
            for (i, &x) in group.iter().enumerate() {
                let (at, channel) = (g * 21 + i, (g * 21 + i) % 63);
                assert!((rms[at] - x / of_rms * weight[channel]).abs() < 1e-5);
                let want = (x - mean) / of_layer * weight[channel] + bias[channel];
                assert!((layer[at] - want).abs() < 1e-5);
            }
        }
    }
}
