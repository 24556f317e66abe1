//! The queue of a setting's samples without results.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::folder::Results;
use super::record::Record;
use super::subject::{Answer, Question, Queue, SubjectError};
use super::{Event, Job, Plan, Summary};
use crate::{Error, Result, peak_memory};

/// A queue that writes results in the order of the samples: an answer waits for those of earlier
/// samples.
pub(super) struct Pending<'q, 'e> {
    plan: &'q Plan<'q>,
    /// The number of the subject's first setting, and the samples.
    first: usize,
    units: &'q [&'q Job<'q>],
    results: &'e mut Results,
    summary: &'e mut Summary,
    on_event: &'e mut dyn FnMut(Event<'_>),
    /// Start time of each sample.
    taken: Vec<Instant>,
    /// Number of samples that have been started and not answered.
    running: usize,
    /// Time within the model since the last time that no sample was running.
    within: Duration,
    /// Answers that wait for those of earlier samples.
    waiting: BTreeMap<usize, Result<Record>>,
    written: usize,
    /// The error that ends the run.
    error: Option<Error>,
}

impl<'q, 'e> Pending<'q, 'e> {
    pub fn new(
        plan: &'q Plan<'q>,
        (first, units): (usize, &'q [&'q Job<'q>]),
        results: &'e mut Results,
        summary: &'e mut Summary,
        on_event: &'e mut dyn FnMut(Event<'_>),
    ) -> Self {
        Self {
            plan,
            first,
            units,
            results,
            summary,
            on_event,
            taken: Vec::new(),
            running: 0,
            within: Duration::ZERO,
            waiting: BTreeMap::new(),
            written: 0,
            error: None,
        }
    }

    /// # Errors
    /// If a result could not be written, or, in a strict run, a sample failed.
    pub fn end(self) -> Result<()> {
        self.error.map_or(Ok(()), Err)
    }

    /// Adds time within the model: shares of a batch's steps add up, concurrent requests to a
    /// server overlap.
    fn count(&mut self, answer: &Answer) {
        self.within = match answer.batch {
            Some(_) => self.within + answer.model,
            None => self.within.max(answer.model),
        };
    }

    fn write(&mut self, result: Result<Record>) -> Result<()> {
        match result {
            Ok(record) => {
                self.results.append(&record)?;
                self.summary.answered += 1;
                (self.on_event)(Event::Answered(&record));
            }
            Err(error) if self.plan.strict => return Err(error),
            Err(error) => {
                self.summary.failed += 1;
                (self.on_event)(Event::Failed(&error));
            }
        }
        Ok(())
    }
}

impl<'q> Queue<'q> for Pending<'q, '_> {
    fn next(&mut self) -> Option<(usize, Question<'q>)> {
        let number = self.taken.len();
        let unit = self.units.get(number).filter(|_| self.error.is_none())?;
        if self.running == 0 {
            peak_memory::reset();
        }
        self.taken.push(Instant::now());
        self.running += 1;
        Some((number, unit.question(self.plan, self.first)))
    }

    fn answered(&mut self, number: usize, answer: Result<Answer, SubjectError>) {
        if let Ok(answer) = &answer {
            self.count(answer);
        }
        self.running -= 1;
        if self.running == 0 {
            self.summary.model += std::mem::take(&mut self.within);
        }
        let record = self.units[number].record(self.plan, answer, self.taken[number]);
        self.waiting.insert(number, record);
        while let (Some(result), None) = (self.waiting.remove(&self.written), &self.error) {
            self.written += 1;
            self.error = self.write(result).err();
        }
    }
}
