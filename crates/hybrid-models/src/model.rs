//! The models: residual blocks over a token embedding, whatever their mixers.

use std::sync::Arc;

use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Mixer, Part, Residual};
use crate::norm::Norm;
use crate::session::{Memory, Session};
use crate::workspace::Workspace;
use longctx_core::{KvCache, LayerShape, Result};

/// Tokens that go through a recurrent mixer at a time: activations inside a layer never exist for more.
pub const BLOCK: usize = 512;

/// A model's weights, shared by all sessions that run on them.
#[derive(Debug, Clone)]
pub struct Model {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
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

impl Model {
    pub(crate) fn new(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// The family's name: "mamba", "mamba2", "recurrent_gemma", "rwkv4" to "rwkv7", "hybrid".
    pub fn family(&self) -> &str {
        self.inner.family
    }

    /// Channels between layers.
    pub fn hidden_size(&self) -> usize {
        self.inner.hidden
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.inner.layers
    }

    /// Entries of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.inner.embedding.out()
    }

    /// The tokens that end a text, as far as the checkpoint says.
    pub fn eos(&self) -> &[u32] {
        &self.inner.eos
    }

    /// Whether there are attention layers, which remember through caches.
    pub fn has_attention(&self) -> bool {
        self.inner.has_attention()
    }

    /// A session on these weights: a [`CausalLm`](longctx_core::CausalLm) with a state of its own. `make` builds the cache of each attention
    /// layer, where there are any.
    ///
    /// # Errors
    /// Whatever `make` reports.
    pub fn session<C: KvCache + 'static>(
        &self,
        make: impl Fn(&LayerShape) -> Result<C>,
    ) -> Result<Session> {
        let layers = self.inner.layers;
        let memory = |residual: &Residual| -> Result<Memory> {
            Ok(match &residual.mixer {
                Mixer::Recurrent(_) => Memory::State(Vec::new()),
                Mixer::Attention(attention) => {
                    let shape =
                        LayerShape { layer: residual.layer, layers, attention: attention.shape };
                    Memory::Cache(Box::new(make(&shape)?))
                }
            })
        };
        let memories = self.inner.residuals.iter().map(memory).collect::<Result<_>>()?;
        Ok(Session::new(self.clone(), memories))
    }
}

impl Inner {
    pub fn has_attention(&self) -> bool {
        self.residuals.iter().any(|r| matches!(r.mixer, Mixer::Attention(_)))
    }

    /// Embeds ids, one row each.
    pub fn embed(&self, ids: impl Iterator<Item = u32>, x: &mut [f32]) {
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

    /// Sends `x` `[batch, tokens, hidden]` through all layers.
    pub fn run(
        &self,
        x: &mut [f32],
        batch: usize,
        entries: std::ops::Range<usize>,
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
                        for x in x.chunks_mut(BLOCK.max(together) * self.hidden) {
                            let tokens = x.len() / self.hidden / together;
                            self.residual(residual, x, workspace, |normed, workspace, out| {
                                let x = Input { x: normed, batch: together, tokens };
                                mixer.forward(x, state, workspace, out);
                                Ok(())
                            })?;
                        }
                    }
                }
                (Mixer::Attention(attention), Memory::Cache(cache)) => {
                    self.residual(residual, x, workspace, |normed, _, out| {
                        let x = Input { x: normed, batch: count, tokens };
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
    pub fn logits(&self, x: &mut [f32]) -> Vec<f32> {
        self.norm.apply_in_place(x);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let mut logits = vec![0.0; x.len() / self.hidden * head.out()];
        head.apply(Rows::new(x, self.hidden), &mut logits);
        if let Some(cap) = self.soft_cap {
            crate::simd::map(crate::simd::SoftCap(cap), &mut logits);
        }
        logits
    }

    /// Each residual's state: its full name and its arrays; nothing for attention.
    pub fn state_parts(&self) -> impl Iterator<Item = (String, Vec<Part>)> + '_ {
        self.residuals.iter().map(|residual| {
            let parts = match &residual.mixer {
                Mixer::Recurrent(mixer) => mixer.state(),
                Mixer::Attention(_) => Vec::new(),
            };
            (format!("layers.{}.{}", residual.layer, residual.name), parts)
        })
    }
}
