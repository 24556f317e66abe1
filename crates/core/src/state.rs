//! Attention over a part of the entries, mergeable with other parts without loss.

use crate::{Error, Result};
use candle_core::{D, Tensor};

/// Attention over a part of the entries that the queries see.
#[derive(Debug, Clone)]
pub struct AttentionState {
    /// The softmax-weighted sum of the part's values, normalised within the part: f32, `[tokens,
    /// heads, value_dim]`. Zero where nothing is visible.
    pub out: Tensor,
    /// The natural log-sum-exp of the part's scores: f32, `[tokens, heads]`. -inf where nothing is
    /// visible.
    pub lse: Tensor,
}

impl AttentionState {
    /// Merges attention over disjoint sets of entries into attention over their union.
    ///
    /// # Errors
    /// If `parts` is empty, or their shapes differ.
    pub fn merge(parts: &[AttentionState]) -> Result<AttentionState> {
        let [first, rest @ ..] = parts else {
            return Err(Error::mismatch("parts of an attention", "at least one", 0));
        };
        if rest.is_empty() {
            return Ok(first.clone());
        }
        #[cfg(feature = "cuda")]
        if let Some(merged) = on_cuda::merge(first, rest)? {
            return Ok(merged);
        }
        let lse = Tensor::stack(&parts.iter().map(|p| &p.lse).collect::<Vec<_>>(), 0)?;
        // A query that sees nothing in any part keeps a log-sum-exp of -inf and an output of zero.
        let max = lse.max(0)?.maximum(f32::MIN)?;
        let weights = lse.broadcast_sub(&max.unsqueeze(0)?)?.exp()?;
        let sum = weights.sum(0)?;
        let scaled = weights.broadcast_div(&sum.maximum(f32::MIN_POSITIVE)?.unsqueeze(0)?)?;
        let mut out = first.out.broadcast_mul(&scaled.get(0)?.unsqueeze(D::Minus1)?)?;
        for (i, part) in rest.iter().enumerate() {
            out = (out + part.out.broadcast_mul(&scaled.get(i + 1)?.unsqueeze(D::Minus1)?)?)?;
        }
        Ok(AttentionState { out, lse: (max + sum.log()?)? })
    }

    /// Adds each query head's learned sink logit (`[heads]`) to its softmax. The sink takes a share
    /// of the attention and has no value.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless there is one logit for each head.
    pub fn with_sink_logits(self, logits: &[f32]) -> Result<AttentionState> {
        let heads = self.lse.dim(D::Minus1)?;
        if logits.len() != heads {
            return Err(Error::mismatch("sink logits", heads, logits.len()));
        }
        let sinks = Tensor::new(logits, self.lse.device())?.broadcast_as(self.lse.shape())?;
        let max = self.lse.maximum(&sinks)?;
        let sum = ((&self.lse - &max)?.exp()? + (sinks - &max)?.exp()?)?;
        let lse = (max + sum.log()?)?;
        let share = (&self.lse - &lse)?.exp()?;
        Ok(AttentionState { out: self.out.broadcast_mul(&share.unsqueeze(D::Minus1)?)?, lse })
    }
}

#[cfg(feature = "cuda")]
#[allow(unsafe_code)]
mod on_cuda {
    use super::AttentionState;
    use crate::cuda::address;
    use crate::{Error, Result};
    use candle_core::{CudaDevice, DType, Device, Tensor};
    use longctx_kernels::{MergeArgs, merge_states};

    /// Merges parts one after the other, one kernel for each. Returns `None` for parts that are not
    /// all on one CUDA device, and for outputs that the kernel does not support.
    pub fn merge(
        first: &AttentionState,
        rest: &[AttentionState],
    ) -> Result<Option<AttentionState>> {
        let Device::Cuda(device) = first.out.device() else { return Ok(None) };
        let columns = first.out.dims3()?.2;
        let all = || std::iter::once(first).chain(rest);
        let fits =
            |x: &&Tensor| x.dtype() == DType::F32 && x.device().same_device(first.out.device());
        let fit = all().all(|part| [&part.out, &part.lse].iter().all(fits));
        if !fit || !columns.is_multiple_of(4) || first.lse.elem_count() == 0 {
            return Ok(None);
        }
        if let Some(other) = rest.iter().find(|part| {
            part.out.shape() != first.out.shape() || part.lse.shape() != first.lse.shape()
        }) {
            let got = format!("{:?}", other.out.dims());
            return Err(Error::mismatch(
                "part of an attention",
                format!("{:?}", first.out.dims()),
                got,
            ));
        }
        let mut merged = first.clone();
        for part in rest {
            merged = merge_two(device, &merged, part)?;
        }
        Ok(Some(merged))
    }

    fn merge_two(
        device: &CudaDevice,
        a: &AttentionState,
        b: &AttentionState,
    ) -> Result<AttentionState> {
        let parts = [&a.out, &a.lse, &b.out, &b.lse].map(Tensor::contiguous);
        let [out_a, lse_a, out_b, lse_b] = parts;
        let (out_a, lse_a, out_b, lse_b) = (out_a?, lse_a?, out_b?, lse_b?);
        // SAFETY: the kernel writes every element.
        let (out, lse) = unsafe { (out_a.empty_like()?, lse_a.empty_like()?) };
        let args = MergeArgs {
            out_a: address(&out_a)?,
            lse_a: address(&lse_a)?,
            out_b: address(&out_b)?,
            lse_b: address(&lse_b)?,
            out: address(&out)?,
            lse: address(&lse)?,
            rows: lse.elem_count() as i64,
            columns: out.dims3()?.2 as i32,
            unused: 0,
        };
        // SAFETY: the tensors have the sizes in `args`, and the stream frees no memory before this
        // launch has used it.
        unsafe { merge_states(&device.cuda_stream(), &args) }?;
        Ok(AttentionState { out, lse })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_sink_logit_is_a_score_without_a_value() {
        // Two scores s and a sink: a softmax over three logits, two of which have values.
        let (scores, values, sink) = ([0.3f32, -1.2], [2.0f32, 5.0], 0.7f32);
        let sum: f32 = scores.iter().map(|s| s.exp()).sum();
        let out = scores.iter().zip(values).map(|(s, v)| s.exp() * v).sum::<f32>() / sum;
        let state = AttentionState {
            out: Tensor::new(&[[[out]]], &Device::Cpu).unwrap(),
            lse: Tensor::new(&[[sum.ln()]], &Device::Cpu).unwrap(),
        };
        let with = state.with_sink_logits(&[sink]).unwrap();
        let all = sum + sink.exp();
        let got = with.out.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
        assert!((got - out * sum / all).abs() < 1e-6);
        let lse = with.lse.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0];
        assert!((lse - all.ln()).abs() < 1e-6);
    }
}
