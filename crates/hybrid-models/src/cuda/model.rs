//! A model that computes on a CUDA device.

use super::attention::Attention;
use super::linear::Linear;
use super::norm::Norm;
use super::target::Target;
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
    embedding: Tensor,
    embedding_scale: f64,
    /// Its output is f32.
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
        let embedding = Linear::of(&host.embedding, &to)?;
        let head = host.head.as_ref().map(|head| Linear::of(head, &to)).transpose()?;
        let embedding_norm = host.embedding_norm.map(|norm| Norm::new(&norm, true, &to));
        let residual = |residual: mixer::Residual| -> Result<Residual> {
            let kind = match &residual.mixer {
                mixer::Mixer::Recurrent(mixer) => Kind::Recurrent(mixer.on_device(&to)?),
                mixer::Mixer::Attention(mixer) => Kind::Attention(Attention::new(mixer, &to)?),
            };
            let wide = matches!(&kind, Kind::Recurrent(mixer) if mixer.reads_f32());
            Ok(Residual { norm: Norm::new(&residual.norm, wide, &to)?, kind })
        };
        Ok(Self {
            device: to.device.clone(),
            embedding: embedding.weight.clone(),
            embedding_scale: host.embedding_scale.into(),
            embedding_norm: embedding_norm.transpose()?,
            residuals: host.residuals.into_iter().map(residual).collect::<Result<_>>()?,
            norm: Norm::new(&host.norm, false, &to)?,
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
        let mut logits = Vec::new();
        for start in (0..count).step_by(block) {
            let tokens = block.min(count - start);
            let x = self.embed(&ids.narrow(1, start, tokens)?)?;
            let added = self.run(&x, (batch, tokens), seen + start, memories)?;
            let first = start.max(count - wanted);
            if first < start + tokens {
                let (first, wanted) = (first - start, start + tokens - first);
                let top = |x: &Tensor| part(x, batch, first, wanted);
                let added = added.as_ref().map(top).transpose()?;
                let rows = self.logits(&top(&x)?, added.as_ref())?;
                logits.push(rows.reshape((batch, wanted, ()))?);
            }
        }
        Ok(Tensor::cat(&logits, 1)?)
    }

    /// `[batch, tokens]` to f32 `[batch * tokens, hidden]`, which nobody else has.
    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let rows = self.embedding.index_select(&ids.flatten_all()?, 0)?.to_dtype(DType::F32)?;
        let rows = match self.embedding_scale {
            1.0 => rows,
            scale => (rows * scale)?,
        };
        match &self.embedding_norm {
            Some(norm) => norm.apply(&rows, None),
            None => Ok(rows),
        }
    }

    /// Sends f32 `[batch * tokens, hidden]` through all layers, each of which adds to it in its place, but the last: gives what that one adds.
    fn run(
        &self,
        x: &Tensor,
        (batch, tokens): (usize, usize),
        seen: usize,
        memories: &mut [Memory],
    ) -> Result<Option<Tensor>> {
        let mut carried = Carried::default();
        let mut added = None;
        for (residual, memory) in self.residuals.iter().zip(memories) {
            let normed = residual.norm.apply(x, added.as_ref())?;
            added = Some(match (&residual.kind, memory) {
                (Kind::Recurrent(mixer), Memory::OnDevice(state)) => {
                    in_blocks(&normed, (batch, tokens), |x, tokens, start| {
                        let x = Input { x, batch, tokens, start: seen + start };
                        mixer.forward(x, state, &mut carried)
                    })?
                }
                (Kind::Attention(attention), Memory::Cache(cache)) => {
                    let x = Input { x: &normed, batch, tokens, start: seen };
                    attention.forward(x, cache.as_mut())?
                }
                _ => unreachable!("memories are made from the mixers"),
            });
        }
        Ok(added)
    }

    /// The logits of rows, to which something is added before.
    fn logits(&self, x: &Tensor, added: Option<&Tensor>) -> Result<Tensor> {
        let logits = self.head.apply(&self.norm.apply(x, added)?)?.to_dtype(DType::F32)?;
        Ok(match self.soft_cap {
            Some(cap) => ((logits / cap)?.tanh()? * cap)?,
            None => logits,
        })
    }
}

/// Tokens of a block.
fn block(batch: usize) -> usize {
    (BLOCK / batch).max(1)
}

/// Hands `[batch * tokens, width]` on in blocks, each with its number of tokens and of those before it, and joins what comes back.
fn in_blocks(
    x: &Tensor,
    (batch, tokens): (usize, usize),
    mut run: impl FnMut(&Tensor, usize, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let block = block(batch);
    if tokens <= block {
        return run(x, tokens, 0);
    }
    let mut parts = Vec::new();
    for start in (0..tokens).step_by(block) {
        let count = block.min(tokens - start);
        let y = run(&part(x, batch, start, count)?, count, start)?;
        parts.push(y.reshape((batch, count, ()))?);
    }
    Ok(Tensor::cat(&parts, 1)?.reshape((batch * tokens, ()))?)
}

/// Tokens `start..start + count` of each entry of `[batch * tokens, width]`.
fn part(x: &Tensor, batch: usize, start: usize, count: usize) -> Result<Tensor> {
    let by_entry = x.reshape((batch, x.dim(0)? / batch, ()))?;
    Ok(by_entry.narrow(1, start, count)?.contiguous()?.reshape((batch * count, ()))?)
}
