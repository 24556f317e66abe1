//! Selects the tokens of a part of a segment.

use super::ratios::Step;
use super::segments::{LossTrack, Plan, RemainingTokens};
use longctx_core::{Error, Result};

/// Tokens during the selection.
#[derive(Debug)]
pub struct TokenSelection<'a> {
    pub kept: RemainingTokens,
    /// Tokens that are kept because they separate contexts.
    separators: Option<Vec<bool>>,
    plan: &'a Plan<'a>,
}

impl<'a> TokenSelection<'a> {
    pub fn new(ids: Vec<u32>, plan: &'a Plan<'a>) -> Self {
        let separators = plan.separator.map(|separator| {
            let is = |at: Option<usize>| at.and_then(|at| ids.get(at)) == Some(&separator);
            let pair = |i: usize| is(i.checked_sub(1)) || is(Some(i + 1));
            (0..ids.len()).map(|i| ids[i] == separator && pair(i)).collect()
        });
        let origin = (0..ids.len()).collect();
        Self { kept: RemainingTokens { ids, origin }, separators, plan }
    }

    /// Selects tokens of one part of a segment. The segment ends at `end`; `step` has the size of
    /// the part and the ratio to keep. Returns the end of the next segment.
    ///
    /// Positions are signed and, if negative, count from the end, as in the package. Texts shorter
    /// than a segment depend on it.
    pub fn step(
        &mut self,
        track: &mut LossTrack,
        unconditional_track: &mut LossTrack,
        end: usize,
        step: &Step,
    ) -> Result<usize> {
        let (size, tokens) = (self.plan.size as isize, step.tokens as isize);
        let end = end as isize - size + tokens;
        let mut keep = self.above_threshold(track, unconditional_track, step.ratio)?;
        // A character that continues after the part is left to the next part.
        let after = self.start_of_character(python_index(end, keep.len()));
        keep[after..].fill(true);
        let before = self.start_of_character(python_index(end - tokens, keep.len()));
        keep[..before].fill(true);
        filter(track.losses_mut(), &keep);
        if self.plan.contrastive {
            let start = self.plan.start;
            let losses = unconditional_track.losses_mut();
            keep.resize(keep.len().max(losses.len() + start + 1), true);
            filter(losses, &keep[start..]);
        }
        keep.resize(self.kept.ids.len(), true);
        self.keep_separators(&mut keep, end, tokens);
        filter(&mut self.kept.ids, &keep);
        filter(&mut self.kept.origin, &keep);
        if let Some(separators) = &mut self.separators {
            filter(separators, &keep);
        }
        let removed =
            keep[..python_index(end, keep.len())].iter().filter(|keep| !**keep).count() as isize;
        Ok((end - removed + size).max(0) as usize)
    }

    /// Returns which tokens exceed the threshold that leaves `ratio` of all tokens.
    fn above_threshold(
        &self,
        track: &LossTrack,
        unconditional_track: &LossTrack,
        ratio: f64,
    ) -> Result<Vec<bool>> {
        let losses = track.losses();
        let start = if self.plan.contrastive { self.plan.start } else { 0 };
        let (Some(front), Some(text)) = (losses.get(..start), losses.get(start..)) else {
            return Err(Error::mismatch("losses", format!("more than {start}"), losses.len()));
        };
        let mut weights = text.to_vec();
        if self.plan.contrastive {
            let without = unconditional_track.losses();
            if without.len() < text.len() {
                let expected = format!("at least {}", text.len());
                let what = "losses without the question";
                return Err(Error::mismatch(what, expected, without.len()));
            }
            weights.iter_mut().zip(without).for_each(|(with, without)| *with = without - *with);
        }
        self.average_characters(&mut weights, start);
        let threshold = threshold(weights.clone(), ratio);
        let front = front.iter().map(|&loss| loss > 0.0);
        let above = weights.iter().map(|&weight| weight > threshold);
        let last = losses.first().is_some_and(|&loss| loss > 0.0);
        let mut keep: Vec<bool> = front.chain(above).chain(std::iter::once(last)).collect();
        // The weight of the last token is not that of its character.
        let last = losses.len();
        let character = self.start_of_character(last)..=last;
        let stays = keep[character.clone()].contains(&true);
        keep[character].fill(stays);
        Ok(keep)
    }

    /// Sets the weights of tokens that share a character to their mean, so that they are kept or
    /// dropped together. `weights` starts at token `start`.
    fn average_characters(&self, weights: &mut [f32], start: usize) {
        let mut from = 0;
        while from < weights.len() {
            let goes_on = |&at: &usize| self.is_inside_character(start + at);
            let to =
                (from + 1..weights.len()).take_while(goes_on).last().map_or(from + 1, |at| at + 1);
            let character = &mut weights[from..to];
            if let [_, _, ..] = character {
                let mean = character.iter().sum::<f32>() / character.len() as f32;
                character.fill(mean);
            }
            from = to;
        }
    }

    /// Returns whether a token continues the character of the previous token.
    fn is_inside_character(&self, at: usize) -> bool {
        let origin = self.kept.origin.get(at).filter(|_| at > self.plan.start);
        origin.is_some_and(|&origin| self.plan.continues_character[origin])
    }

    /// Returns the first token of the character that the token at `at` belongs to.
    fn start_of_character(&self, mut at: usize) -> usize {
        while self.is_inside_character(at) {
            at -= 1;
        }
        at
    }

    /// Keeps the pairs of separators between contexts. Of other consecutive separators it keeps the
    /// first.
    fn keep_separators(&self, keep: &mut [bool], end: isize, tokens: isize) {
        let (Some(separators), Some(separator)) = (&self.separators, self.plan.separator) else {
            return;
        };
        keep.iter_mut().zip(separators).for_each(|(keep, &separator)| *keep |= separator);
        let mut last = None;
        for i in (end - tokens).max(0)..end.min(keep.len() as isize) {
            let i = i as usize;
            if !keep[i] {
                continue;
            }
            let now = Some(self.kept.ids[i]);
            if now == Some(separator) && last == now && !separators[i] {
                keep[i] = false;
            } else {
                last = now;
            }
        }
    }

    /// Removes finished tokens from the model's context so that the segment ending at `end` fits
    /// into `context` tokens. Returns their number. Half of the context is removed at a time,
    /// because the rest has to be read again.
    pub fn slide_context(
        &mut self,
        end: usize,
        context: usize,
        removed: &mut RemainingTokens,
    ) -> usize {
        let (start, size) = (self.plan.start, self.plan.size);
        let stay = (context / 2).max(start + size);
        let range = start..self.start_of_character(start + end.saturating_sub(stay));
        removed.ids.extend(self.kept.ids.drain(range.clone()));
        removed.origin.extend(self.kept.origin.drain(range.clone()));
        if let Some(separators) = &mut self.separators {
            separators.drain(range.clone());
        }
        range.len()
    }
}

/// Returns the loss that the share `ratio` of the tokens exceeds.
fn threshold(mut losses: Vec<f32>, ratio: f64) -> f32 {
    if ratio == 1.0 || losses.is_empty() {
        return f32::NEG_INFINITY;
    }
    let at = ((losses.len() as f64 * ratio) as usize).saturating_sub(1).min(losses.len() - 1);
    losses.sort_by(|a, b| b.total_cmp(a));
    losses[at]
}

/// Resolves a position that may count from the end, as in a Python slice.
fn python_index(at: isize, len: usize) -> usize {
    let at = if at < 0 { at + len as isize } else { at };
    at.clamp(0, len as isize) as usize
}

/// Keeps the elements whose flag in `keep` is set; elements past its end are dropped.
fn filter<T>(values: &mut Vec<T>, keep: &[bool]) {
    let mut keep = keep.iter();
    values.retain(|_| keep.next().copied().unwrap_or(false));
}
