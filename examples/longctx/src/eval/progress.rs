//! Progress of a run on the terminal.

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use longctx_eval::Event;
use longctx_examples::say;

pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    pub fn new() -> Result<Self> {
        let bar = ProgressBar::no_length();
        bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} (left: {eta})")?);
        Ok(Self { bar })
    }

    pub fn show(&mut self, event: &Event<'_>) {
        match event {
            Event::Started { total, done } => {
                self.bar.set_length(*total as u64);
                self.bar.set_position(*done as u64);
                // The remaining time is estimated from this process's answers only.
                self.bar.reset_eta();
            }
            Event::Opening(setting) => self.bar.set_message(setting.name.clone()),
            Event::Answered(_) => self.bar.inc(1),
            Event::Dropped(line) => self.say(&format!("dropped an incomplete last line: {line}…")),
            Event::Skipped(error) => self.say(&format!("skipped: {error}")),
            Event::Failed(error) => {
                self.bar.inc(1);
                self.say(&format!("failed: {error}"));
            }
            _ => {}
        }
    }

    pub fn end(&self) {
        self.bar.finish_and_clear();
    }

    /// Prints a row of the table of results.
    pub fn row(&self, row: &str) {
        self.bar.suspend(|| say!("{row}"));
    }

    /// Prints a line above the progress bar; without a terminal, only the line.
    fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }
}
