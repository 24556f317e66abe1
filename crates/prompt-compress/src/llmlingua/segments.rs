//! Token by token, a segment at a time: each is cut with what is left of the earlier ones before it.

use super::cut::Cut;
use super::ratios::Step;
use crate::meter::Meter;
use longctx_core::{CausalLm, Error, Result};

/// What is cut: tokens, and which of the original ones they are.
#[derive(Debug, Clone)]
pub struct Kept {
    pub ids: Vec<u32>,
    pub origin: Vec<usize>,
}

/// How a text is cut into segments, and what stays in any case.
#[derive(Debug)]
pub struct Plan<'a> {
    /// Tokens of a segment.
    pub size: usize,
    /// Tokens at the front that are never cut: the question, where tokens are weighed against it.
    pub start: usize,
    /// Each segment's ratios.
    pub steps: &'a [Vec<Step>],
    /// Of each token, whether it shares a character with the one before: then both stay or go.
    pub shares: &'a [bool],
    /// The token that separates contexts, if pairs of it stay.
    pub split: Option<u32>,
    /// Whether a token counts by what the question takes away from its loss.
    pub contrast: bool,
}

/// The losses of one sequence, grown segment by segment.
#[derive(Debug, Default)]
pub struct Track {
    losses: Vec<f32>,
    /// Tokens that the next pass need not go through again.
    reused: usize,
    /// Where the next pass's losses belong.
    ready: usize,
}

impl Track {
    /// Losses of `ids[..end]`, those before the last segment taken from earlier passes. `false` if there are none.
    fn extend<M: CausalLm>(
        &mut self,
        meter: &mut Meter<M>,
        ids: &[u32],
        end: usize,
    ) -> Result<bool> {
        let end = end.min(self.reused.saturating_add(meter.context_length())).min(ids.len());
        let new = meter.losses(&ids[..end], self.reused)?;
        if new.is_empty() {
            return Ok(false);
        }
        if self.losses.is_empty() {
            self.losses = new;
            return Ok(true);
        }
        self.losses.resize(self.losses.len().max(end - 1), 0.0);
        match self.losses.get_mut(self.ready..end - 1) {
            Some(place) if place.len() == new.len() => place.copy_from_slice(&new),
            _ => return Err(lost(end - 1 - self.ready.min(end - 1), new.len())),
        }
        Ok(true)
    }

    pub fn losses(&self) -> &[f32] {
        &self.losses
    }

    pub fn losses_mut(&mut self) -> &mut Vec<f32> {
        &mut self.losses
    }

    /// Forgets the losses of tokens that have gone out of sight, those after the first `start`.
    fn slide(&mut self, start: usize, gone: usize) {
        self.losses.drain(start.min(self.losses.len())..(start + gone).min(self.losses.len()));
        self.reused = self.reused.saturating_sub(gone);
        self.ready = self.ready.saturating_sub(gone);
    }
}

fn lost(expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Error {
    Error::mismatch("losses of a segment", expected, got)
}

/// Cuts `ids` as arXiv 2310.05736 does (iterative token-level compression); `plain` meters the text without the question.
pub fn compress<M: CausalLm>(
    meter: &mut Meter<M>,
    mut plain: Option<&mut Meter<M>>,
    ids: Vec<u32>,
    plan: &Plan<'_>,
) -> Result<Kept> {
    let (size, start) = (plan.size, plan.start);
    let mut popped = Kept { ids: Vec::new(), origin: Vec::new() };
    let mut cut = Cut::new(ids, plan);
    let (mut track, mut own) = (Track::default(), Track::default());
    let mut end = (size + start).min(cut.kept.ids.len());
    for (round, steps) in plan.steps.iter().enumerate() {
        if end > cut.kept.ids.len() {
            break;
        }
        if end > meter.context_length() && round > 1 {
            let gone = cut.slide(end, meter.context_length(), &mut popped);
            end -= gone;
            track.slide(start, gone);
            own.slide(0, gone);
        }
        // The first pass goes through the whole text: the first segment's threshold is that of all tokens.
        let reach = if round == 0 { cut.kept.ids.len() } else { end };
        if !track.extend(meter, &cut.kept.ids, reach)? {
            break;
        }
        let from = end.saturating_sub(size);
        track.reused = if round == 0 { 0 } else { from };
        track.ready = if start > 0 && round == 0 { 0 } else { from };
        if plan.contrast {
            let text = &cut.kept.ids[start..];
            let meter = plain.as_deref_mut().unwrap_or(meter);
            own.extend(meter, text, if round == 0 { text.len() } else { end - start })?;
            own.reused = if round == 0 { 0 } else { from - start };
            own.ready = if start > 0 && round == 0 { 0 } else { from - start };
        }
        for step in steps {
            end = cut.step(&mut track, &mut own, end, step)?;
        }
    }
    popped.ids.extend_from_slice(&cut.kept.ids[start..]);
    popped.origin.extend_from_slice(&cut.kept.origin[start..]);
    Ok(popped)
}
