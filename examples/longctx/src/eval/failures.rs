//! The samples and settings that a run tried and that have no result.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use longctx_eval::{Error, Event};

/// Names in the error message; the others are counted.
const SHOWN: usize = 10;

#[derive(Default)]
pub struct Failures(BTreeSet<String>);

impl Failures {
    /// Adds what failed, and removes what a later pass answered.
    pub fn update(&mut self, event: &Event<'_>) {
        match event {
            Event::Failed(Error::Subject { what, .. }) => {
                self.0.insert(what.clone());
            }
            Event::Failed(error) => {
                self.0.insert(error.to_string());
            }
            Event::Answered(record) => {
                self.0.remove(&format!("opening {}", record.setting));
                self.0.remove(&format!("{}, {}, {}", record.setting, record.task, record.sample));
            }
            _ => {}
        }
    }

    /// Returns an error that names the failures, if there are any.
    pub fn check(&self) -> Result<()> {
        let shown: Vec<_> = self.0.iter().take(SHOWN).map(String::as_str).collect();
        let more = match self.0.len().saturating_sub(SHOWN) {
            0 => String::new(),
            count => format!("; and {count} more"),
        };
        let names = shown.join("; ");
        ensure!(
            self.0.is_empty(),
            "no result for: {names}{more}. The same command tries them again"
        );
        Ok(())
    }
}
