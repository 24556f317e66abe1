//! A model that computes on a CUDA device.

use super::attention::Attention;
use super::target::{Linear, Norm, Target};
use super::{Carried, Input, Mixer};
use crate::host::Host;
use crate::memory::Memory;
use crate::mixer;
use candle_core::{CudaDevice, DType, Device, Tensor};
use longctx_core::Result;

/// Rows that go through a recurrent mixer at a time: activations inside a layer never exist for more.
const BLOCK: usize = 4096;

#[derive(Debug)]
pub struct OnDevice {
    device: Device,
    dtype: DType,
    embedding: Tensor,
    embedding_scale: f64,
    embedding_norm: Option<Norm>,
    residuals: Vec<Residual>,
    norm: Norm,
    head: Linear,
    soft_cap: Option<f64>,
}

/// `x + mixer(norm(x))`.
#[derive(Debug)]
struct Residual {
    norm: Norm,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Recurrent(Box<dyn Mixer>),
    Attention(Attention),
}

impl OnDevice {
    /// Copies a model's weights to the device, one block at a time, in the format that they have.
    pub fn new(host: Host, device: &CudaDevice) -> Result<Self> {
        let to = Target::new(device, host.embedding.dtype())?;
        let embedding = to.matrix(&host.embedding)?;
        let head = host.head.as_ref().map(|head| to.matrix(head)).transpose()?;
        let residual = |residual: mixer::Residual| -> Result<Residual> {
            let kind = match &residual.mixer {
                mixer::Mixer::Recurrent(mixer) => Kind::Recurrent(mixer.on_device(&to)?),
                mixer::Mixer::Attention(mixer) => Kind::Attention(Attention::new(mixer, &to)?),
            };
            Ok(Residual { norm: to.norm(&residual.norm)?, kind })
        };
        Ok(Self {
            device: to.device.clone(),
            dtype: to.dtype,
            embedding: embedding.rows()?,
            embedding_scale: host.embedding_scale.into(),
            embedding_norm: host.embedding_norm.map(|norm| to.norm(&norm)).transpose()?,
            residuals: host.residuals.into_iter().map(residual).collect::<Result<_>>()?,
            norm: to.norm(&host.norm)?,
            head: head.unwrap_or(embedding),
            soft_cap: host.soft_cap.map(f64::from),
        })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The logits `[batch, wanted, vocab]` of the last `wanted` of each entry's tokens, in f32; `seen` came before `ids` `[batch, tokens]`.
    pub fn forward(
        &self,
        ids: &[u32],
        batch: usize,
        wanted: usize,
        seen: usize,
        memories: &mut [Memory],
    ) -> Result<Tensor> {
        let count = ids.len() / batch;
        let ids = Tensor::from_slice(ids, (batch, count), &self.device)?;
        let attention = self.residuals.iter().any(|r| matches!(r.kind, Kind::Attention(_)));
        // Attention layers take the whole prompt in one call, so that a cache may compress it after exact attention.
        let block = if attention { count } else { block(batch) };
        let mut top = Vec::new();
        for start in (0..count).step_by(block) {
            let tokens = block.min(count - start);
            let x = self.embed(&ids.narrow(1, start, tokens)?)?;
            let x = self.run(x, batch, seen + start, memories)?;
            let first = start.max(count - wanted);
            if first < start + tokens {
                top.push(x.narrow(1, first - start, start + tokens - first)?);
            }
        }
        self.logits(&Tensor::cat(&top, 1)?)
    }

    /// `[batch, tokens]` to `[batch, tokens, hidden]` in f32.
    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let (batch, tokens) = ids.dims2()?;
        let rows = self.embedding.index_select(&ids.flatten_all()?, 0)?.to_dtype(DType::F32)?;
        let rows = match self.embedding_scale {
            1.0 => rows,
            scale => (rows * scale)?,
        };
        let rows = match &self.embedding_norm {
            Some(norm) => norm.apply(&rows)?,
            None => rows,
        };
        Ok(rows.reshape((batch, tokens, ()))?)
    }

    /// Sends `[batch, tokens, hidden]` through all layers.
    fn run(
        &self,
        mut x: Tensor,
        batch: usize,
        seen: usize,
        memories: &mut [Memory],
    ) -> Result<Tensor> {
        let (tokens, block) = (x.dim(1)?, block(batch));
        let mut carried = Carried::default();
        for (residual, memory) in self.residuals.iter().zip(memories) {
            x = match (&residual.kind, memory) {
                (Kind::Recurrent(mixer), Memory::OnDevice(state)) => {
                    let mut parts = Vec::new();
                    for start in (0..tokens).step_by(block) {
                        let part = x.narrow(1, start, block.min(tokens - start))?;
                        let mix = |x: Input<'_>| mixer.forward(x, state, &mut carried);
                        parts.push(residual.add(&part, seen + start, mix)?);
                    }
                    if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 1)? }
                }
                (Kind::Attention(attention), Memory::Cache(cache)) => {
                    residual.add(&x, seen, |x| attention.forward(x, cache.as_mut()))?
                }
                _ => unreachable!("memories are made from the mixers"),
            };
        }
        Ok(x)
    }

    fn logits(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, wanted, hidden) = x.dims3()?;
        let rows = self.norm.apply(&x.contiguous()?.reshape((batch * wanted, hidden))?)?;
        let logits = self.head.apply(&rows.to_dtype(self.dtype)?)?.to_dtype(DType::F32)?;
        let logits = match self.soft_cap {
            Some(cap) => ((logits / cap)?.tanh()? * cap)?,
            None => logits,
        };
        Ok(logits.reshape((batch, wanted, ()))?)
    }
}

/// Tokens of a block.
fn block(batch: usize) -> usize {
    (BLOCK / batch).max(1)
}

impl Residual {
    /// `x + mix(norm(x))` for `[batch, tokens, hidden]`.
    fn add(
        &self,
        x: &Tensor,
        start: usize,
        mix: impl FnOnce(Input<'_>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (batch, tokens, hidden) = x.dims3()?;
        let rows = x.contiguous()?.reshape((batch * tokens, hidden))?;
        let normed = self.norm.apply(&rows)?;
        let mixed = mix(Input { x: &normed, batch, tokens, start })?;
        Ok((rows + mixed.to_dtype(DType::F32)?)?.reshape((batch, tokens, hidden))?)
    }
}
