//! A model on a CUDA device.

use std::ops::Range;

use super::attention::Attention;
use super::device_context::DeviceContext;
use super::linear::Linear;
use super::norm::Norm;
use super::{Carried, Input, Mixer};
use crate::attention::next_cache;
use crate::host_model::HostModel;
use crate::mixer;
use candle_core::{CudaDevice, DType, Device, Tensor};
use longctx_core::{Batch, KvCache, Logits, Result};

/// Rows processed by a recurrent mixer at a time. It bounds the memory of activations.
const BLOCK: usize = 4096;

#[derive(Debug)]
pub struct OnDevice {
    device: Device,
    embedding: Tensor,
    embedding_scale: f64,
    /// Its output is f32.
    embedding_norm: Option<Norm>,
    residuals: Vec<ResidualBlock>,
    norm: Norm,
    head: Linear,
    soft_cap: Option<f64>,
}

/// A residual layer `x + mixer(norm(x))`.
#[derive(Debug)]
struct ResidualBlock {
    norm: Norm,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A recurrent mixer and the number of arrays of its state.
    Recurrent(Box<dyn Mixer>, usize),
    Attention(Attention),
}

/// A call: sequences that are processed together.
pub struct Call<'a> {
    /// Equally many tokens for each sequence.
    pub batch: &'a Batch,
    /// Token ids, `[tokens]`, u32.
    pub ids: &'a Tensor,
    pub logits: Logits,
    /// Whether the tokens are the first ones of the sequences.
    pub first: bool,
    /// One tensor `[sequences, …]` for each array of all blocks, updated in place.
    pub states: &'a mut [Tensor],
    /// The caches of the attention layers.
    pub caches: &'a mut [Box<dyn KvCache>],
    /// Numbers of the call's tokens after which the states are copied, in increasing order, with
    /// the copies.
    pub snapshots: Vec<(usize, Vec<Tensor>)>,
}

impl Call<'_> {
    fn sequences(&self) -> usize {
        self.batch.seqs().len()
    }
}

impl OnDevice {
    /// Copies a model's weights to the device, one block at a time, without changing their dtype.
    pub fn new(host: HostModel, device: &CudaDevice) -> Result<Self> {
        let to = DeviceContext::new(device, host.embedding.dtype())?;
        let embedding = Linear::of(&host.embedding, &to)?;
        let head = host.head.as_ref().map(|head| Linear::of(head, &to)).transpose()?;
        let embedding_norm = host.embedding_norm.map(|norm| Norm::new(&norm, true, &to));
        let residual = |residual: mixer::ResidualBlock| -> Result<ResidualBlock> {
            let kind = match &residual.mixer {
                mixer::Mixer::Recurrent(mixer) => {
                    Kind::Recurrent(mixer.on_device(&to)?, mixer.state().len())
                }
                mixer::Mixer::Attention(mixer) => Kind::Attention(Attention::new(mixer, &to)?),
            };
            let wide = matches!(&kind, Kind::Recurrent(mixer, _) if mixer.reads_f32());
            Ok(ResidualBlock { norm: Norm::new(&residual.norm, wide, &to)?, kind })
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

    /// Returns whether the weights are f16 or bf16.
    pub fn is_half(&self) -> bool {
        matches!(self.embedding.dtype(), DType::F16 | DType::BF16)
    }

    /// Returns the logits of a call, row by row, in f32.
    pub fn forward(&self, call: &mut Call<'_>) -> Result<Tensor> {
        let batch = call.sequences();
        let count = call.ids.elem_count() / batch;
        let wanted = match call.logits {
            Logits::Last => 1,
            Logits::All => count,
        };
        let ids = call.ids.reshape((batch, count))?;
        // Attention layers receive the whole prompt in one call, so that a cache may compress it
        // after exact attention.
        let block = if call.caches.is_empty() { block(batch) } else { count };
        let mut logits = Vec::new();
        for start in (0..count).step_by(block) {
            let tokens = block.min(count - start);
            let x = self.embed(&ids.narrow(1, start, tokens)?)?;
            let added = self.run(&x, start..start + tokens, call)?;
            let first = start.max(count - wanted);
            if first < start + tokens {
                let (first, wanted) = (first - start, start + tokens - first);
                let top = |x: &Tensor| part(x, batch, first, wanted);
                let added = added.as_ref().map(top).transpose()?;
                let rows = self.logits(&top(&x)?, added.as_ref())?;
                logits.push(rows.reshape((batch, wanted, ()))?);
            }
        }
        Ok(Tensor::cat(&logits, 1)?.flatten(0, 1)?)
    }

    /// Maps ids `[batch, tokens]` to a new f32 tensor `[batch * tokens, hidden]`.
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

    /// Runs f32 `[batch * tokens, hidden]`, a range of each sequence's tokens, through all layers.
    /// Each layer adds to it in place, except the last, whose output is returned.
    fn run(&self, x: &Tensor, tokens: Range<usize>, call: &mut Call<'_>) -> Result<Option<Tensor>> {
        let (batch, first) = (call.sequences(), call.first);
        let mut carried = Carried::default();
        let mut added = None;
        let mut caches = call.caches.iter_mut();
        let mut arrays = 0..0;
        let cuts: Vec<usize> = call.snapshots.iter().map(|(at, _)| *at).collect();
        for residual in &self.residuals {
            let normed = residual.norm.apply(x, added.as_ref())?;
            added = Some(match &residual.kind {
                Kind::Recurrent(mixer, count) => {
                    arrays = arrays.end..arrays.end + count;
                    let state = &mut call.states[arrays.clone()];
                    in_blocks(&normed, batch, tokens.clone(), &cuts, |x, tokens| {
                        let first = first && tokens.start == 0;
                        let x = Input { x, batch, tokens: tokens.len(), first };
                        carried.block = tokens.start;
                        let y = mixer.forward(x, state, &mut carried)?;
                        if let Some((_, copy)) =
                            call.snapshots.iter_mut().find(|(at, _)| *at == tokens.end)
                        {
                            for array in state.iter() {
                                copy.push(array.copy()?);
                            }
                        }
                        Ok(y)
                    })?
                }
                Kind::Attention(attention) => {
                    attention.forward(&normed, call.batch, next_cache(&mut caches)?)?
                }
            });
        }
        Ok(added)
    }

    /// Returns the logits of rows, after adding `added` to them.
    fn logits(&self, x: &Tensor, added: Option<&Tensor>) -> Result<Tensor> {
        let logits = self.head.apply(&self.norm.apply(x, added)?)?.to_dtype(DType::F32)?;
        Ok(match self.soft_cap {
            Some(cap) => ((logits / cap)?.tanh()? * cap)?,
            None => logits,
        })
    }
}

/// Returns the number of tokens per block.
fn block(batch: usize) -> usize {
    (BLOCK / batch).max(1)
}

/// Calls `run` with blocks of `[batch * tokens, width]`, a range of each sequence's tokens, and
/// concatenates the results. Blocks also end at the positions in `cuts`.
fn in_blocks(
    x: &Tensor,
    batch: usize,
    tokens: Range<usize>,
    cuts: &[usize],
    mut run: impl FnMut(&Tensor, Range<usize>) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut parts = Vec::new();
    let mut start = tokens.start;
    while start < tokens.end {
        let cut = cuts.iter().copied().find(|&cut| cut > start).unwrap_or(tokens.end);
        let end = tokens.end.min(start + block(batch)).min(cut);
        if start == tokens.start && end == tokens.end {
            return run(x, tokens);
        }
        let y = run(&part(x, batch, start - tokens.start, end - start)?, start..end)?;
        parts.push(y.reshape((batch, end - start, ()))?);
        start = end;
    }
    Ok(Tensor::cat(&parts, 1)?.reshape((batch * tokens.len(), ()))?)
}

/// Returns the tokens `start..start + count` of each sequence of `[batch * tokens, width]`.
fn part(x: &Tensor, batch: usize, start: usize, count: usize) -> Result<Tensor> {
    let by_entry = x.reshape((batch, x.dim(0)? / batch, ()))?;
    Ok(by_entry.narrow(1, start, count)?.contiguous()?.reshape((batch * count, ()))?)
}
