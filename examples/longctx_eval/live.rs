//! The table of results, a row as each setting finishes.

use std::path::{Path, PathBuf};

use longctx_eval::statistics::{self, Difference, of_setting};
use longctx_eval::{Event, Setting, records};

pub struct Live {
    folder: PathBuf,
    settings: Vec<String>,
    began: bool,
}

impl Live {
    pub fn new(folder: &Path, settings: &[Setting]) -> Self {
        let settings = settings.iter().map(|setting| setting.name.clone()).collect();
        Self { folder: folder.into(), settings, began: false }
    }

    /// The row for a setting that has finished, after a head for the first one.
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
        let speeds = own.iter().filter_map(|record| record.timings.decode_tokens_per_second);
        let (sum, count) = speeds.fold((0.0, 0), |(sum, count), speed| (sum + speed, count + 1));
        let speed = if count > 0 { format!("{:.1}", sum / f64::from(count)) } else { "-".into() };
        let [mean, low, high] = [score.mean, score.low, score.high].map(percent);
        let head = if self.began {
            String::new()
        } else {
            self.began = true;
            format!(
                "{:28} {:>7} {:>20} {:>22} {:>7} {:>9}\n",
                "setting", "samples", "score, % [95 %]", "to dense [95 %]", "ratio", "tokens/s"
            )
        };
        let score = format!("{mean:5.1} [{low:.1}, {high:.1}]");
        Some(format!(
            "{head}{:28} {:>7} {score:>20} {difference:>22} {ratio:>7} {speed:>9}",
            setting.name,
            own.len()
        ))
    }
}
