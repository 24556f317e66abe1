//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). The up-projections of keys and
//! values are absorbed into the queries and the outputs.
//!
//! A head's score is `q · (U c)`, where `c` is the latent and `U` the head's key up-projection. It
//! equals `(Uᵀ q) · c`, so the latent can serve as the key of all heads, and in the same way as
//! their value. The rotated channels of the key are before the latent.

use crate::config::{Config, Latent};
use crate::layer;
use crate::linear::{Linear, Weight};
use crate::weights::Weights;
use candle_core::{Device, Tensor};
use candle_nn::ops::rms_norm;
use longctx_core::{Batch, Error, KvCache, Result, Step};

/// The epsilon of the latents' RMS norms, which does not depend on the model's `rms_norm_eps`.
const EPS: f32 = 1e-6;

#[derive(Debug)]
pub(crate) struct LatentAttention {
    sizes: Latent,
    heads: usize,
    /// The down-projection of queries and its norm, if the model has one.
    query_down: Option<(Linear, Tensor)>,
    /// The projection to queries, `[heads, rotated + unrotated]`.
    query: Linear,
    /// The projection to the latent, followed by the rotated part of the keys.
    latent: Linear,
    latent_norm: Tensor,
    /// The up-projection of keys, which maps queries to the latent's channels, `[heads, unrotated,
    /// rank]`.
    keys: Tensor,
    /// The up-projection of values, which maps the latent's channels to values, `[heads, rank,
    /// value_dim]`.
    values: Tensor,
    /// Factors of the queries' channels, as in other attention layers, `[rotated + rank]`.
    query_scale: Option<Tensor>,
    out: Linear,
}

impl LatentAttention {
    pub fn load(c: &Config, sizes: Latent, layer: usize, w: &impl Weights) -> Result<Self> {
        let names = w.names();
        let name = |part: &str| format!("{}.{layer}.{part}", names.layers);
        let Latent { rank, rotated, unrotated, value_dim, .. } = sizes;
        let (hidden, heads) = (c.hidden_size, c.heads);
        let query_down = |channels| -> Result<_> {
            let down = w.linear(&name(names.query_down), channels, hidden, c.qkv_bias)?;
            Ok((down, layer::norm(c, w, &name(names.query_down_norm), channels)?))
        };
        let query = |part, inner| -> Result<Linear> {
            let matrix = dense(w, &name(part), heads * (unrotated + rotated), inner)?;
            let matrix = reorder(&matrix, &query_rows(heads, &sizes))?;
            Ok(Linear::new(Weight::Dense(matrix), None))
        };
        let latent = || -> Result<Linear> {
            let part = name(names.latent);
            let matrix = dense(w, &part, rank + rotated, hidden)?;
            let rows = latent_rows(&sizes);
            let bias = match c.qkv_bias {
                true => {
                    let bias = w.tensor(&format!("{part}.bias"), &[rank + rotated])?;
                    Some(reorder(&bias, &rows)?)
                }
                false => None,
            };
            Ok(Linear::new(Weight::Dense(reorder(&matrix, &rows)?), bias))
        };
        let up = dense(w, &name(names.latent_up), heads * (unrotated + value_dim), rank)?;
        let up = up.reshape((heads, unrotated + value_dim, rank))?;
        Ok(Self {
            sizes,
            heads,
            query: match sizes.query_rank {
                Some(channels) => query(names.query_up, channels)?,
                None => query(names.query, hidden)?,
            },
            query_down: sizes.query_rank.map(query_down).transpose()?,
            latent: latent()?,
            latent_norm: layer::norm(c, w, &name(names.latent_norm), rank)?,
            keys: up.narrow(1, 0, unrotated)?.contiguous()?,
            values: up.narrow(1, unrotated, value_dim)?.transpose(1, 2)?.contiguous()?,
            query_scale: layer::query_scale(c, layer, w)?,
            out: w.linear(&name(names.out), hidden, heads * value_dim, c.out_bias)?,
        })
    }

    /// `x`: `[tokens, hidden]`.
    pub fn forward(&self, x: &Tensor, cache: &mut dyn KvCache, batch: &Batch) -> Result<Tensor> {
        let Latent { rank, rotated, value_dim, .. } = self.sizes;
        let both = self.latent.forward(x)?;
        let latent = rms_norm(&both.narrow(1, 0, rank)?.contiguous()?, &self.latent_norm, EPS)?;
        let k = Tensor::cat(&[&both.narrow(1, rank, rotated)?, &latent], 1)?.unsqueeze(1)?;
        let (q, v) = (self.queries(x)?, latent.unsqueeze(1)?);
        let out = cache.attend(&Step { batch, q: &q, k: &k, v: &v })?;
        let out = by_head(&out, &self.values)?;
        self.out.forward(&out.reshape((batch.tokens(), self.heads * value_dim))?)
    }

    /// Returns queries for the rotated part and the latent, `[tokens, heads, rotated + rank]`.
    fn queries(&self, x: &Tensor) -> Result<Tensor> {
        let Latent { rotated, unrotated, .. } = self.sizes;
        let q = match &self.query_down {
            Some((down, norm)) => self.query.forward(&rms_norm(&down.forward(x)?, norm, EPS)?)?,
            None => self.query.forward(x)?,
        };
        let q = q.reshape((x.dim(0)?, self.heads, rotated + unrotated))?;
        let absorbed = by_head(&q.narrow(2, rotated, unrotated)?, &self.keys)?;
        let q = Tensor::cat(&[&q.narrow(2, 0, rotated)?, &absorbed], 2)?;
        Ok(match &self.query_scale {
            Some(scale) => q.broadcast_mul(scale)?,
            None => q,
        })
    }
}

/// Multiplies `[tokens, heads, in]` by a matrix `[in, out]` per head.
fn by_head(x: &Tensor, matrices: &Tensor) -> Result<Tensor> {
    Ok(x.transpose(0, 1)?.contiguous()?.matmul(matrices)?.transpose(0, 1)?.contiguous()?)
}

/// Loads a dense matrix. The rows of the matrices here are reordered or split, which is not
/// possible with quantized ones.
fn dense(w: &impl Weights, name: &str, out: usize, inner: usize) -> Result<Tensor> {
    match w.matrix(&format!("{name}.weight"), out, inner)? {
        Weight::Dense(matrix) => Ok(matrix),
        Weight::Quantized(_) => {
            let what = format!("the packed matrix {name:?} in latent attention");
            Err(Error::Unsupported(what))
        }
    }
}

fn reorder(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    Ok(x.index_select(&Tensor::new(rows, &Device::Cpu)?.to_device(x.device())?, 0)?)
}

/// Returns the order of the query projection's rows: of each head, the rotated ones first.
fn query_rows(heads: usize, sizes: &Latent) -> Vec<u32> {
    let (head, unrotated) = (sizes.unrotated + sizes.rotated, sizes.unrotated);
    let of_head = |h: usize| {
        let rotated = rotated_rows(sizes).map(move |row| h * head + unrotated + row);
        rotated.chain(h * head..h * head + unrotated)
    };
    (0..heads).flat_map(of_head).map(|row| row as u32).collect()
}

fn latent_rows(sizes: &Latent) -> Vec<u32> {
    let rank = sizes.rank;
    (0..rank).chain(rotated_rows(sizes).map(|row| rank + row)).map(|row| row as u32).collect()
}

/// Returns the checkpoint's rows of the rotated channels, in an order where channel `i` rotates
/// with channel `i + rotated / 2`.
fn rotated_rows(sizes: &Latent) -> impl Iterator<Item = usize> + use<> {
    let (half, interleaved) = (sizes.rotated / 2, sizes.interleaved);
    (0..sizes.rotated).map(move |i| if interleaved { 2 * (i % half) + i / half } else { i })
}
