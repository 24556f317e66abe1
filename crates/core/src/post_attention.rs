//! The part of a decoder between the attention of one layer and that of the next.

use crate::{Error, Result, add_rms_norm, linear, silu_mul};
use candle_core::Tensor;

/// The weights between the attentions of two layers: an output projection, a norm, a gated
/// feed-forward block with SiLU, and the norm and the projection of the next layer.
///
/// A decode step reads all weights for a few tokens. On CUDA (f16 or bf16, up to four tokens,
/// compute capability 9.0) a single launch computes all of it, and reads the weights of a product
/// before the previous product has ended. Elsewhere [`forward`](Self::forward) calls [`linear`],
/// [`add_rms_norm`] and [`silu_mul`]. The results are equal, bit for bit.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::PostAttention;
///
/// let ones = |rows, columns| Tensor::ones((rows, columns), DType::F32, &Device::Cpu);
/// let norm = Tensor::ones(8, DType::F32, &Device::Cpu)?;
/// let weights = PostAttention {
///     output: &ones(8, 16)?,
///     norm: &norm,
///     gate_up: &ones(2 * 24, 8)?,
///     down: &ones(8, 24)?,
///     next_norm: &norm,
///     next: &ones(10, 8)?,
///     eps: 1e-5,
/// };
/// let (attention, residual) = (ones(1, 16)?, ones(1, 8)?);
/// let (sum, y) = weights.forward(&attention, &residual)?;
/// assert_eq!((sum.dims(), y.dims()), (&[1, 8][..], &[1, 10][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct PostAttention<'a> {
    /// The output projection, `[hidden, attention size]`.
    pub output: &'a Tensor,
    /// The weights of the feed-forward block's norm, `[hidden]`.
    pub norm: &'a Tensor,
    /// The gate projection, followed by the up projection, `[2 inner, hidden]`.
    pub gate_up: &'a Tensor,
    /// The down projection, `[hidden, inner]`.
    pub down: &'a Tensor,
    /// The weights of the next norm, `[hidden]`.
    pub next_norm: &'a Tensor,
    /// The projection after it, `[out, hidden]`: queries, keys and values, or the output head.
    pub next: &'a Tensor,
    /// Added to the mean squares of both norms.
    pub eps: f32,
}

impl PostAttention<'_> {
    /// Batches with more tokens use separate products, because a single launch would not be faster.
    pub const MAX_TOKENS: usize = 4;

    /// Returns the residual stream after the feed-forward block, `[tokens, hidden]`, and the next
    /// projection of its norm, `[tokens, out]`. `attention`: `[tokens, attention size]`; `residual`:
    /// the residual stream before attention, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the shapes do not match; an error of candle or of the CUDA driver.
    pub fn forward(&self, attention: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check(attention, residual)?;
        #[cfg(feature = "cuda")]
        if let Some(both) = self.on_cuda(attention, residual)? {
            return Ok(both);
        }
        let y = linear(attention, self.output)?;
        let (middle, normed) = add_rms_norm(residual, Some(&y), self.norm, self.eps)?;
        let both = linear(&normed, self.gate_up)?;
        let inner = self.down.dim(1)?;
        let (gate, up) = (both.narrow(1, 0, inner)?, both.narrow(1, inner, inner)?);
        let y = linear(&silu_mul(&gate, &up)?, self.down)?;
        let (sum, normed) = add_rms_norm(&middle, Some(&y), self.next_norm, self.eps)?;
        Ok((sum, linear(&normed, self.next)?))
    }

    fn check(&self, attention: &Tensor, residual: &Tensor) -> Result<()> {
        let ((hidden, size), (_, inner)) = (self.output.dims2()?, self.down.dims2()?);
        let ((tokens, _), next) = (attention.dims2()?, self.next.dim(0)?);
        let shapes: [(_, _, &[usize]); 7] = [
            ("attention", attention, &[tokens, size]),
            ("residual", residual, &[tokens, hidden]),
            ("norm", self.norm, &[hidden]),
            ("gate_up", self.gate_up, &[2 * inner, hidden]),
            ("down", self.down, &[hidden, inner]),
            ("next_norm", self.next_norm, &[hidden]),
            ("next", self.next, &[next, hidden]),
        ];
        for (what, x, expected) in shapes {
            if x.dims() != expected {
                return Err(Error::mismatch(
                    what,
                    format!("{expected:?}"),
                    format!("{:?}", x.dims()),
                ));
            }
        }
        Ok(())
    }

    /// Returns `None` if the kernel does not support the device, the dtypes, the layouts or the
    /// sizes.
    #[cfg(feature = "cuda")]
    #[allow(unsafe_code)]
    fn on_cuda(&self, attention: &Tensor, residual: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        use crate::cuda::{address, fits_kernel, half_of};
        use candle_core::Device;
        use longctx_kernels::{PostAttentionArgs, has_post_attention, post_attention};

        let (Device::Cuda(device), Some(half)) = (residual.device(), half_of(residual)) else {
            return Ok(None);
        };
        let &Self { output, norm, gate_up, down, next_norm, next, eps } = self;
        let inputs = [attention, residual, output, norm, gate_up, down, next_norm, next];
        let ((hidden, attention_size), inner) = (output.dims2()?, down.dim(1)?);
        let next_size = next.dim(0)?;
        let tokens = residual.dim(0)?;
        let of_sizes = PostAttentionArgs {
            attention_size: attention_size as i32,
            hidden: hidden as i32,
            inner: inner as i32,
            next_size: next_size as i32,
            rows: tokens as i32,
            eps,
            ..Default::default()
        };
        let stream = device.cuda_stream();
        let fits = |of: &&Tensor| fits_kernel(of, half, residual.device());
        if !inputs.iter().all(fits) || !has_post_attention(stream.context(), &of_sizes)? {
            return Ok(None);
        }
        // SAFETY: the kernel writes every element before it is read.
        let empty = |n| unsafe { Tensor::empty((tokens, n), residual.dtype(), residual.device()) };
        let (middle, gated) = (empty(hidden)?, empty(inner)?);
        let (sum, y) = (empty(hidden)?, empty(next_size)?);
        let args = PostAttentionArgs {
            attention: address(attention)?,
            residual: address(residual)?,
            output: address(output)?,
            norm: address(norm)?,
            gate_up: address(gate_up)?,
            down: address(down)?,
            next_norm: address(next_norm)?,
            next: address(next)?,
            middle: address(&middle)?,
            gated: address(&gated)?,
            sum: address(&sum)?,
            y: address(&y)?,
            ..of_sizes
        };
        // SAFETY: the tensors have the sizes in `args`, and the stream frees no memory before this
        // launch has used it.
        unsafe { post_attention(&stream, half, &args) }?;
        Ok(Some((sum, y)))
    }
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
        let (norm, narrow) = (ones(&[8]), ones(&[7]));
        let (output, gate_up, down, next) =
            (ones(&[8, 16]), ones(&[6, 8]), ones(&[8, 3]), ones(&[5, 8]));
        let good = PostAttention {
            output: &output,
            norm: &norm,
            gate_up: &gate_up,
            down: &down,
            next_norm: &norm,
            next: &next,
            eps: 1e-5,
        };
        let (attention, residual) = (ones(&[2, 16]), ones(&[2, 8]));
        assert!(good.forward(&attention, &residual).is_ok());
        let message = |weights: PostAttention<'_>, attention: &Tensor, residual: &Tensor| {
            weights.forward(attention, residual).unwrap_err().to_string()
        };
        let of = |weights| message(weights, &attention, &residual);
        assert!(of(PostAttention { norm: &narrow, ..good }).starts_with("norm: expected [8]"));
        assert!(of(PostAttention { next_norm: &narrow, ..good }).starts_with("next_norm"));
        assert!(
            of(PostAttention { gate_up: &next, ..good }).starts_with("gate_up: expected [6, 8]")
        );
        let short = ones(&[7, 3]);
        assert!(of(PostAttention { down: &short, ..good }).starts_with("down: expected [8, 3]"));
        assert!(of(PostAttention { next: &down, ..good }).starts_with("next: expected [8, 8]"));
        assert!(message(good, &residual, &residual).starts_with("attention: expected [2, 16]"));
        assert!(message(good, &attention, &ones(&[1, 8])).starts_with("residual: expected [2, 8]"));
    }
}
