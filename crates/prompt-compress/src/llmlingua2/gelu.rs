//! The activation `x Φ(x)` with the bias added first, in one pass.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Returns `gelu(x + bias)` for x `[rows, columns]` and bias `[columns]`, accurate to the rounding
/// of f32.
pub fn bias_gelu(x: Tensor, bias: &Tensor) -> Result<Tensor> {
    match x.device() {
        candle_core::Device::Cpu if x.dtype() == DType::F32 => {
            x.contiguous()?.apply_op2_no_bwd(&bias.contiguous()?, &BiasGelu)
        }
        _ => x.broadcast_add(bias)?.gelu_erf(),
    }
}

struct BiasGelu;

impl CustomOp2 for BiasGelu {
    fn name(&self) -> &'static str {
        "bias_gelu"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let slice = |storage, layout: &Layout| -> Result<&[f32]> {
            let all = CpuStorage::as_slice::<f32>(storage)?;
            match layout.contiguous_offsets() {
                Some((from, to)) => Ok(&all[from..to]),
                None => candle_core::bail!("bias_gelu takes contiguous tensors"),
            }
        };
        let (x, bias) = (slice(x, x_layout)?, slice(bias, bias_layout)?);
        if x_layout.dims().last() != Some(&bias.len()) {
            let (x, bias) = (x_layout.dims(), bias_layout.dims());
            candle_core::bail!("bias_gelu: {bias:?} does not fit {x:?}");
        }
        let mut out = vec![0f32; x.len()];
        out.par_chunks_mut(bias.len())
            .zip(x.par_chunks(bias.len()))
            .with_min_len(16)
            .for_each(|(out, x)| Arch::new().dispatch(Row { x, bias, out }));
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }
}

struct Row<'a> {
    x: &'a [f32],
    bias: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for ((out, &x), &bias) in self.out.iter_mut().zip(self.x).zip(self.bias) {
            let x = x + bias;
            *out = 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

/// Returns the error function as a rational polynomial on [-4, 4], the minimax approximation of
/// Eigen and XLA. Outside, f32 rounds it to ±1. It has no branches, so that the loop above
/// vectorizes.
#[inline(always)]
fn erf(x: f32) -> f32 {
    const P: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const Q: [f32; 5] =
        [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2];
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let mut p = P[0];
    for &c in &P[1..] {
        p = p.mul_add(square, c);
    }
    let mut q = Q[0];
    for &c in &Q[1..] {
        q = q.mul_add(square, c);
    }
    x * p / q
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn equals_candles_own_operation() {
        let x: Vec<f32> = (-6000..6000).map(|i| i as f32 / 1000.0).collect();
        let x = Tensor::from_vec(x, (40, 300), &Device::Cpu).unwrap();
        let bias = Tensor::rand(-0.5f32, 0.5, 300, &Device::Cpu).unwrap();
        let slow = x.broadcast_add(&bias).unwrap().gelu_erf().unwrap();
        let fast = bias_gelu(x, &bias).unwrap();
        let worst = (fast - slow).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        // Values reach 6.5, where adjacent f32 numbers differ by 4.8e-7.
        assert!(worst.to_scalar::<f32>().unwrap() < 3e-6, "{worst}");
    }

    #[test]
    fn misfits_are_named() {
        let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let bias = Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
        assert!(bias_gelu(x, &bias).unwrap_err().to_string().contains("does not fit"));
    }
}
