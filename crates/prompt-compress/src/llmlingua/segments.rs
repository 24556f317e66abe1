//! Token selection, one segment at a time. Each segment is read after the kept tokens of the
//! earlier ones.

use super::cut::Cut;
use super::ratios::Step;
use crate::meter::Meter;
use longctx_core::{CausalLm, Error, Result};

/// The tokens being cut, with their original indices.
#[derive(Debug, Clone)]
pub struct Kept {
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
    pub shares: &'a [bool],
    /// The token that separates contexts, if pairs of it are kept.
    pub split: Option<u32>,
    /// Whether the score of a token is the reduction of its loss by the question.
    pub contrast: bool,
}

/// The losses of one sequence, extended segment by segment.
#[derive(Debug, Default)]
pub struct Track {
    losses: Vec<f32>,
    /// Number of tokens that the next pass need not read again.
    reused: usize,
    /// Start index of the next pass's losses.
    ready: usize,
}

impl Track {
    /// Computes the losses of `ids[..end]`, reusing those before the last segment. Returns `false`
    /// if there are none.
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

    /// Drops the losses of the `gone` tokens after the first `start`, which have left the context.
    fn slide(&mut self, start: usize, gone: usize) {
        self.losses.drain(start.min(self.losses.len())..(start + gone).min(self.losses.len()));
        self.reused = self.reused.saturating_sub(gone);
        self.ready = self.ready.saturating_sub(gone);
    }
}

fn lost(expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Error {
    Error::mismatch("losses of a segment", expected, got)
}

/// Cuts `ids` by iterative token-level compression (arXiv 2310.05736). `plain` measures the text
/// without the question.
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
        // The first pass reads the whole text: the threshold of the first segment is that of all
        // tokens.
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
