//! A run on the terminal.

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
                // The time left is reckoned from what is answered now.
                self.bar.reset_eta();
            }
            Event::Opening(setting) => self.bar.set_message(setting.name.clone()),
            Event::Answered(_) => self.bar.inc(1),
            Event::Dropped(line) => self.say(&format!("dropped a torn last line: {line}…")),
            Event::Skipped(error) => self.say(&format!("left out: {error}")),
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

    /// A row of the table of results.
    pub fn row(&self, row: &str) {
        self.bar.suspend(|| say!("{row}"));
    }

    /// Above the bar, or alone where there is no terminal.
    fn say(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }
}
