//! A model on the host.

use std::ops::Range;

use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Mixer, Residual, Span};
use crate::norm::Norm;
use crate::outline::{Block, Kept, Outline};
use crate::workspace::Workspace;
use longctx_core::{Batch, KvCache, LayerSpec, Logits, Result};

/// Tokens processed by a recurrent mixer at a time. It bounds the memory of activations.
const BLOCK: usize = 512;

/// Weights in the host's memory.
#[derive(Debug)]
pub struct Host {
    pub family: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub embedding: Matrix,
    /// The factor of embeddings.
    pub embedding_scale: f32,
    /// RWKV's norm of embeddings.
    pub embedding_norm: Option<Norm>,
    pub residuals: Vec<Residual>,
    pub norm: Norm,
    /// The output head; `None` if it is the embedding matrix (tied weights).
    pub head: Option<Matrix>,
    /// Soft cap: a logit l becomes `cap * tanh(l / cap)`.
    pub soft_cap: Option<f32>,
    /// End-of-text tokens.
    pub eos: Vec<u32>,
}

impl Host {
    pub fn outline(&self) -> Outline {
        let block = |residual: &Residual| Block {
            name: format!("layers.{}.{}", residual.layer, residual.name),
            kept: match &residual.mixer {
                Mixer::Recurrent(mixer) => Kept::State(mixer.state()),
                Mixer::Attention(attention) => {
                    let spec = LayerSpec::new(attention.shape).with_rope(attention.rope.clone());
                    Kept::Cache(spec.at(residual.layer, self.layers))
                }
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

    /// Returns the logits of a batch, row by row, and updates the states of its sequences.
    pub fn forward(
        &self,
        batch: &Batch,
        ids: &[u32],
        logits: Logits,
        entries: &mut [Entry],
        caches: &mut [Box<dyn KvCache>],
        workspace: &mut Workspace,
    ) -> Result<Vec<f32>> {
        let hidden = self.hidden;
        let mut top = Vec::new();
        let pieces = pieces(entries);
        // Without attention, the memory is that of one piece. Attention layers receive whole
        // prompts in one call, so that a cache may compress them after exact attention.
        let at_a_time = if caches.is_empty() { 1 } else { pieces.len() };
        for pieces in pieces.chunks(at_a_time) {
            let rows = pieces[0].rows.start..pieces[pieces.len() - 1].rows.end;
            let mut x = workspace.take(rows.len() * hidden);
            self.embed(&ids[rows.clone()], &mut x);
            self.run(&mut x, pieces, batch, entries, caches, workspace)?;
            match logits {
                Logits::All => top.extend_from_slice(&x),
                Logits::Last => {
                    let last = entries.iter().map(|entry| entry.rows.end - 1);
                    for row in last.filter(|row| rows.contains(row)) {
                        top.extend_from_slice(&x[(row - rows.start) * hidden..][..hidden]);
                    }
                }
            }
            workspace.give(x);
        }
        Ok(self.logits(&mut top))
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

    /// Runs the rows of some pieces, `x` `[tokens, hidden]`, through all layers.
    fn run(
        &self,
        x: &mut [f32],
        pieces: &[Piece],
        batch: &Batch,
        entries: &mut [Entry],
        caches: &mut [Box<dyn KvCache>],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let mut caches = caches.iter_mut();
        let mut arrays = 0..0;
        for residual in &self.residuals {
            match &residual.mixer {
                Mixer::Recurrent(mixer) => {
                    arrays = arrays.end..arrays.end + mixer.state_size();
                    for piece in pieces {
                        let first = piece.rows.start - pieces[0].rows.start;
                        let x = &mut x[first * self.hidden..][..piece.rows.len() * self.hidden];
                        let entries = &mut entries[piece.entries()];
                        self.residual(residual, x, workspace, |normed, workspace, out| {
                            let x = Input { x: normed, spans: &piece.spans };
                            let states = entries.iter_mut();
                            let mut states: Vec<_> =
                                states.map(|entry| &mut entry.state[arrays.clone()]).collect();
                            mixer.forward(x, &mut states, workspace, out);
                            Ok(())
                        })?;
                        for (entry, span) in entries.iter_mut().zip(&piece.spans) {
                            entry.keep(span.position + span.tokens, arrays.clone());
                        }
                    }
                }
                Mixer::Attention(attention) => {
                    let Some(cache) = caches.next() else {
                        unreachable!("a session makes a cache for each attention layer")
                    };
                    self.residual(residual, x, workspace, |normed, _, out| {
                        attention.forward(normed, batch, cache.as_mut(), out)
                    })?;
                }
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
pub struct Entry {
    /// Number of its earlier tokens.
    pub position: usize,
    /// Its rows in the batch.
    pub rows: Range<usize>,
    pub state: Vec<f32>,
    /// Numbers of tokens after which the state is copied, in increasing order, with the copies.
    pub snapshots: Vec<(usize, Vec<f32>)>,
}

impl Entry {
    /// Copies a range of the state if a snapshot is due at this position.
    fn keep(&mut self, position: usize, numbers: Range<usize>) {
        if let Some((_, copy)) = self.snapshots.iter_mut().find(|(at, _)| *at == position) {
            copy.resize(self.state.len(), 0.0);
            copy[numbers.clone()].copy_from_slice(&self.state[numbers]);
        }
    }
}

/// Rows that a recurrent mixer processes together: at most one span of each sequence.
struct Piece {
    /// Rows of the batch.
    rows: Range<usize>,
    spans: Vec<Span>,
    /// Batch index of the first span's sequence.
    first: usize,
}

impl Piece {
    /// Returns the batch indices of the sequences.
    fn entries(&self) -> Range<usize> {
        self.first..self.first + self.spans.len()
    }
}

/// Splits a batch into pieces of up to [`BLOCK`] rows, and after each token with a snapshot.
fn pieces(entries: &[Entry]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        let mut start = entry.rows.start;
        while start < entry.rows.end {
            let position = entry.position + start - entry.rows.start;
            let open = pieces.last_mut();
            let open = open.filter(|p| p.entries().end == i && p.rows.len() < BLOCK);
            let piece = match open {
                Some(piece) => piece,
                None => {
                    pieces.push(Piece { rows: start..start, spans: Vec::new(), first: i });
                    let last = pieces.len() - 1;
                    &mut pieces[last]
                }
            };
            let snapshot = entry.snapshots.iter().find(|(at, _)| *at > position);
            let tokens = (entry.rows.end - start)
                .min(BLOCK - piece.rows.len())
                .min(snapshot.map_or(usize::MAX, |(at, _)| at - position));
            piece.spans.push(Span { row: piece.rows.len(), tokens, position });
            start += tokens;
            piece.rows.end = start;
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(position: usize, rows: Range<usize>, snapshots: &[usize]) -> Entry {
        let snapshots = snapshots.iter().map(|&at| (at, Vec::new())).collect();
        Entry { position, rows, state: Vec::new(), snapshots }
    }

    #[test]
    fn pieces_are_full_hold_a_sequence_once_and_end_at_snapshots() {
        let entries = [
            entry(7, 0..1, &[]),
            entry(0, 1..801, &[]),
            entry(90, 801..830, &[100]),
            entry(0, 830..831, &[]),
        ];
        let cut: Vec<_> = pieces(&entries)
            .iter()
            .map(|p| (p.rows.clone(), p.first, p.spans.iter().map(|s| s.tokens).collect()))
            .collect();
        let expected: [(_, _, Vec<usize>); 3] =
            [(0..512, 0, vec![1, 511]), (512..811, 1, vec![289, 10]), (811..831, 2, vec![19, 1])];
        assert_eq!(cut, expected);
    }
}
