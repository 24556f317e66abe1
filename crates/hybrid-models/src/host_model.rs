//! A model on the host.

use std::ops::Range;

use crate::attention::next_cache;
use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Mixer, ResidualBlock, Span};
use crate::model_spec::{Block, BlockState, ModelSpec};
use crate::norm::Norm;
use crate::workspace::Workspace;
use longctx_core::{Batch, KvCache, LayerSpec, Logits, Result};

/// Tokens processed by a recurrent mixer at a time. It bounds the memory of activations.
const BLOCK: usize = 512;

/// Weights in the host's memory.
#[derive(Debug)]
pub struct HostModel {
    pub family: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub embedding: Matrix,
    /// The factor of embeddings.
    pub embedding_scale: f32,
    /// RWKV's norm of embeddings.
    pub embedding_norm: Option<Norm>,
    pub residuals: Vec<ResidualBlock>,
    pub norm: Norm,
    /// The output head; `None` if it is the embedding matrix (tied weights).
    pub head: Option<Matrix>,
    /// Soft cap: a logit l becomes `cap * tanh(l / cap)`.
    pub soft_cap: Option<f32>,
    /// End-of-text tokens.
    pub eos: Vec<u32>,
}

impl HostModel {
    pub fn spec(&self) -> ModelSpec {
        let block = |residual: &ResidualBlock| Block {
            name: format!("layers.{}.{}", residual.layer, residual.name),
            state: match &residual.mixer {
                Mixer::Recurrent(mixer) => BlockState::Recurrent(mixer.state()),
                Mixer::Attention(attention) => {
                    let spec = LayerSpec::new(attention.shape).with_rope(attention.rope.clone());
                    BlockState::Cache(spec.at(residual.layer, self.layers))
                }
            },
        };
        ModelSpec {
            family: self.family,
            hidden: self.hidden,
            layers: self.layers,
            vocab: self.embedding.out(),
            eos: self.eos.clone(),
            blocks: self.residuals.iter().map(block).collect(),
        }
    }

    /// Returns the logits of a batch, row by row, and updates the states of its sequences.
    pub fn forward(
        &self,
        batch: &Batch,
        ids: &[u32],
        logits: Logits,
        calls: &mut [SequenceCall],
        caches: &mut [Box<dyn KvCache>],
        workspace: &mut Workspace,
    ) -> Result<Vec<f32>> {
        let hidden = self.hidden;
        let mut selected = Vec::new();
        let chunks = chunks(calls);
        // Without attention, the memory is that of one chunk. Attention layers receive whole
        // prompts in one call, so that a cache may compress them after exact attention.
        let at_a_time = if caches.is_empty() { 1 } else { chunks.len() };
        for chunks in chunks.chunks(at_a_time) {
            let rows = chunks[0].rows.start..chunks[chunks.len() - 1].rows.end;
            let mut x = workspace.acquire(rows.len() * hidden);
            self.embed(&ids[rows.clone()], &mut x);
            self.run(&mut x, chunks, batch, calls, caches, workspace)?;
            match logits {
                Logits::All => selected.extend_from_slice(&x),
                Logits::Last => {
                    let last = calls.iter().map(|call| call.rows.end - 1);
                    for row in last.filter(|row| rows.contains(row)) {
                        selected.extend_from_slice(&x[(row - rows.start) * hidden..][..hidden]);
                    }
                }
            }
            workspace.release(x);
        }
        Ok(self.logits(&mut selected))
    }

    /// Embeds ids, one row each.
    fn embed(&self, ids: &[u32], x: &mut [f32]) {
        for (&id, row) in ids.iter().zip(x.chunks_exact_mut(self.hidden)) {
            self.embedding.row(id as usize, row);
            if self.embedding_scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= self.embedding_scale);
            }
        }
        if let Some(norm) = &self.embedding_norm {
            norm.apply_in_place(x);
        }
    }

    /// Runs the rows of some chunks, `x` `[tokens, hidden]`, through all layers.
    fn run(
        &self,
        x: &mut [f32],
        chunks: &[RowChunk],
        batch: &Batch,
        calls: &mut [SequenceCall],
        caches: &mut [Box<dyn KvCache>],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let mut caches = caches.iter_mut();
        let mut arrays = 0..0;
        for residual in &self.residuals {
            match &residual.mixer {
                Mixer::Recurrent(mixer) => {
                    arrays = arrays.end..arrays.end + mixer.state_size();
                    for chunk in chunks {
                        let first = chunk.rows.start - chunks[0].rows.start;
                        let x = &mut x[first * self.hidden..][..chunk.rows.len() * self.hidden];
                        let calls = &mut calls[chunk.sequences()];
                        self.residual(residual, x, workspace, |normed, workspace, out| {
                            let x = Input { x: normed, spans: &chunk.spans };
                            let states = calls.iter_mut();
                            let mut states: Vec<_> =
                                states.map(|call| &mut call.state[arrays.clone()]).collect();
                            mixer.forward(x, &mut states, workspace, out);
                            Ok(())
                        })?;
                        for (call, span) in calls.iter_mut().zip(&chunk.spans) {
                            call.take_snapshot(span.position + span.tokens, arrays.clone());
                        }
                    }
                }
                Mixer::Attention(attention) => {
                    let cache = next_cache(&mut caches)?;
                    self.residual(residual, x, workspace, |normed, _, out| {
                        attention.forward(normed, batch, cache, out)
                    })?;
                }
            }
        }
        Ok(())
    }

    fn residual(
        &self,
        residual: &ResidualBlock,
        x: &mut [f32],
        workspace: &mut Workspace,
        mix: impl FnOnce(&[f32], &mut Workspace, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let mut normed = workspace.acquire(x.len());
        let mut out = workspace.acquire(x.len());
        residual.norm.apply(x, &mut normed);
        let result = mix(&normed, workspace, &mut out);
        crate::simd::zip(crate::simd::Add, x, &out);
        workspace.release(out);
        workspace.release(normed);
        result
    }

    /// Returns the logits of rows after all layers.
    fn logits(&self, x: &mut [f32]) -> Vec<f32> {
        self.norm.apply_in_place(x);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let mut logits = vec![0.0; x.len() / self.hidden * head.out()];
        head.apply(Rows::new(x, self.hidden), &mut logits);
        if let Some(cap) = self.soft_cap {
            crate::simd::map(crate::simd::SoftCap(cap), &mut logits);
        }
        logits
    }
}

/// One sequence of a batch during a call.
pub struct SequenceCall {
    /// Number of its earlier tokens.
    pub position: usize,
    /// Its rows in the batch.
    pub rows: Range<usize>,
    pub state: Vec<f32>,
    /// Numbers of tokens after which the state is copied, in increasing order, with the copies.
    pub snapshots: Vec<(usize, Vec<f32>)>,
}

impl SequenceCall {
    /// Copies a range of the state if a snapshot is due at this position.
    fn take_snapshot(&mut self, position: usize, numbers: Range<usize>) {
        if let Some((_, copy)) = self.snapshots.iter_mut().find(|(at, _)| *at == position) {
            copy.resize(self.state.len(), 0.0);
            copy[numbers.clone()].copy_from_slice(&self.state[numbers]);
        }
    }
}

/// Rows that a recurrent mixer processes together: at most one span of each sequence.
struct RowChunk {
    /// Rows of the batch.
    rows: Range<usize>,
    spans: Vec<Span>,
    /// Batch index of the first span's sequence.
    first: usize,
}

impl RowChunk {
    /// Returns the batch indices of the sequences.
    fn sequences(&self) -> Range<usize> {
        self.first..self.first + self.spans.len()
    }
}

/// Splits a batch into chunks of up to [`BLOCK`] rows, and after each token with a snapshot.
fn chunks(calls: &[SequenceCall]) -> Vec<RowChunk> {
    let mut chunks: Vec<RowChunk> = Vec::new();
    for (i, call) in calls.iter().enumerate() {
        let mut start = call.rows.start;
        while start < call.rows.end {
            let position = call.position + start - call.rows.start;
            let open = chunks.last_mut();
            let open = open.filter(|p| p.sequences().end == i && p.rows.len() < BLOCK);
            let chunk = match open {
                Some(chunk) => chunk,
                None => {
                    chunks.push(RowChunk { rows: start..start, spans: Vec::new(), first: i });
                    let last = chunks.len() - 1;
                    &mut chunks[last]
                }
            };
            let snapshot = call.snapshots.iter().find(|(at, _)| *at > position);
            let tokens = (call.rows.end - start)
                .min(BLOCK - chunk.rows.len())
                .min(snapshot.map_or(usize::MAX, |(at, _)| at - position));
            chunk.spans.push(Span { row: chunk.rows.len(), tokens, position });
            start += tokens;
            chunk.rows.end = start;
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(position: usize, rows: Range<usize>, snapshots: &[usize]) -> SequenceCall {
        let snapshots = snapshots.iter().map(|&at| (at, Vec::new())).collect();
        SequenceCall { position, rows, state: Vec::new(), snapshots }
    }

    #[test]
    fn chunks_are_full_hold_a_sequence_once_and_end_at_snapshots() {
        let calls = [
            call(7, 0..1, &[]),
            call(0, 1..801, &[]),
            call(90, 801..830, &[100]),
            call(0, 830..831, &[]),
        ];
        let cut: Vec<_> = chunks(&calls)
            .iter()
            .map(|p| (p.rows.clone(), p.first, p.spans.iter().map(|s| s.tokens).collect()))
            .collect();
        let expected: [(_, _, Vec<usize>); 3] =
            [(0..512, 0, vec![1, 511]), (512..811, 1, vec![289, 10]), (811..831, 2, vec![19, 1])];
        assert_eq!(cut, expected);
    }
}
