//! A model that computes on the host.

use std::ops::Range;

use crate::matrix::{Matrix, Rows};
use crate::memory::Memory;
use crate::mixer::{Input, Mixer, Residual};
use crate::norm::Norm;
use crate::outline::{Block, Kept, Outline};
use crate::workspace::Workspace;
use longctx_core::Result;

/// Tokens that go through a recurrent mixer at a time: activations inside a layer never exist for more.
const BLOCK: usize = 512;

/// Weights in the host's memory.
#[derive(Debug)]
pub struct Host {
    pub family: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub embedding: Matrix,
    /// What embeddings are multiplied with.
    pub embedding_scale: f32,
    /// RWKV's norm of the embeddings.
    pub embedding_norm: Option<Norm>,
    pub residuals: Vec<Residual>,
    pub norm: Norm,
    /// `None` if the embedding's matrix is the output head.
    pub head: Option<Matrix>,
    /// Logits l become `cap * tanh(l / cap)`.
    pub soft_cap: Option<f32>,
    /// The tokens that end a text.
    pub eos: Vec<u32>,
}

impl Host {
    pub fn outline(&self) -> Outline {
        let block = |residual: &Residual| Block {
            layer: residual.layer,
            name: format!("layers.{}.{}", residual.layer, residual.name),
            kept: match &residual.mixer {
                Mixer::Recurrent(mixer) => Kept::State(mixer.state()),
                Mixer::Attention(attention) => Kept::Cache(attention.shape),
            },
        };
        Outline {
            family: self.family,
            hidden: self.hidden,
            layers: self.layers,
            vocab: self.embedding.out(),
            eos: self.eos.clone(),
            blocks: self.residuals.iter().map(block).collect(),
        }
    }

    /// The logits of the last `wanted` of each entry's tokens; `seen` came before `ids` `[batch, tokens]`.
    pub fn forward(
        &self,
        ids: &[u32],
        batch: usize,
        wanted: usize,
        seen: usize,
        memories: &mut [Memory],
        workspace: &mut Workspace,
    ) -> Result<Vec<f32>> {
        let (count, hidden) = (ids.len() / batch, self.hidden);
        let attention = self.residuals.iter().any(|r| matches!(r.mixer, Mixer::Attention(_)));
        let mut top = workspace.take(batch * wanted * hidden);
        for (entries, span) in spans(batch, count, attention) {
            let mut x = workspace.take(entries.len() * span.len() * hidden);
            let of_span = entries.clone().flat_map(|e| span.clone().map(move |t| e * count + t));
            self.embed(of_span.map(|i| ids[i]), &mut x);
            let start = seen + span.start;
            self.run(&mut x, batch, entries.clone(), start, memories, workspace)?;
            for (entry, x) in entries.zip(x.chunks_exact(span.len() * hidden)) {
                let first = span.start.max(count - wanted);
                if first < span.end {
                    let x = &x[(first - span.start) * hidden..];
                    let at = (entry * wanted + first - (count - wanted)) * hidden;
                    top[at..at + x.len()].copy_from_slice(x);
                }
            }
            workspace.give(x);
        }
        let logits = self.logits(&mut top);
        workspace.give(top);
        Ok(logits)
    }

    /// Embeds ids, one row each.
    fn embed(&self, ids: impl Iterator<Item = u32>, x: &mut [f32]) {
        for (id, row) in ids.zip(x.chunks_exact_mut(self.hidden)) {
            self.embedding.row(id as usize, row);
            if self.embedding_scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= self.embedding_scale);
            }
        }
        if let Some(norm) = &self.embedding_norm {
            norm.apply_in_place(x);
        }
    }

    /// Sends `x` `[entries, tokens, hidden]` through all layers; `seen` tokens came before.
    fn run(
        &self,
        x: &mut [f32],
        batch: usize,
        entries: Range<usize>,
        seen: usize,
        memories: &mut [Memory],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let count = entries.len();
        let tokens = x.len() / self.hidden / count;
        for (residual, memory) in self.residuals.iter().zip(memories) {
            match (&residual.mixer, memory) {
                (Mixer::Recurrent(mixer), Memory::State(state)) => {
                    let size = state.len() / batch;
                    let state = &mut state[entries.start * size..entries.end * size];
                    // A single token of every entry is one product; longer inputs go entry by entry, block by block.
                    let together = if tokens == 1 { count } else { 1 };
                    for entry in (0..count).step_by(together) {
                        let state = &mut state[entry * size..(entry + together) * size];
                        let x = &mut x[entry * tokens * self.hidden..]
                            [..together * tokens * self.hidden];
                        let blocks = x.chunks_mut(BLOCK.max(together) * self.hidden);
                        for (x, start) in blocks.zip((seen..).step_by(BLOCK)) {
                            let tokens = x.len() / self.hidden / together;
                            self.residual(residual, x, workspace, |normed, workspace, out| {
                                let x = Input { x: normed, batch: together, tokens, start };
                                mixer.forward(x, state, workspace, out);
                                Ok(())
                            })?;
                        }
                    }
                }
                (Mixer::Attention(attention), Memory::Cache(cache)) => {
                    self.residual(residual, x, workspace, |normed, _, out| {
                        let x = Input { x: normed, batch: count, tokens, start: seen };
                        attention.forward(x, cache.as_mut(), out)
                    })?;
                }
                _ => unreachable!("memories are made from the mixers"),
            }
        }
        Ok(())
    }

    fn residual(
        &self,
        residual: &Residual,
        x: &mut [f32],
        workspace: &mut Workspace,
        mix: impl FnOnce(&[f32], &mut Workspace, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let mut normed = workspace.take(x.len());
        let mut out = workspace.take(x.len());
        residual.norm.apply(x, &mut normed);
        let result = mix(&normed, workspace, &mut out);
        crate::simd::zip(crate::simd::Add, x, &out);
        workspace.give(out);
        workspace.give(normed);
        result
    }

    /// The logits of rows that have been through all layers.
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

/// The pieces of a forward call that go through all layers at a time: (entries, tokens). Without attention, memory is that of one
/// block; attention layers take the whole prompt in one call, so that a cache may compress it after exact attention.
fn spans(batch: usize, count: usize, whole: bool) -> Vec<(Range<usize>, Range<usize>)> {
    if whole || count == 1 {
        return vec![(0..batch, 0..count)];
    }
    let blocks = move |entry| {
        let block = move |start| (entry..entry + 1, start..count.min(start + BLOCK));
        (0..count).step_by(BLOCK).map(block)
    };
    (0..batch).flat_map(blocks).collect()
}
