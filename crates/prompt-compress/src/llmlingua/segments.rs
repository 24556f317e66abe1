//! Token selection, one segment at a time. Each segment is read after the kept tokens of the
//! earlier ones.

use super::ratios::Step;
use super::token_selection::TokenSelection;
use crate::loss::LossModel;
use longctx_core::{CausalLm, Error, Result};

/// The tokens being cut, with their original indices.
#[derive(Debug, Clone)]
pub struct RemainingTokens {
    pub ids: Vec<u32>,
    pub origin: Vec<usize>,
}

/// The segmentation of a text, and the tokens that are always kept.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Tokens per segment.
    pub size: usize,
    /// Tokens at the front that are never cut: the question, if tokens are scored with it.
    pub start: usize,
    /// The ratios of each segment.
    pub steps: &'a [Vec<Step>],
    /// For each token, whether it shares a character with the previous one: both are then kept or
    /// dropped.
    pub continues_character: &'a [bool],
    /// The token that separates contexts, if pairs of it are kept.
    pub separator: Option<u32>,
    /// Whether the score of a token is the reduction of its loss by the question.
    pub contrastive: bool,
}

/// The losses of one sequence, extended segment by segment.
#[derive(Debug, Default)]
pub struct LossTrack {
    losses: Vec<f32>,
    /// Number of tokens that the next pass need not read again.
    cached_len: usize,
    /// Start index of the next pass's losses.
    next_loss: usize,
}

impl LossTrack {
    /// Computes the losses of `ids[..end]`, reusing those before the last segment. Returns `false`
    /// if there are none.
    fn extend<M: CausalLm>(
        &mut self,
        loss_model: &mut LossModel<M>,
        ids: &[u32],
        end: usize,
    ) -> Result<bool> {
        let end =
            end.min(self.cached_len.saturating_add(loss_model.context_length())).min(ids.len());
        let new = loss_model.losses(&ids[..end], self.cached_len)?;
        if new.is_empty() {
            return Ok(false);
        }
        if self.losses.is_empty() {
            self.losses = new;
            return Ok(true);
        }
        self.losses.resize(self.losses.len().max(end - 1), 0.0);
        match self.losses.get_mut(self.next_loss..end - 1) {
            Some(place) if place.len() == new.len() => place.copy_from_slice(&new),
            _ => return Err(missing_losses(end - 1 - self.next_loss.min(end - 1), new.len())),
        }
        Ok(true)
    }

    pub fn losses(&self) -> &[f32] {
        &self.losses
    }

    pub fn losses_mut(&mut self) -> &mut Vec<f32> {
        &mut self.losses
    }

    /// Drops the losses of the `removed` tokens after the first `start`, which have left the
    /// context.
    fn slide(&mut self, start: usize, removed: usize) {
        self.losses.drain(start.min(self.losses.len())..(start + removed).min(self.losses.len()));
        self.cached_len = self.cached_len.saturating_sub(removed);
        self.next_loss = self.next_loss.saturating_sub(removed);
    }
}

fn missing_losses(expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Error {
    Error::mismatch("losses of a segment", expected, got)
}

/// Cuts `ids` by iterative token-level compression (arXiv 2310.05736). `unconditional` measures the
/// text without the question.
pub fn compress<M: CausalLm>(
    loss_model: &mut LossModel<M>,
    mut unconditional: Option<&mut LossModel<M>>,
    ids: Vec<u32>,
    plan: &Plan<'_>,
) -> Result<RemainingTokens> {
    let (size, start) = (plan.size, plan.start);
    let mut finished = RemainingTokens { ids: Vec::new(), origin: Vec::new() };
    let mut selection = TokenSelection::new(ids, plan);
    let (mut track, mut unconditional_track) = (LossTrack::default(), LossTrack::default());
    let mut end = (size + start).min(selection.kept.ids.len());
    for (round, steps) in plan.steps.iter().enumerate() {
        if end > selection.kept.ids.len() {
            break;
        }
        if end > loss_model.context_length() && round > 1 {
            let removed = selection.slide_context(end, loss_model.context_length(), &mut finished);
            end -= removed;
            track.slide(start, removed);
            unconditional_track.slide(0, removed);
        }
        // The first pass reads the whole text: the threshold of the first segment is that of all
        // tokens.
        let reach = if round == 0 { selection.kept.ids.len() } else { end };
        if !track.extend(loss_model, &selection.kept.ids, reach)? {
            break;
        }
        let from = end.saturating_sub(size);
        track.cached_len = if round == 0 { 0 } else { from };
        track.next_loss = if start > 0 && round == 0 { 0 } else { from };
        if plan.contrastive {
            let text = &selection.kept.ids[start..];
            let loss_model = unconditional.as_deref_mut().unwrap_or(loss_model);
            unconditional_track.extend(
                loss_model,
                text,
                if round == 0 { text.len() } else { end - start },
            )?;
            unconditional_track.cached_len = if round == 0 { 0 } else { from - start };
            unconditional_track.next_loss = if start > 0 && round == 0 { 0 } else { from - start };
        }
        for step in steps {
            end = selection.step(&mut track, &mut unconditional_track, end, step)?;
        }
    }
    finished.ids.extend_from_slice(&selection.kept.ids[start..]);
    finished.origin.extend_from_slice(&selection.kept.origin[start..]);
    Ok(finished)
}
