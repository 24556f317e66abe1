//! One cut: selects the tokens of a part of a segment.

use super::ratios::Step;
use super::segments::{Kept, Plan, Track};
use longctx_core::{Error, Result};

/// Tokens during the cut.
#[derive(Debug)]
pub struct Cut<'a> {
    pub kept: Kept,
    /// Tokens that are kept because they separate contexts.
    keep: Option<Vec<bool>>,
    plan: &'a Plan<'a>,
}

impl<'a> Cut<'a> {
    pub fn new(ids: Vec<u32>, plan: &'a Plan<'a>) -> Self {
        let keep = plan.split.map(|split| {
            let is = |at: Option<usize>| at.and_then(|at| ids.get(at)) == Some(&split);
            let pair = |i: usize| is(i.checked_sub(1)) || is(Some(i + 1));
            (0..ids.len()).map(|i| ids[i] == split && pair(i)).collect()
        });
        let origin = (0..ids.len()).collect();
        Self { kept: Kept { ids, origin }, keep, plan }
    }

    /// Cuts the part of the segment ending at `end` that `step` describes. Returns the end of the
    /// next segment.
    ///
    /// Positions are signed and, if negative, count from the end, as in the package. Texts shorter
    /// than a segment depend on it.
    pub fn step(
        &mut self,
        track: &mut Track,
        own: &mut Track,
        end: usize,
        step: &Step,
    ) -> Result<usize> {
        let (size, tokens) = (self.plan.size as isize, step.tokens as isize);
        let end = end as isize - size + tokens;
        let mut need = self.wanted(track, own, step.ratio)?;
        // A character that continues after the part is left to the next part.
        let after = self.start_of_character(place(end, need.len()));
        need[after..].fill(true);
        let before = self.start_of_character(place(end - tokens, need.len()));
        need[..before].fill(true);
        filter(track.losses_mut(), &need);
        if self.plan.contrast {
            let start = self.plan.start;
            let losses = own.losses_mut();
            need.resize(need.len().max(losses.len() + start + 1), true);
            filter(losses, &need[start..]);
        }
        need.resize(self.kept.ids.len(), true);
        self.keep_splits(&mut need, end, tokens);
        filter(&mut self.kept.ids, &need);
        filter(&mut self.kept.origin, &need);
        if let Some(keep) = &mut self.keep {
            filter(keep, &need);
        }
        let gone = need[..place(end, need.len())].iter().filter(|need| !**need).count() as isize;
        Ok((end - gone + size).max(0) as usize)
    }

    /// Returns which tokens exceed the threshold that leaves `ratio` of all tokens.
    fn wanted(&self, track: &Track, own: &Track, ratio: f64) -> Result<Vec<bool>> {
        let losses = track.losses();
        let start = if self.plan.contrast { self.plan.start } else { 0 };
        let (Some(front), Some(text)) = (losses.get(..start), losses.get(start..)) else {
            return Err(Error::mismatch("losses", format!("more than {start}"), losses.len()));
        };
        let mut weights = text.to_vec();
        if self.plan.contrast {
            let without = own.losses();
            if without.len() < text.len() {
                let expected = format!("at least {}", text.len());
                let what = "losses without the question";
                return Err(Error::mismatch(what, expected, without.len()));
            }
            weights.iter_mut().zip(without).for_each(|(with, without)| *with = without - *with);
        }
        self.level(&mut weights, start);
        let threshold = threshold(weights.clone(), ratio);
        let front = front.iter().map(|&loss| loss > 0.0);
        let above = weights.iter().map(|&weight| weight > threshold);
        let last = losses.first().is_some_and(|&loss| loss > 0.0);
        let mut need: Vec<bool> = front.chain(above).chain(std::iter::once(last)).collect();
        // The weight of the last token is not that of its character.
        let last = losses.len();
        let character = self.start_of_character(last)..=last;
        let stays = need[character.clone()].contains(&true);
        need[character].fill(stays);
        Ok(need)
    }

    /// Sets the weights of tokens that share a character to their mean, so that they are kept or
    /// dropped together. `weights` starts at token `start`.
    fn level(&self, weights: &mut [f32], start: usize) {
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
        origin.is_some_and(|&origin| self.plan.shares[origin])
    }

    /// Returns the first token of the character that the token at `at` belongs to.
    fn start_of_character(&self, mut at: usize) -> usize {
        while self.is_inside_character(at) {
            at -= 1;
        }
        at
    }

    /// Keeps the pairs that separate contexts; of other consecutive separators only the first.
    fn keep_splits(&self, need: &mut [bool], end: isize, tokens: isize) {
        let (Some(keep), Some(split)) = (&self.keep, self.plan.split) else { return };
        need.iter_mut().zip(keep).for_each(|(need, &keep)| *need |= keep);
        let mut last = None;
        for i in (end - tokens).max(0)..end.min(need.len() as isize) {
            let i = i as usize;
            if !need[i] {
                continue;
            }
            let now = Some(self.kept.ids[i]);
            if now == Some(split) && last == now && !keep[i] {
                need[i] = false;
            } else {
                last = now;
            }
        }
    }

    /// Removes finished tokens from the model's context so that the segment ending at `end` fits
    /// into `context` tokens. Returns their number. Half of the context is removed at a time,
    /// because the rest has to be read again.
    pub fn slide(&mut self, end: usize, context: usize, gone: &mut Kept) -> usize {
        let (start, size) = (self.plan.start, self.plan.size);
        let stay = (context / 2).max(start + size);
        let range = start..self.start_of_character(start + end.saturating_sub(stay));
        gone.ids.extend(self.kept.ids.drain(range.clone()));
        gone.origin.extend(self.kept.origin.drain(range.clone()));
        if let Some(keep) = &mut self.keep {
            keep.drain(range.clone());
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
fn place(at: isize, len: usize) -> usize {
    let at = if at < 0 { at + len as isize } else { at };
    at.clamp(0, len as isize) as usize
}

/// Keeps the elements whose flag in `need` is set; elements past its end are dropped.
fn filter<T>(values: &mut Vec<T>, need: &[bool]) {
    let mut need = need.iter();
    values.retain(|_| need.next().copied().unwrap_or(false));
}
