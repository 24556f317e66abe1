//! The part of a decoder between the attention of one layer and that of the next.

use crate::{Error, Result, add_rms_norm, linear, silu_mul};
use candle_core::Tensor;

/// The weights between the attentions of two layers: an output projection, a norm, a gated
/// feed-forward block with SiLU, and the norm and the projection of the next layer.
#[derive(Debug, Clone)]
pub struct PostAttentionWeights {
    /// The output projection, `[hidden, attention size]`.
    pub output: Tensor,
    /// The weights of the feed-forward block's norm, `[hidden]`.
    pub norm: Tensor,
    /// The gate projection, followed by the up projection, `[2 inner, hidden]`.
    pub gate_up: Tensor,
    /// The down projection, `[hidden, inner]`.
    pub down: Tensor,
    /// The weights of the next norm, `[hidden]`.
    pub next_norm: Tensor,
    /// The projection after it, `[out, hidden]`: queries, keys and values, or the output head.
    pub next: Tensor,
    /// Added to the mean squares of both norms.
    pub eps: f32,
}

/// The part of a decoder between the attentions of two layers.
///
/// A decode step reads all weights for a few tokens. On CUDA (f16 or bf16, up to 32 tokens, compute
/// capability 9.0) a product reads its weights before the previous one has ended. Elsewhere
/// [`forward`](Self::forward) calls [`linear`], [`add_rms_norm`] and [`silu_mul`].
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::{PostAttention, PostAttentionWeights};
///
/// let ones = |rows, columns| Tensor::ones((rows, columns), DType::F32, &Device::Cpu);
/// let norm = Tensor::ones(8, DType::F32, &Device::Cpu)?;
/// let layer = PostAttention::new(PostAttentionWeights {
///     output: ones(8, 16)?,
///     norm: norm.clone(),
///     gate_up: ones(2 * 24, 8)?,
///     down: ones(8, 24)?,
///     next_norm: norm,
///     next: ones(10, 8)?,
///     eps: 1e-5,
/// })?;
/// let (attention, residual) = (ones(1, 16)?, ones(1, 8)?);
/// let (sum, y) = layer.forward(&attention, &residual)?;
/// assert_eq!((sum.dims(), y.dims()), (&[1, 8][..], &[1, 10][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct PostAttention {
    weights: PostAttentionWeights,
}

impl PostAttention {
    /// Batches with more tokens use separate products.
    pub const MAX_TOKENS: usize = 32;

    /// Checks the weights, and waits until the device has written them. [`forward`](Self::forward) reads
    /// them without waiting for earlier work.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the shapes do not match; an error of candle or of the CUDA driver.
    pub fn new(weights: PostAttentionWeights) -> Result<Self> {
        let PostAttentionWeights { output, norm, gate_up, down, next_norm, next, .. } = &weights;
        let ((hidden, size), (_, inner)) = (output.dims2()?, down.dims2()?);
        let shapes: [(_, _, &[usize]); 6] = [
            ("output", output, &[hidden, size]),
            ("norm", norm, &[hidden]),
            ("gate_up", gate_up, &[2 * inner, hidden]),
            ("down", down, &[hidden, inner]),
            ("next_norm", next_norm, &[hidden]),
            ("next", next, &[next.dim(0)?, hidden]),
        ];
        for (what, x, expected) in shapes {
            check(what, x, expected)?;
        }
        // Only weights that are all on one device are read early.
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = output.device() {
            device.cuda_stream().context().synchronize()?;
        }
        Ok(Self { weights })
    }

    /// Returns the residual stream after the feed-forward block, `[tokens, hidden]`, and the next
    /// projection of its norm, `[tokens, out]`. `attention`: `[tokens, attention size]`; `residual`:
    /// the residual stream before attention, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the shapes do not match; an error of candle or of the CUDA driver.
    pub fn forward(&self, attention: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        let PostAttentionWeights { output, norm, gate_up, down, next_norm, next, eps } =
            &self.weights;
        let ((hidden, size), (tokens, _)) = (output.dims2()?, attention.dims2()?);
        check("attention", attention, &[tokens, size])?;
        check("residual", residual, &[tokens, hidden])?;
        #[cfg(feature = "cuda")]
        if let Some(both) = self.on_cuda(attention, residual)? {
            return Ok(both);
        }
        let y = linear(attention, output)?;
        let (middle, normed) = add_rms_norm(residual, Some(&y), norm, *eps)?;
        let both = linear(&normed, gate_up)?;
        let inner = down.dim(1)?;
        let (gate, up) = (both.narrow(1, 0, inner)?, both.narrow(1, inner, inner)?);
        let y = linear(&silu_mul(&gate, &up)?, down)?;
        let (sum, normed) = add_rms_norm(&middle, Some(&y), next_norm, *eps)?;
        Ok((sum, linear(&normed, next)?))
    }

    /// Returns `None` if the kernel does not support the device, the dtypes, the layouts or the
    /// sizes.
    #[cfg(feature = "cuda")]
    #[allow(unsafe_code)]
    fn on_cuda(&self, attention: &Tensor, residual: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        use crate::cuda::{address, empty, fits_kernel, half_of};
        use candle_core::Device;
        use longctx_kernels::{PostAttentionArgs, has_post_attention, post_attention};

        let (Device::Cuda(device), Some(half)) = (residual.device(), half_of(residual)) else {
            return Ok(None);
        };
        let PostAttentionWeights { output, norm, gate_up, down, next_norm, next, eps } =
            &self.weights;
        let inputs = [attention, residual, output, norm, gate_up, down, next_norm, next];
        let ((hidden, attention_size), inner) = (output.dims2()?, down.dim(1)?);
        let next_size = next.dim(0)?;
        let tokens = residual.dim(0)?;
        let of_sizes = PostAttentionArgs {
            attention_size,
            hidden,
            inner,
            next_size,
            rows: tokens,
            eps: *eps,
            prefetch: true,
            ..Default::default()
        };
        let stream = device.cuda_stream();
        let fits = |of: &&Tensor| fits_kernel(of, half, residual.device());
        if !inputs.iter().all(fits) || !has_post_attention(stream.context(), &of_sizes)? {
            return Ok(None);
        }
        // SAFETY: the kernels write every element before it is read.
        let new = |shape| unsafe { empty(shape, residual.dtype(), residual.device()) };
        let workspace = new((1, of_sizes.workspace()))?;
        let (sum, y) = (new((tokens, hidden))?, new((tokens, next_size))?);
        let args = PostAttentionArgs {
            attention: address(attention)?,
            residual: address(residual)?,
            output: address(output)?,
            norm: address(norm)?,
            gate_up: address(gate_up)?,
            down: address(down)?,
            next_norm: address(next_norm)?,
            next: address(next)?,
            workspace: address(&workspace)?,
            sum: address(&sum)?,
            y: address(&y)?,
            ..of_sizes
        };
        // SAFETY: the tensors have the sizes in `args`, the weights have been written before `new`
        // returned, and the stream frees no memory before these launches have used it.
        unsafe { post_attention(&stream, half, &args) }?;
        Ok(Some((sum, y)))
    }
}

/// Checks the shape of a tensor.
fn check(what: &str, x: &Tensor, expected: &[usize]) -> Result<()> {
    if x.dims() != expected {
        return Err(Error::mismatch(what, format!("{expected:?}"), format!("{:?}", x.dims())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    fn ones(dims: &[usize]) -> Tensor {
        Tensor::ones(dims, DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn other_shapes_are_refused_by_name() {
        let good = PostAttentionWeights {
            output: ones(&[8, 16]),
            norm: ones(&[8]),
            gate_up: ones(&[6, 8]),
            down: ones(&[8, 3]),
            next_norm: ones(&[8]),
            next: ones(&[5, 8]),
            eps: 1e-5,
        };
        let message = |change: fn(&mut PostAttentionWeights)| {
            let mut weights = good.clone();
            change(&mut weights);
            PostAttention::new(weights).unwrap_err().to_string()
        };
        assert!(message(|of| of.norm = ones(&[7])).starts_with("norm: expected [8]"));
        assert!(message(|of| of.next_norm = ones(&[7])).starts_with("next_norm"));
        assert!(message(|of| of.gate_up = ones(&[5, 8])).starts_with("gate_up: expected [6, 8]"));
        assert!(message(|of| of.down = ones(&[7, 3])).starts_with("down: expected [8, 3]"));
        assert!(message(|of| of.next = ones(&[8, 3])).starts_with("next: expected [8, 8]"));
        let layer = PostAttention::new(good.clone()).unwrap();
        let (attention, residual) = (ones(&[2, 16]), ones(&[2, 8]));
        assert!(layer.forward(&attention, &residual).is_ok());
        let message =
            |attention, residual| layer.forward(attention, residual).unwrap_err().to_string();
        assert!(message(&residual, &residual).starts_with("attention: expected [2, 16]"));
        assert!(message(&attention, &ones(&[1, 8])).starts_with("residual: expected [2, 8]"));
    }
}
