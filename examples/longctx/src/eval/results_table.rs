//! The table of results, with one row per finished setting.

use std::path::{Path, PathBuf};

use longctx_eval::statistics::{self, Decode, Difference, of_setting};
use longctx_eval::{Event, Setting, records};

pub struct ResultsTable {
    folder: PathBuf,
    settings: Vec<String>,
    began: bool,
}

impl ResultsTable {
    pub fn new(folder: &Path, settings: &[Setting]) -> Self {
        let settings = settings.iter().map(|setting| setting.name.clone()).collect();
        Self { folder: folder.into(), settings, began: false }
    }

    /// Returns the row of a setting that has finished, with the table's header before the first
    /// row.
    pub fn row(&mut self, event: &Event<'_>) -> Option<String> {
        let Event::Finished(setting) = event else { return None };
        let records = records(&self.folder).ok()?;
        let own = of_setting(&records, &setting.name);
        let score = statistics::score(&own)?;
        let percent = |x: f64| 100.0 * x;
        let reference = statistics::reference(&self.settings, &setting.name)?;
        let difference = Difference::between(&records, &setting.name, reference)
            .filter(|_| reference != setting.name)
            .map_or_else(String::new, |Difference { interval, .. }| {
                let [mean, low, high] = [interval.mean, interval.low, interval.high].map(percent);
                format!("{mean:+6.1} [{low:+.1}, {high:+.1}]")
            });
        let sum = |bytes: fn(&longctx_eval::Record) -> Option<usize>| {
            own.iter().filter_map(|record| bytes(record)).sum::<usize>() as f64
        };
        let (dense, held) = (sum(|record| record.dense_bytes), sum(|record| record.kv_bytes));
        let ratio = if held > 0.0 { format!("{:.2}", dense / held) } else { "-".into() };
        let speed = Decode::of(&own).map_or_else(|| "-".into(), |decode| decode.to_string());
        let [mean, low, high] = [score.mean, score.low, score.high].map(percent);
        let head = if self.began {
            String::new()
        } else {
            self.began = true;
            format!(
                "{:28} {:>7} {:>20} {:>22} {:>7} {:>12}\n",
                "setting", "samples", "score, % [95 %]", "to dense [95 %]", "ratio", "tokens/s"
            )
        };
        let score = format!("{mean:5.1} [{low:.1}, {high:.1}]");
        Some(format!(
            "{head}{:28} {:>7} {score:>20} {difference:>22} {ratio:>7} {speed:>12}",
            setting.name,
            own.len()
        ))
    }
}
